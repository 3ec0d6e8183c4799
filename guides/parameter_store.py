"""A guide's entries in Pyro's parameter store: what they are called, and whose tensors they are.

Pyro keeps parameters by name, and gives every guide of a class the same one. Here a guide is called by its class, so
that a store that was saved fits the guide of another process, unless another guide that is alive has that name. A
tensor that no guide of this process put into the store was loaded, and the guide takes its values; Pyro then goes on
with the guide's own tensors, which the flow computes with.
"""

import re
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import count
from types import FunctionType
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.programs._pyro import SEPARATOR

# The guide that has each name, and the tensors that guides put into a store, by their `id`.
_GUIDES: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_OURS: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

_ROOT = re.compile(r"(?:Auto|Amortized|Structured)Flow(?:_\d+)?")


def tensors(guide: PyroModule) -> Iterator[tuple[str, Tensor]]:
    """Yield all that training may change, parameters and persistent buffers, by their names in the store."""
    for name, child in guide._modules.items():
        if isinstance(child, PyroModule):
            for key, value in child._parameters.items():
                if isinstance(value, nn.Parameter) and not key.endswith("_unconstrained"):  # those Pyro looks after
                    yield f"{child._pyro_name}.{key}", value
            yield from tensors(child)
        elif child is not None:
            params = dict(child.named_parameters())
            state = child.state_dict(keep_vars=True)
            for key, value in {**params, **state}.items():
                # A plain tensor in a parameter's place is lent, by torch.func.functional_call.
                if key in params or not isinstance(value, nn.Parameter):
                    yield f"{guide._pyro_name}.{name}$$${key}", value


def has_name(guide: Any) -> bool:
    """Whether the guide has the name that it goes by."""
    return _GUIDES.get(guide._pyro_name) is guide


def take_name(guide: Any, kind: str, move_aside: bool) -> None:
    """Call the guide by its kind, or that and a number where a guide that is alive has parameters of that name.

    Args:
        guide: The guide, set up.
        kind: Name of its class.
        move_aside: Whether an older guide of the same model gives up its name: where a cell of a notebook ran twice,
            the name is that of the second one.
    """
    params = _unconstrained()
    _forget_the_dead(kind, params)
    loaded = _loaded(kind, params)
    fitting = [root for root in loaded if re.fullmatch(rf"{kind}(_\d+)?", root) and _fits(guide, loaded[root])]
    free = (f"{kind}_{number}" if number else kind for number in count())
    name = next(free)
    while (other := _holder(name, params)) not in (None, guide):
        if move_aside and name == kind and _same_model(guide, other):
            _move(other, next(n for n in free if _holder(n, params) is None and n not in loaded), params)
            break
        name = next(free)
    _rename(guide, name)
    _GUIDES[name] = guide
    if fitting:
        chosen = name if name in fitting else fitting[0]
        if len(fitting) > 1:
            warnings.warn(
                f"the parameter store holds parameters of {' and '.join(fitting)}, all of which fit this {kind}: it "
                f"takes those of {chosen}",
                stacklevel=2,
            )
        if chosen != name:
            _put({f"{name}.{key}": loaded[chosen][key] for key in loaded[chosen]}, ours=False)
            _drop(f"{chosen}.{key}" for key in loaded[chosen])
    elif name not in loaded and loaded:
        warnings.warn(
            f"the parameter store holds parameters of {' and '.join(loaded)}, which do not fit this {kind}: it starts "
            "untrained",
            stacklevel=2,
        )


def keep_entries(guide: Any, changed: set[str]) -> None:
    """Take over what was loaded under the guide's names, and put its own tensors there.

    Args:
        guide: The guide, set up.
        changed: Names of the buffers that were changed since the guide was set up. Others are not put into the store.

    Raises:
        ValueError: If what was loaded has other names or shapes.
    """
    params = _unconstrained()
    own = dict(tensors(guide))
    there = {name: params[name] for name in own if name in params}
    loaded = {name: value for name, value in there.items() if not _is_ours(value)}
    # The same object, or, for a buffer, one that shares its memory.
    alike = {name for name, value in there.items() if value is own[name] or value.data_ptr() == own[name].data_ptr()}
    if loaded:
        _check_loaded(guide, own, loaded)
        with torch.no_grad():
            for name, value in loaded.items():
                own[name].copy_(value)
        for child in _plain_children(guide):
            child.load_state_dict(child.state_dict())  # modules note what is in their buffers
    _drop(name for name in there if name not in alike)
    _put({name: value for name, value in own.items() if name not in alike and _belongs(name, value, there, changed)})


def withdraw(guide: Any) -> None:
    """Remove the guide's own tensors from the store."""
    params = _unconstrained()
    _drop([name for name, _ in tensors(guide) if name in params and _is_ours(params[name])])


