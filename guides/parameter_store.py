"""A guide's entries in Pyro's parameter store: what they are called, and whose tensors they are.

Parameters stand there as those of any module do. All persistent buffers together are one entry more, a vector: they
are as much of a flow's state (its units, the whitening, the running means of a batch normalization), but whole numbers
among them would break a user's loop over the store that asks for gradients.

Pyro gives every guide of a class the same name. Here a guide is called by its class, so that a store that was saved
fits the guide of another process, unless another guide that is alive has that name. A tensor that no guide of this
process put into the store was loaded, and the guide takes its values; Pyro then goes on with the guide's own tensors,
which the flow computes with.
"""

import re
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.programs._pyro import SEPARATOR

# The guide that has each name, and the tensors that guides put into a store, by their `id`.
_GUIDES: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_OURS: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
_BUFFERS = "buffers"
_ROOT = re.compile(r"(?:Auto|Amortized|Structured)Flow(?:_\d+)?")


class _Packed(NamedTuple):
    """The entry of a guide's buffers, and the versions that it was made of."""

    entry: Tensor
    versions: list[tuple[int, int]]


_PACKED: weakref.WeakKeyDictionary[Any, _Packed] = weakref.WeakKeyDictionary()


def keep_entries(guide: Any, is_new: bool = False) -> None:
    """Take over what was loaded under the guide's names, and have its own tensors there.

    Args:
        guide: The guide, set up.
        is_new: Whether it was set up just now. A new guide gets a name; another one that has none, a copy or a guide
            whose name went to another one, does so where Pyro runs it, and goes without entries before.

    Raises:
        ValueError: If what was loaded has other names or shapes.
    """
    if pyro.settings.get("module_local_params"):
        return
    if _may_choose_its_name(guide) and _GUIDES.get(guide._pyro_name) is not guide:
        if not is_new and not guide._pyro_context.active:
            return
        _take_name(guide, move_aside=is_new)
    entries, own, name = _entries(), dict(_parameters(guide)), f"{guide._pyro_name}.{_BUFFERS}"
    others = {key: entries[key] for key, value in own.items() if key in entries and entries[key] is not value}
    if name in entries:
        others[name] = entries[name]
    if loaded := {key: value for key, value in others.items() if not _is_ours(value)}:
        _load(guide, own, loaded)
    others.pop(name, None)
    _drop(others)
    _put({key: value for key, value in own.items() if key in others or (value.requires_grad and key not in entries)})
    if guide not in _PACKED or entries.get(name) is not _PACKED[guide].entry:
        _pack(guide)
    keep_buffers(guide)


def keep_buffers(guide: Any) -> None:
    """Bring the entry of the buffers up to date, if the guide has one: a batch normalization's change at every draw."""
    if guide in _PACKED and _PACKED[guide].versions != _versions(_buffers(guide)):
        _pack(guide)


def withdraw(guide: Any) -> None:
    """Remove the guide's own tensors from the store."""
    entries = _entries()
    own = [*dict(_parameters(guide)), f"{guide._pyro_name}.{_BUFFERS}"]
    _drop(name for name in own if name in entries and _is_ours(entries[name]))


def _entries() -> dict[str, Tensor]:
    return dict(pyro.get_param_store().named_parameters())


def _is_ours(tensor: Tensor) -> bool:
    return _OURS.get(id(tensor)) is tensor


def _drop(names: Iterable[str]) -> None:
    store = pyro.get_param_store()
    for name in names:
        if name in store:
            del store[name]


def _put(entries: dict[str, Tensor], ours: bool = True) -> None:
    if not entries:
        return
    if ours:
        _OURS.update({id(value): value for value in entries.values()})
    pyro.get_param_store().set_state({"params": entries, "constraints": dict.fromkeys(entries, constraints.real)})


