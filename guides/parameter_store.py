"""A guide's entries in Pyro's parameter store: what they are called, and whose tensors they are.

All of a flow's state stands there: parameters, as those of any module, and persistent buffers (units, the whitening,
the order of a permutation), whose entries share their memory.

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
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.programs._pyro import SEPARATOR

# The guide that has each name, and the tensors that guides put into a store, by their `id`.
_GUIDES: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_OURS: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
_ROOT = re.compile(r"(?:Auto|Amortized|Structured)Flow(?:_\d+)?")


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
    entries, own = _entries(), dict(_tensors(guide))
    others = {name: entries[name] for name in own if name in entries and not _is_entry(entries[name], own[name])}
    if loaded := {name: value for name, value in others.items() if not _is_ours(value)}:
        _load(guide, own, loaded)
    _drop(others)
    _put({name: own[name] for name in own if name in others or (name not in entries and _is_trained(own[name]))})


def withdraw(guide: Any) -> None:
    """Remove the guide's own tensors from the store."""
    entries = _entries()
    _drop(name for name, _ in _tensors(guide) if name in entries and _is_ours(entries[name]))


def _entries() -> dict[str, Tensor]:
    return dict(pyro.get_param_store().named_parameters())


def _is_ours(tensor: Tensor) -> bool:
    return _OURS.get(id(tensor)) is tensor


def _drop(names: Iterable[str]) -> None:
    store = pyro.get_param_store()
    for name in names:
        if name in store:
            del store[name]


def _put(own: dict[str, Tensor]) -> None:
    """Put a guide's tensors into the store."""
    entries = {name: _entry(value) for name, value in own.items()}
    _OURS.update({id(value): value for value in entries.values()})
    _set(entries)


def _set(entries: dict[str, Tensor]) -> None:
    pyro.get_param_store().set_state({"params": entries, "constraints": dict.fromkeys(entries, constraints.real)})


def _entry(tensor: Tensor) -> Tensor:
    """What stands in the store for a tensor: itself, or, for a buffer, a parameter that shares its memory.

    A user's loop over the store expects tensors that have gradients, and these are floats: so whole numbers stand there
    as the floats of the same bits.
    """
    if isinstance(tensor, nn.Parameter):
        return tensor
    flat = tensor.detach()  # not by requires_grad_(), which vmap refuses
    if tensor.dtype in (torch.int32, torch.int64) and tensor.is_contiguous():
        flat = flat.view(-1).view(torch.float32)
    return nn.Parameter(flat) if flat.is_floating_point() else flat


def _is_entry(entry: Tensor, tensor: Tensor) -> bool:
    if isinstance(tensor, nn.Parameter):
        return entry is tensor
    return entry.data_ptr() == tensor.data_ptr() and _is_ours(entry)


def _is_trained(tensor: Tensor) -> bool:
    """Whether training may change a tensor: a buffer, or a parameter that is not frozen."""
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)


def _tensors(guide: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a guide's parameters and persistent buffers by their names in the store.

    Those of Pyro's own modules, which Pyro keeps in line, are left out, and so are plain tensors in a parameter's
    place, which `torch.func.functional_call` lends.
    """
    for name, child in guide._modules.items():
        if isinstance(child, PyroModule):
            for key, value in child._parameters.items():
                if isinstance(value, nn.Parameter) and not key.endswith("_unconstrained"):
                    yield f"{child._pyro_name}.{key}", value
            yield from _tensors(child)
        elif child is not None:
            prefix = f"{guide._pyro_name}.{name}{SEPARATOR}"
            for key, value in child.named_parameters():
                if isinstance(value, nn.Parameter):
                    yield prefix + key, value
            for path, module in child.named_modules():
                for key, buffer in module._buffers.items():
                    if buffer is not None and key not in module._non_persistent_buffers_set:
                        yield f"{prefix}{path}.{key}" if path else prefix + key, buffer


# What was loaded


def _load(guide: Any, own: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    if reason := _misfit(own, loaded, _entries()):
        raise ValueError(
            f"the parameter store holds parameters of {guide._pyro_name!r} that do not fit this "
            f"{type(guide).__name__}: {reason}. Make the guide as the one whose parameters were saved, or call "
            "pyro.clear_param_store() to begin anew"
        )
    with torch.no_grad():
        for name, value in loaded.items():
            _entry(own[name]).copy_(value)  # which shares the memory
    nn.Module.load_state_dict(guide, guide.state_dict())  # modules note what is in their buffers


def _misfit(own: dict[str, Tensor], loaded: dict[str, Tensor], there: Iterable[str]) -> str:
    """Say why what was loaded is not this guide's; "" if it is.

    Args:
        own: The guide's tensors, by their names in the store.
        loaded: What was loaded under these names.
        there: Names of all that is in the store.
    """
    for name, value in own.items():
        shape = tuple(_entry(value).shape)
        if name in loaded and tuple(loaded[name].shape) != shape:
            return f"{name!r} has shape {tuple(loaded[name].shape)} there, and {shape} in the guide"
        if value.requires_grad and name not in there:
            return f"{name!r} is missing"
    return next((f"{name!r} is none of its own" for name in loaded if name not in own), "")


def _loaded(kind: str, entries: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What was loaded of guides like ours: of each, its tensors by their names in the store."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in entries.items():
        root, _, key = name.partition(".")
        is_guide = _ROOT.fullmatch(root) or _is_name(kind, root)
        if is_guide and SEPARATOR in key and not _is_ours(value):
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
    kind, name, own = type(guide).__name__, guide._pyro_name, dict(_tensors(guide))
    renamed = {
        root: {name + key[len(root) :]: value for key, value in values.items()}
        for root, values in loaded.items()
        if _is_name(kind, root)
    }
    fitting = [root for root, values in renamed.items() if not _misfit(own, values, values)]
    if not fitting:
        if loaded and name not in loaded:
            warnings.warn(
                f"the parameter store holds parameters of {' and '.join(loaded)}, which do not fit this {kind}: it "
                "starts untrained",
                stacklevel=2,
            )
        return
    chosen = name if name in fitting else fitting[0]
    if len(fitting) > 1:
        warnings.warn(
            f"the parameter store holds parameters of {' and '.join(fitting)}, all of which fit this {kind}: it takes "
            f"those of {chosen}",
            stacklevel=2,
        )
    if chosen != name:
        _set(renamed[chosen])
        _drop(loaded[chosen])


def _holder(name: str, entries: dict[str, Tensor]) -> Any:
    """The guide that is alive and has tensors in the store under this name."""
    guide = _GUIDES.get(name)
    if guide is None or guide._pyro_name != name:
        return None
    return guide if any(entries.get(key) is value for key, value in _tensors(guide)) else None


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
    held = {key: entries[key] for key, _ in _tensors(guide) if key in entries}
    _drop(held)
    _rename(guide, name)
    _GUIDES[name] = guide
    _set({name + key[len(before) :]: value for key, value in held.items()})


def _same_model(guide: Any, other: Any) -> bool:
    """Whether two guides are of one model, maybe defined twice, as a cell of a notebook does that runs again."""
    one, two = guide.given_model, other.given_model
    if isinstance(one, FunctionType) and isinstance(two, FunctionType) and one.__qualname__.isidentifier():
        return (one.__module__, one.__qualname__) == (two.__module__, two.__qualname__)
    return one is two and one is not None
