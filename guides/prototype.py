"""A guide and its model: what the first call sees of it, when the guide looks again, and how both are saved."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_nf.compiler.functorch import in_torchscript_trace
from pyro_nf.guides.building import check_model
from pyro_nf.guides.latents import (
    Shape,
    argument_kinds,
    argument_sizes,
    explain_lost,
    lost_latents,
    run_quietly,
)
from pyro_nf.guides.parameter_store import keep_entries, withdraw
from pyro_nf.programs._pyro import without_store
from pyro_nf.programs.noise import running
from pyro_nf.programs.sites import is_latent

# Kinds and sizes of arguments at which the model is looked at once more.
_MAX_LOOKS = 40
# The modules that are made when a guide is set up.
_MADE = ("flow", "base", "follow")

_Self = TypeVar("_Self", bound="PrototypeGuide")


class PrototypeGuide(AutoGuide):
    """A guide that the first call sets up, by a run of the model: Pyro calls that run the prototype.

    The first call decides which sites are the guide's. It looks again where the kind of the arguments is another, or
    their sizes are: where a site of its own is observed then, or has another shape, an untrained guide is set up anew.
    """

    prototype_trace: Any
    _prototype_frames: Any
    _pyro_name: str

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        super().__init__(check_model(model), **options)
        self._pending: dict[str, Tensor] = {}
        self._latents: dict[str, Shape] = {}
        self._seen: set[Any] = set()
        self._start: list[tuple[float, float]] = []

    @property
    def given_model(self) -> Any:
        """The model as the user gave it, `None` in a copy from a pickle."""
        return None if self._model is None else self._model[0]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict, as any module does, before the first call or after it."""
        result = super().load_state_dict(*args, **kwargs)
        if self._latents:
            self._keep()
        return result

    def look_again(self, *args: Any, **kwargs: Any) -> None:
        """Compare the model's latents with those that the guide was set up for.

        If one of these is none any more, or has another shape, an untrained guide forgets them, and is set up by its
        next call.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If the guide is trained, and one of its latents is observed now or has another shape.
        """
        if self.prototype_trace is None or self._model is None:
            return
        devices = {param.device for param in self.parameters() if param.is_cuda}
        trace = run_quietly(self.model, args, kwargs, devices)
        if trace is None:
            return
        shapes = {name: self._shape(site) for name, site in trace.nodes.items() if is_latent(site)}
        lost = lost_latents(self._latents, shapes)
        if lost and self._is_untrained():
            self._forget()
            return
        for name in lost:
            if reason := explain_lost(name, trace, self._latents, shapes, type(self).__name__):
                raise ValueError(reason)

    @property
    def _is_part(self) -> bool:
        """Whether this is a part of a guide of ours, which looks at the model and the store for all its parts."""
        return self.master is not None and isinstance(self.master(), PrototypeGuide)

    @property
    def _parts(self) -> "list[PrototypeGuide]":
        return [part for part in self._modules.values() if isinstance(part, PrototypeGuide)]

    def _ensure_prototype(self, *args: Any, **kwargs: Any) -> None:
        is_new = self.prototype_trace is None
        self._prepare(args, kwargs)
        self._keep(is_new)

    def _keep(self, is_new: bool = False) -> None:
        """Bring the guide and its entries in the parameter store into line."""
        if not self._is_part:
            keep_entries(self, is_new)
        elif self.master()._latents and not self._pyro_context.active:  # else the whole guide's call has done it
            self.master()._keep()

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the model where this may tell something new, and set the guide up at the first call."""
        if self.prototype_trace is not None and self._is_unseen(args, kwargs):
            self.look_again(*args, **kwargs)
        if self.prototype_trace is None:
            self._set_up(args, kwargs)

    def _is_unseen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self._is_part or self._model is None or in_torchscript_trace():
            return False
        kind = argument_kinds(args, kwargs)
        key = kind, argument_sizes(args, kwargs)
        # Where so many sizes changed nothing, sizes change nothing.
        unseen = kind not in self._seen or (key not in self._seen and len(self._seen) < _MAX_LOOKS)
        self._seen |= {kind, key}
        return unseen

    def _shape(self, site: dict[str, Any]) -> Shape:
        """Sizes of a site's value, `None` along plates that may have any size."""
        sizes: list[int | None] = list(site["value"].shape)
        for frame in site["cond_indep_stack"]:
            if self._may_change(frame.name):
                sizes[frame.dim - site["fn"].event_dim] = None
        return tuple(sizes)

    def _may_change(self, plate: str) -> bool:
        return False

    def _prototype_hide_fn(self, site: Any) -> bool:
        """Whether a site of the model is none of the guide's: no latent, or one that came later."""
        return not is_latent(site) or bool(self._latents and site["name"] not in self._latents)

    def _set_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._model is None:
            raise RuntimeError(
                f"{type(self).__name__} was pickled before its first call, and pickles go without the model: make "
                "the guide anew"
            )
        try:
            with running():  # the prior's draws may be such that the model has no density there
                self._setup_prototype(*args, **kwargs)
        except BaseException:  # half of a guide would pass for a whole one at the next call
            self._forget()
            raise
        self._pending = {}
        self._latents = {name: self._shape(site) for name, site in self.prototype_trace.iter_stochastic_nodes()}
        kind = argument_kinds(args, kwargs)
        self._seen = {kind, (kind, argument_sizes(args, kwargs))}

    def _forget(self) -> None:
        """Become as before the first call."""
        for part in self._parts:
            part._forget()
        withdraw(self)
        for name in _MADE:
            self._modules.pop(name, None)
        self.prototype_trace = None
        self._latents, self._seen, self._start = {}, set(), []

    def _take(self, **modules: nn.Module) -> None:
        """Take flow, base and the like, and the values that `load_state_dict` held for them."""
        for name, module in modules.items():
            setattr(self, name, module)
        self._start = _fingerprint(self)
        for name, module in modules.items() if self._pending else ():
            start = len(name) + 1
            module.load_state_dict({key[start:]: v for key, v in self._pending.items() if key.startswith(f"{name}.")})

    def _is_untrained(self) -> bool:
        """Whether all that training changes is as it was when the guide was set up."""
        return _alike(self._start, _fingerprint(self)) and all(part._is_untrained() for part in self._parts)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Before the first call there is no flow to load into yet.
        if "flow" not in self._modules:
            names = [name for name in state_dict if name.startswith(tuple(f"{prefix}{made}." for made in _MADE))]
            self._pending = {name[len(prefix) :]: state_dict[name].detach().clone() for name in names}
            state_dict = {name: value for name, value in state_dict.items() if name not in names}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own sets the *original's* model to None. Here only the pickle goes without it, as it must.
        without_store(self)
        return {**self.__dict__, **dict.fromkeys(self._models()), "master": None}

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.__dict__.update(self._models())
        return twin

    def _models(self) -> dict[str, Any]:
        """The attributes that hold the model, which copies share and pickles go without."""
        return {name: self.__dict__[name] for name in ("_model", "_plain_model") if name in self.__dict__}


def _own_tensors(guide: PrototypeGuide) -> Iterator[Tensor]:
    """All that training may change, less what is of parts."""
    for child in guide._modules.values():
        if child is not None and not isinstance(child, PrototypeGuide):
            yield from child.state_dict().values()


def _fingerprint(guide: PrototypeGuide) -> list[tuple[float, float]]:
    """The sum of each tensor's entries, and the root of that of their squares: what training changes."""
    entries = [value.detach().double() for value in _own_tensors(guide)]
    numbers = [torch.stack([value.sum(), torch.linalg.vector_norm(value)]) for value in entries]
    return [(total, norm) for total, norm in torch.stack(numbers).tolist()] if numbers else []


def _alike(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> bool:
    """Whether two fingerprints are of the same values, but for rounding: devices add in other orders."""
    return len(one) == len(other) and all(
        abs(a - b) <= 1e-10 * norm
        for (total, norm), now in zip(one, other, strict=True)
        for a, b in zip((total, norm), now, strict=True)
    )