# What is a guide's


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a guide's parameters by their names in the store, but for those that Pyro itself keeps in line.

    A plain tensor in a parameter's place is lent, by torch.func.functional_call.
    """
    for name, child in module._modules.items():
        if isinstance(child, PyroModule):
            for key, value in child._parameters.items():
                if isinstance(value, nn.Parameter) and not key.endswith("_unconstrained"):
                    yield f"{child._pyro_name}.{key}", value
            yield from _parameters(child)
        elif child is not None:
            prefix = f"{module._pyro_name}.{name}{SEPARATOR}"
            for key, value in child.named_parameters():
                if isinstance(value, nn.Parameter):
                    yield prefix + key, value


def _buffers(guide: nn.Module) -> Iterator[Tensor]:
    for module in guide.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _versions(buffers: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Which tensors these are, and how often they were written to, as far as torch counts."""
    return [(id(buffer), 0 if buffer.is_inference() else buffer._version) for buffer in buffers]


def _pack(guide: Any) -> None:
    """Make all buffers one vector, of the widest type among them, in which whole numbers and flags are exact."""
    buffers = list(_buffers(guide))
    dtype = torch.float32
    for buffer in buffers:
        if buffer.is_floating_point():
            dtype = torch.promote_types(dtype, buffer.dtype)
    if buffers:
        entry = nn.Parameter(torch.cat([buffer.detach().reshape(-1).to(dtype) for buffer in buffers]))
        _PACKED[guide] = _Packed(entry, _versions(buffers))
        _put({f"{guide._pyro_name}.{_BUFFERS}": entry})


# What was loaded


def _load(guide: Any, own: dict[str, nn.Parameter], loaded: dict[str, Tensor]) -> None:
    name = f"{guide._pyro_name}.{_BUFFERS}"
    if reason := _misfit(own, list(_buffers(guide)), loaded, _entries(), name):
        raise ValueError(
            f"the parameter store holds parameters of {guide._pyro_name!r} that do not fit this "
            f"{type(guide).__name__}: {reason}. Make the guide as the one whose parameters were saved, or call "
            "pyro.clear_param_store() to begin anew"
        )
    with torch.no_grad():
        for key, value in loaded.items():
            if key in own:
                own[key].copy_(value)
        if name in loaded:
            buffers = list(_buffers(guide))
            parts = loaded[name].split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
    nn.Module.load_state_dict(guide, guide.state_dict())  # modules note what is in their buffers


def _misfit(
    own: dict[str, nn.Parameter], buffers: list[Tensor], loaded: dict[str, Tensor], there: Iterable[str], name: str
) -> str:
    """Say why what was loaded is not this guide's; "" if it is.

    Args:
        own: The guide's parameters, by their names in the store.
        buffers: Its buffers.
        loaded: What was loaded under these names, and others of the same guide's.
        there: Names of all that is in the store.
        name: That of the buffers' entry.
    """
    for key, value in own.items():
        if key in loaded and loaded[key].shape != value.shape:
            return f"{key!r} has shape {tuple(loaded[key].shape)} there, and {tuple(value.shape)} in the guide"
        if value.requires_grad and key not in there:
            return f"{key!r} is missing"
    size = sum(buffer.numel() for buffer in buffers)
    if name in loaded and loaded[name].numel() != size:
        return f"{name!r} has {loaded[name].numel()} numbers there, and {size} in the guide"
    return next((f"{key!r} is none of its own" for key in loaded if key not in own and key != name), "")


