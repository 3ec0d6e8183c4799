"""Nested arguments as flat lists."""

from collections.abc import Callable, Sequence
from typing import Any


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of nested lists, tuples and dictionaries, and what puts them together again."""
    from torch.utils import _pytree

    leaves, spec = _pytree.tree_flatten(tree)
    return leaves, spec


def unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    """Put leaves together again."""
    from torch.utils import _pytree

    return _pytree.tree_unflatten(list(leaves), spec)


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves alone."""
    from torch.utils import _pytree

    found: list[Any] = _pytree.tree_leaves(tree)
    return found


def leaves_with_paths(tree: Any) -> list[tuple[Any, Any]]:
    """Return each leaf with the keys that lead to it."""
    from torch.utils import _pytree

    found: list[tuple[Any, Any]] = _pytree.tree_flatten_with_path(tree)[0]
    return found


def path_string(path: Any) -> str:
    """Write the keys that lead to a leaf as Python would."""
    from torch.utils import _pytree

    return str(_pytree.keystr(path))


def map_leaves(function: Callable[..., Any], tree: Any) -> Any:
    """Apply a function to each leaf."""
    from torch.utils import _pytree

    return _pytree.tree_map(function, tree)
