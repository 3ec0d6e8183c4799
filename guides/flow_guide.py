"""What our guides share: draws, densities and quantiles in the model's own space."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import Distribution
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor, nn
from torch.distributions import register_kl

from pyro_nf.distributions import FlowDistribution
from pyro_nf.flows import Flow, stacks
from pyro_nf.guides.latents import (
    Shape,
    argument_kinds,
    argument_sizes,
    explain_lost,
    lost_latents,
    run_quietly,
)
from pyro_nf.guides.parameter_store import has_name, keep_entries, take_name, tensors, withdraw
from pyro_nf.interface.arguments import Arguments, check_flag, check_whole_number, unpacked
from pyro_nf.programs.calls import takes_model_arguments
from pyro_nf.programs.discrete import mean_probabilities, sample_all
from pyro_nf.programs.enumeration import is_discrete
from pyro_nf.programs.noise import running
from pyro_nf.programs.program import BoundProgram, Program
from pyro_nf.programs.sites import is_latent
from pyro_nf.programs.supports import bijection

# Draws behind medians and quantiles: a median's error is 1.25 / sqrt(10,000) = 1.25% of a standard deviation.
_QUANTILE_DRAWS = 10_000
# Kinds and sizes of arguments at which the model is looked at once more.
_MAX_LOOKS = 40
# The modules that are made when a guide is set up.
_MADE = ("flow", "base", "follow")

FlowLike = str | Flow | Callable[..., Flow]
_Self = TypeVar("_Self", bound="FlowGuide")


class MappedDraw(dist.Delta):
    """A site's value, computed from the guide's one draw; its log density is minus the log-determinant of the map.

    `TraceMeanField_ELBO` asks for a divergence from the model's distribution, and Pyro's from a `Delta` leaves the
    log density out. From this one it is in, and that ELBO is right.
    """


@register_kl(MappedDraw, Distribution)  # type: ignore[untyped-decorator]
def _kl_mapped_draw(p: MappedDraw, q: Any) -> Tensor:
    kl: Tensor = p.log_density - q.log_prob(p.v)
    return kl


def check_flow_like(flow: FlowLike) -> None:
    """Report a `flow` argument that can never become a flow when the guide is made, not at its first step."""
    if isinstance(flow, str):
        stacks.make(flow, 1)
    elif not callable(flow):  # a Flow is callable too
        raise ValueError(f"flow must be a name, a Flow or a factory dim -> Flow; got {type(flow).__name__}")


def build_flow(flow: FlowLike, dim: int, **options: Any) -> Flow:
    """Turn the `flow` argument of a guide (a name, a flow, a factory) into a flow over `dim` coordinates.

    Raises:
        ValueError: If the name is unknown, or the flow has another dimension.
    """
    if isinstance(flow, str):
        built = stacks.make(flow, dim, **options)
    elif isinstance(flow, Flow):
        built = flow
    else:
        try:
            built = flow(dim, **options)
        except TypeError as error:
            raise ValueError(
                f"flow must be a factory of a Flow from a number of coordinates; it fails: {error}"
            ) from error
    if not isinstance(built, Flow):
        raise ValueError(f"flow must be a factory that returns a Flow; it returned {built!r} for dim={dim}")
    if tuple(built.event_shape) != (dim,):
        raise ValueError(
            f"flow must be over the model's {dim} unconstrained latent coordinates; "
            f"got one of event shape {tuple(built.event_shape)}"
        )
    return built


def check_model(model: Any) -> Any:
    """Return a model, or raise a `ValueError`: it must be callable."""
    if not callable(model):
        raise ValueError(f"model must be a Pyro model, a function or a module; got {model!r}")
    return model


class FlowGuide(AutoGuide):
    """A guide whose latents are a flow's coordinates, cut into sites and mapped to their supports.

    A subclass says what the posterior over the coordinates is and how they are cut (`get_posterior` and
    `_unpack_latent`); everything in the model's own space follows.

    The first call decides which sites are the guide's. It looks again where the kind of the arguments is another, or
    their sizes are: where a site of its own is observed then, or has another shape, an untrained guide is set up anew.
    """

    prototype_trace: Any
    _prototype_frames: Any
    _pyro_name: str

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        super().__init__(check_model(model), **options)
        self._name = self._pyro_name
        self._pending: dict[str, Tensor] = {}
        self._latents: dict[str, Shape] = {}
        self._seen: set[Any] = set()
        self._start: dict[str, tuple[float, float]] = {}
        self._versions: dict[str, int] = {}
        self._changed: set[str] = set()

    @property
    def given_model(self) -> Any:
        """The model as the user gave it, `None` in a copy from a pickle."""
        return None if self._model is None else self._model[0]

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the posterior over the unconstrained coordinates."""
        raise NotImplementedError

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        raise NotImplementedError

    @takes_model_arguments
    @torch.no_grad()
    def sample_posterior(
        self, num_samples: int, *args: Any, discrete: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the guide's own draws of every latent site, `{site: (num_samples, *shape)}`, in one batch.

        No weights correct them, as those of `corrected_posterior`: they are the posterior's where the verdict of
        `diagnose` is "right". `Predictive(model, draws)` takes them.

        Args:
            num_samples: Draws.
            *args: The model's arguments, or all in one `Arguments`.
            discrete: Whether to draw the discrete latents too, which the model's density sums out: each from its exact
                joint posterior given the draw of the others and the data. Without the guide's model, as in a copy from
                a pickle, they cannot be had.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If `num_samples` is not positive, or may be meant for the model.
        """
        num_samples = check_whole_number("num_samples", num_samples)
        discrete = check_flag("discrete", discrete)
        args, kwargs = unpacked(args, kwargs)
        self._ensure_prototype(*args, **kwargs)
        if discrete:
            return sample_all(self._bound(args, kwargs), num_samples)
        latents = self.get_posterior(*args, **kwargs).sample((num_samples,))
        draws: dict[str, Tensor] = _map_draws(self._constrain, latents)
        return draws

    @takes_model_arguments
    @torch.no_grad()
    def discrete_probabilities(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior probabilities of the values of every discrete latent, `{site: (*plates, K)}`.

        They are exact given the other latents (the derivatives of the log density by each value's own), and averaged
        over draws of these. The values come in the order of the distribution's `enumerate_support`.

        Args:
            num_samples: Draws of the other latents.
            *args: The model's arguments, or all in one `Arguments`.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If `num_samples` is not positive, or may be meant for the model.
        """
        num_samples = check_whole_number("num_samples", num_samples)
        args, kwargs = unpacked(args, kwargs)
        return mean_probabilities(self._bound(args, kwargs), num_samples)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundProgram:
        model = self.given_model
        if model is None:
            raise ValueError(
                f"this {type(self).__name__} has no model, as a copy from a pickle has none, and discrete latents are "
                "drawn from the model: make the guide anew, and load this one's state_dict"
            )
        return Program(model, self).bind(*args, **kwargs)

    @takes_model_arguments
    def log_prob(self, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the guide's log density at values of every latent site, in the model's own space.

        Args:
            latents: `{site: (*batch, *shape)}`, one batch shape for all, inside the supports.
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            `(*batch,)`.

        Raises:
            ValueError: If a site is missing, has another shape, or values outside its support.
        """
        args, kwargs = unpacked(args, kwargs)
        self._ensure_prototype(*args, **kwargs)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        batch = _check_values(latents, sites)

        def one(values: dict[str, Tensor]) -> Tensor:
            posterior = self.get_posterior(*args, **kwargs)
            flat = [bijection(site).inv(values[name]) for name, site in sites.items()]
            latent = self._pack_latent(flat)
            log_det = sum(d.sum() for _, _, d in self._constrained(latent))
            return posterior.log_prob(latent).sum() - log_det

        flat = {name: latents[name].reshape(-1, *latents[name].shape[len(batch) :]) for name in sites}
        result: Tensor = _map_draws(one, flat)
        return result.reshape(batch)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of every latent site's entries, `{site: shape}`: `quantiles` at 0.5."""
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @takes_model_arguments
    def quantiles(self, quantiles: float | Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return posterior quantiles of every latent site's entries, from 10,000 draws that are always the same.

        Args:
            quantiles: Levels between 0 and 1: a sequence, a vector or one number.
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            Quantiles of each site, `(*levels, *shape)`, in the order of the levels.

        Raises:
            ValueError: If a level is not between 0 and 1.
        """
        try:
            asked = torch.as_tensor(quantiles, dtype=torch.get_default_dtype())
        except (TypeError, ValueError, RuntimeError):
            asked = torch.tensor(math.nan)
        if asked.dim() > 1 or not asked.numel() or not bool(((asked >= 0) & (asked <= 1)).all()):
            raise ValueError(f"quantiles must be levels between 0 and 1, in one dimension; got {quantiles!r}")
        args, kwargs = unpacked(args, kwargs)
        self._ensure_prototype(*args, **kwargs)
        devices = [param.device for param in self.parameters() if param.is_cuda][:1]
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            draws = self.sample_posterior(_QUANTILE_DRAWS, Arguments(*args, **kwargs))
        result = {}
        for name, value in draws.items():
            levels = asked.to(value)
            # In parts, because torch.quantile refuses more than 2^24 numbers.
            parts = [part.quantile(levels.reshape(-1), 0) for part in value.reshape(len(value), -1).split(1000, 1)]
            result[name] = torch.cat(parts, 1).reshape((*levels.shape, *value.shape[1:]))
        return result

    def _pack_latent(self, parts: list[Tensor]) -> Tensor:
        raise NotImplementedError

    @property
    def _is_part(self) -> bool:
        """Whether this is a part of a guide of ours, which looks at the model and the store for all its parts."""
        return self.master is not None and isinstance(self.master(), FlowGuide)

    @property
    def _parts(self) -> "list[FlowGuide]":
        return [part for part in self._modules.values() if isinstance(part, FlowGuide)]

    def _ensure_prototype(self, *args: Any, **kwargs: Any) -> None:
        is_new = self.prototype_trace is None
        self._prepare(args, kwargs)
        self._keep(is_new)

    def _keep(self, is_new: bool = False) -> None:
        """Have a name in the parameter store, and bring the guide and what is there into line."""
        if self._is_part:
            # In a call of the whole guide, that has done it already.
            if self.master()._latents and not self._pyro_context.active:
                self.master()._keep()
            return
        if pyro.settings.get("module_local_params"):
            return
        if self.master is None and self._name == self._pyro_name and not has_name(self):
            if not is_new and not self._pyro_context.active:
                return  # a copy, or a guide whose name went to another one, that draws without Pyro
            take_name(self, type(self).__name__, move_aside=is_new)
            self._name = self._pyro_name
        keep_entries(self, self._changed_buffers())

    def _changed_buffers(self) -> set[str]:
        """Names in the parameter store of the buffers that have other values than when the guide was set up."""
        written = []
        for name, tensor in self._own_tensors():
            if not isinstance(tensor, nn.Parameter) and name not in self._changed:
                version = _version(tensor)
                if version != self._versions.get(name, 0):
                    written.append((name, tensor))
                self._versions[name] = version
        self._changed |= {
            name for name, found in _fingerprints(written).items() if not _alike(found, self._start[name])
        }
        names = {f"{self._pyro_name}.{name}" for name in self._changed}
        return names.union(*(part._changed_buffers() for part in self._parts))

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What training may change, less what is of parts, by names within this guide."""
        start = len(self._pyro_name) + 1
        parts = tuple(f"{part._pyro_name}." for part in self._parts)
        return ((name[start:], value) for name, value in tensors(self) if not name.startswith(parts))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict, as any module does, before the first call or after it."""
        result = super().load_state_dict(*args, **kwargs)
        if self._latents:
            self._keep()
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._changed_buffers()
        result = super()._apply(*args, **kwargs)
        self._versions = {name: _version(value) for name, value in self._own_tensors()}
        return result

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the model where this may tell something new, and set the guide up at the first call."""
        if self.prototype_trace is not None and self._is_unseen(args, kwargs):
            self.look_again(*args, **kwargs)
        if self.prototype_trace is None:
            self._set_up(args, kwargs)

    def _is_unseen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self._is_part or self._model is None or torch._C._get_tracing_state() is not None:
            return False
        kind = argument_kinds(args, kwargs)
        key = kind, argument_sizes(args, kwargs)
        # Where so many sizes changed nothing, sizes change nothing.
        unseen = kind not in self._seen or (key not in self._seen and len(self._seen) < _MAX_LOOKS)
        self._seen |= {kind, key}
        return unseen

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
        """Whether a site of the model is none of the guide's: no latent, a discrete one, or one that came later."""
        if prototype_hide_fn(site) or is_discrete(site):
            return True
        return bool(self._latents and site["name"] not in self._latents)

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
        self._latents, self._start, self._versions = {}, {}, {}
        self._seen, self._changed = set(), set()

    def _take(self, **modules: nn.Module) -> None:
        """Take flow, base and the like, and the values that `load_state_dict` held for them."""
        for name, module in modules.items():
            setattr(self, name, module)
        self._start = _fingerprints(self._own_tensors())
        self._versions = {name: _version(value) for name, value in self._own_tensors()}
        self._changed = set()
        for name, module in modules.items() if self._pending else ():
            start = len(name) + 1
            module.load_state_dict({key[start:]: v for key, v in self._pending.items() if key.startswith(f"{name}.")})

    def _is_untrained(self) -> bool:
        """Whether all that training changes is as it was when the guide was set up."""
        now = _fingerprints(self._own_tensors())
        own = all(_alike(now[name], start) for name, start in self._start.items())
        return own and all(part._is_untrained() for part in self._parts)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Before the first call there is no flow to load into yet.
        if "flow" not in self._modules:
            names = [name for name in state_dict if name.startswith(tuple(f"{prefix}{made}." for made in _MADE))]
            self._pending = {name[len(prefix) :]: state_dict[name].detach().clone() for name in names}
            state_dict = {name: value for name, value in state_dict.items() if name not in names}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _sample_site(self, site: dict[str, Any], value: Tensor, log_det: Tensor) -> Tensor:
        """Sample one latent site, at the value that the guide's draw has there."""
        drawn: Tensor = pyro.sample(
            site["name"], MappedDraw(value, log_density=-log_det, event_dim=site["fn"].event_dim)
        )
        return drawn

    def _constrain(self, latent: Tensor) -> dict[str, Tensor]:
        return {site["name"]: value for site, value, _ in self._constrained(latent)}

    def _constrained(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Yield each site, its value, and the log-determinant of its map to the support, `(*batch of the site,)`."""
        for site, unconstrained in self._unpack_latent(latent):
            transform = bijection(site)
            value = transform(unconstrained)
            log_det = transform.log_abs_det_jacobian(unconstrained, value)
            extra = log_det.dim() - (value.dim() - site["fn"].event_dim)
            yield site, value, log_det.sum(tuple(range(-extra, 0))) if extra else log_det

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own sets the *original's* model to None. Here only the pickle goes without it, as it must.
        for param in self.parameters():
            param.__dict__.pop("unconstrained", None)  # the parameter store's weak reference
        self._changed_buffers()
        return {**self.__dict__, **dict.fromkeys(self._models()), "master": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._versions = {name: _version(value) for name, value in self._own_tensors()}

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.__dict__.update(self._models())
        return twin

    def _models(self) -> dict[str, Any]:
        """The attributes that hold the model, which copies share and pickles go without."""
        return {name: self.__dict__[name] for name in ("_model", "_plain_model") if name in self.__dict__}


def _check_values(latents: Any, sites: dict[str, Any]) -> torch.Size:
    """Raise a `ValueError` unless these are values of all sites, inside their supports; return their batch shape."""
    if not isinstance(latents, Mapping):
        raise ValueError(f"latents must be a dictionary of sites' names and values; got {type(latents).__name__}")
    if missing := [name for name in sites if name not in latents]:
        raise ValueError(f"latents must hold every latent site; {', '.join(missing)} missing")
    batch: torch.Size | None = None
    for name, site in sites.items():
        value, shape = latents[name], site["value"].shape
        if not isinstance(value, Tensor):
            raise ValueError(f"latents must hold tensors; got {type(value).__name__} for site {name!r}")
        lead = value.shape[: max(value.dim() - len(shape), 0)]
        if value.shape != lead + shape or (batch is not None and lead != batch):
            wanted = f"(*batch, {', '.join(map(str, shape))})" if shape else "(*batch,)"
            raise ValueError(
                f"latents must have values of shape {wanted} for site {name!r}, with one batch shape for all sites; "
                f"got {tuple(value.shape)}"
            )
        batch = lead
        if not is_inside(site, value):
            raise ValueError(
                f"latents must be inside the supports; site {name!r}, on {site['fn'].support}, has other values"
            )
    return torch.Size() if batch is None else batch


def is_inside(site: dict[str, Any], value: Tensor) -> bool:
    """Whether values are inside a site's support, and finite, up to rounding."""
    to_support = bijection(site)
    with pyro.validation_enabled(False):
        start = to_support.inv(value)
        # torch's inverses clamp what lies outside, where they do not return NaN.
        back = torch.allclose(to_support(start), value, rtol=1e-3, atol=1e-4)
    return back and bool(start.isfinite().all())


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


def _fingerprints(values: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[float, float]]:
    """The sum of each tensor's entries, and the root of that of their squares: what training changes."""
    found = {}
    for name, tensor in values:
        entries = tensor.detach().double()
        found[name] = torch.stack([entries.sum(), torch.linalg.vector_norm(entries)])
    numbers = torch.stack(list(found.values())).tolist() if found else []
    return {name: (total, norm) for name, (total, norm) in zip(found, numbers, strict=True)}


def _alike(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two fingerprints are of the same values, but for rounding: devices add in other orders."""
    return all(abs(a - b) <= 1e-10 * one[1] for a, b in zip(one, other, strict=True))


def _map_draws(function: Callable[..., Any], draws: Any) -> Any:
    """Apply a function of one draw to all; without validation, whose checks of values `vmap` cannot batch."""
    with pyro.validation_enabled(False):
        return torch.func.vmap(function)(draws)