def _loaded(kind: str, entries: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What was loaded of guides like ours: of each, its tensors by their names in the store."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in entries.items():
        root, _, key = name.partition(".")
        is_guide = _ROOT.fullmatch(root) or _is_name(kind, root)
        if is_guide and (SEPARATOR in key or key == _BUFFERS) and not _is_ours(value):
            found[root][name] = value
    return dict(found)


# Names


def _is_name(kind: str, name: str) -> bool:
    return re.fullmatch(rf"{kind}(_\d+)?", name) is not None


def _may_choose_its_name(guide: Any) -> bool:
    """Whether the guide stands alone: else its name says where it stands."""
    return guide.master is None and _is_name(type(guide).__name__, guide._pyro_name)


def _take_name(guide: Any, move_aside: bool) -> None:
    """Call the guide by its class, or that and a number where a guide that is alive has parameters of that name.

    What was loaded and fits the guide gets its name.

    Args:
        guide: The guide, set up.
        move_aside: Whether an older guide of the same model gives up its name: where a cell of a notebook ran twice,
            the name is that of the second one.
    """
    kind = type(guide).__name__
    _forget_the_dead(kind)
    entries = _entries()
    loaded = _loaded(kind, entries)
    free = (f"{kind}_{number}" if number else kind for number in count())
    name = next(free)
    while (other := _holder(name, entries)) not in (None, guide):
        if move_aside and name == kind and _same_model(guide, other):
            _move(other, next(n for n in free if _holder(n, entries) is None and n not in loaded))
            break
        name = next(free)
    _rename(guide, name)
    _GUIDES[name] = guide
    _choose(guide, loaded)


def _choose(guide: Any, loaded: dict[str, dict[str, Tensor]]) -> None:
    """Give what was loaded and fits the guide its name."""
    kind, name = type(guide).__name__, guide._pyro_name
    fitting = {}
    for root, values in loaded.items():
        renamed = {name + key[len(root) :]: value for key, value in values.items()}
        own = dict(_parameters(guide))
        if _is_name(kind, root) and not _misfit(own, list(_buffers(guide)), renamed, renamed, f"{name}.{_BUFFERS}"):
            fitting[root] = renamed
    if loaded and not fitting and name not in loaded:
        warnings.warn(
            f"the parameter store holds parameters of {' and '.join(loaded)}, which do not fit this {kind}: it starts "
            "untrained",
            stacklevel=2,
        )
    if not fitting:
        return
    chosen = name if name in fitting else next(iter(fitting))
    if len(fitting) > 1:
        warnings.warn(
            f"the parameter store holds parameters of {' and '.join(fitting)}, all of which fit this {kind}: it takes "
            f"those of {chosen}",
            stacklevel=2,
        )
    if chosen != name:
        _put(fitting[chosen], ours=False)
        _drop(loaded[chosen])


def _holder(name: str, entries: dict[str, Tensor]) -> Any:
    """The guide that is alive and has tensors in the store under this name."""
    guide = _GUIDES.get(name)
    if guide is None or guide._pyro_name != name:
        return None
    return guide if any(entries.get(key) is value for key, value in _parameters(guide)) else None


def _forget_the_dead(kind: str) -> None:
    """Remove what guides of a kind that are no more left in the store."""
    entries = _entries()
    roots = {name: name.partition(".")[0] for name, value in entries.items() if _is_ours(value)}
    held = {root: _holder(root, entries) is not None for root in set(roots.values()) if _is_name(kind, root)}
    _drop(name for name, root in roots.items() if not held.get(root, True))


def _rename(guide: Any, name: str) -> None:
    # Pyro's own way refuses parts that have been called.
    for path, module in guide.named_modules():
        if isinstance(module, PyroModule):
            module._pyro_name = f"{name}.{path}" if path else name


def _move(guide: Any, name: str) -> None:
    """Give a guide another name, and its tensors in the store."""
    before, entries = guide._pyro_name, _entries()
    own = [*dict(_parameters(guide)), f"{before}.{_BUFFERS}"]
    held = {key: entries[key] for key in own if key in entries}
    _drop(held)
    _rename(guide, name)
    _GUIDES[name] = guide
    _put({name + key[len(before) :]: value for key, value in held.items()}, ours=False)


def _same_model(guide: Any, other: Any) -> bool:
    """Whether two guides are of one model, maybe defined twice, as a cell of a notebook does that runs again."""
    one, two = guide.given_model, other.given_model
    if isinstance(one, FunctionType) and isinstance(two, FunctionType) and one.__qualname__.isidentifier():
        return (one.__module__, one.__qualname__) == (two.__module__, two.__qualname__)
    return one is two and one is not None