def _drop(names: Iterable[str]) -> None:
    store = pyro.get_param_store()
    for name in names:
        if name in store:
            del store[name]


def _belongs(name: str, value: Tensor, there: dict[str, Tensor], changed: set[str]) -> bool:
    if isinstance(value, nn.Parameter):
        return value.requires_grad
    return name in there or name in changed


def _unconstrained() -> dict[str, Tensor]:
    return dict(pyro.get_param_store().named_parameters())


def _is_ours(tensor: Tensor) -> bool:
    return _OURS.get(id(tensor)) is tensor


def _put(entries: dict[str, Tensor], ours: bool = True) -> None:
    if not entries:
        return
    if ours:
        # A buffer as one of those tensors that a user's loop over the store expects, which have gradients.
        entries = {
            name: value if isinstance(value, nn.Parameter) or not value.is_floating_point() else _shared(value)
            for name, value in entries.items()
        }
        _OURS.update({id(value): value for value in entries.values()})
    pyro.get_param_store().set_state({"params": entries, "constraints": dict.fromkeys(entries, constraints.real)})


def _shared(buffer: Tensor) -> Tensor:
    return nn.Parameter(buffer.detach())  # not by requires_grad_(), which vmap refuses


def _holder(name: str, params: dict[str, Tensor]) -> Any:
    """The guide that is alive and has tensors in the store under this name."""
    guide = _GUIDES.get(name)
    if guide is not None and guide._pyro_name == name and any(params.get(n) is value for n, value in tensors(guide)):
        return guide
    return None


def _forget_the_dead(kind: str, params: dict[str, Tensor]) -> None:
    """Remove what guides of a kind that are no more left in the store."""
    for name in [name for name, value in params.items() if re.match(rf"{kind}(_\d+)?\.", name) and _is_ours(value)]:
        if _holder(name.partition(".")[0], params) is None:
            _drop([name])
            del params[name]


def _loaded(kind: str, params: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What was loaded of guides like ours: of each, its tensors by their names within the guide."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in params.items():
        root, _, key = name.partition(".")
        if (
            SEPARATOR in key
            and not _is_ours(value)
            and (_ROOT.fullmatch(root) or re.fullmatch(rf"{kind}(_\d+)?", root))
        ):
            found[root][key] = value
    return dict(found)


def _fits(guide: Any, loaded: dict[str, Tensor]) -> bool:
    start = len(guide._pyro_name) + 1
    own = {name[start:]: value for name, value in tensors(guide)}
    trained = [key for key, value in own.items() if isinstance(value, nn.Parameter) and value.requires_grad]
    return all(key in loaded for key in trained) and all(
        key in own and own[key].shape == value.shape for key, value in loaded.items()
    )


def _check_loaded(guide: Any, own: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    name = guide._pyro_name
    there = {key: tuple(value.shape) for key, value in loaded.items()}
    for key, value in own.items():
        trained = isinstance(value, nn.Parameter) and value.requires_grad
        if key in there and there[key] != tuple(value.shape):
            wrong = f"{key!r} has shape {there[key]} there, and {tuple(value.shape)} in the guide"
        elif trained and key not in _unconstrained():
            wrong = f"{key!r} is missing"
        else:
            continue
        raise ValueError(
            f"the parameter store holds parameters of {name!r} that do not fit this {type(guide).__name__}: {wrong}. "
            "Make the guide as the one whose parameters were saved, or call pyro.clear_param_store() to begin anew"
        )


def _plain_children(guide: PyroModule) -> Iterator[nn.Module]:
    for child in guide._modules.values():
        if isinstance(child, AutoGuide):
            yield from _plain_children(child)
        elif child is not None:
            yield child


def _rename(guide: Any, name: str) -> None:
    # Pyro's own way refuses parts that have been called.
    for path, module in guide.named_modules():
        if isinstance(module, PyroModule):
            module._pyro_name = f"{name}.{path}" if path else name


def _move(guide: Any, name: str, params: dict[str, Tensor]) -> None:
    """Give a guide another name, and its tensors in the store."""
    before = len(guide._pyro_name)
    held = {key: params[key] for key, _ in tensors(guide) if key in params}
    _drop(held)
    _rename(guide, name)
    _GUIDES[name] = guide
    _put({name + key[before:]: value for key, value in held.items()}, ours=False)


def _same_model(guide: Any, other: Any) -> bool:
    """Whether two guides are of one model, maybe defined twice, as a cell of a notebook does that runs again."""
    one, two = guide.given_model, other.given_model
    if isinstance(one, FunctionType) and isinstance(two, FunctionType) and one.__qualname__.isidentifier():
        return (one.__module__, one.__qualname__) == (two.__module__, two.__qualname__)
    return one is two and one is not None
