"""What our guides share: draws, densities and quantiles in the model's own space."""

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import register_kl

from pyro_nf.arguments import Arguments, check_whole_number, unpacked
from pyro_nf.calls import takes_model_arguments
from pyro_nf.distributions import FlowDistribution
from pyro_nf.flows import Flow, stacks
from pyro_nf.noise import running
from pyro_nf.supports import bijection
from pyro_nf.tracing import is_latent

# Draws behind medians and quantiles: a median's error is 1.25 / sqrt(10,000) = 1.25% of a standard deviation.
_QUANTILE_DRAWS = 10_000

_COUNTERS: dict[str, Iterator[int]] = defaultdict(itertools.count)

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
        built = flow(dim, **options)
    if tuple(built.event_shape) != (dim,):
        raise ValueError(
            f"flow must be over the model's {dim} unconstrained latent coordinates; "
            f"got one of event shape {tuple(built.event_shape)}"
        )
    return built


def trace_latents(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], guide: str
) -> tuple[poutine.Trace, dict[str, Any]]:
    """Run the model once and return its trace and its latent sites, which must be of a kind that a guide takes.

    Raises:
        ValueError: If there is no latent, a discrete one, or one in a sequential plate, or if the model fails on data
            that fit none of its subsampled plates.
    """
    tracer = poutine.trace(model)
    try:
        with poutine.block(), torch.no_grad(), running():
            trace = tracer.get_trace(*args, **kwargs)
    except (IndexError, RuntimeError, ValueError) as error:
        _explain_sizes(tracer.trace, (*args, *kwargs.values()), error)
        raise
    sites = {name: site for name, site in trace.nodes.items() if is_latent(site)}
    if not sites:
        raise ValueError(f"{guide} found no latent variables in the model: there is no posterior to fit")
    for name, site in sites.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"{guide} takes continuous latents; site {name!r} is discrete. Sum it out: enumerate it with "
                f"TraceEnum_ELBO and build the guide on pyro.poutine.block(model, hide=[{name!r}])"
            )
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise ValueError(
                    f"site {name!r} stands in a sequential plate, a loop over pyro.plate({frame.name!r}, ...); "
                    f"{guide} takes vectorized ones: with pyro.plate({frame.name!r}, ...)"
                )
    return trace, sites


def check_latents(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], guide: str, local: bool = False
) -> poutine.Trace:
    """Run the model once and check that its latents are of the kind that a guide takes.

    Args:
        model: The Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        guide: Name of the guide, for the message.
        local: Whether the guide is for the local latents of one plate, or for latents that are always all there.

    Returns:
        The model's trace.

    Raises:
        ValueError: If a latent stands inside (`local`: outside) a subsampled plate; else as `trace_latents`.
    """
    trace, sites = trace_latents(model, args, kwargs, guide)
    for name, site in sites.items():
        subsampled = [f.name for f in site["cond_indep_stack"] if f.full_size is not None and f.size < f.full_size]
        if subsampled and not local:
            raise ValueError(
                f"site {name!r} is local to the subsampled plate {subsampled[0]!r}, so that each step sees other "
                f"latents: {guide} needs them all. Give the plate an encoder: AmortizedFlow(model, encoder), or, with "
                f"global latents too, StructuredFlow(model, {{{subsampled[0]!r}: encoder}})"
            )
    if local:
        plates = {tuple(frame.name for frame in site["cond_indep_stack"]) for site in sites.values()}
        if len(plates) > 1 or any(len(names) != 1 for names in plates):
            places = ", ".join(
                f"{name!r} in {' and '.join(f.name for f in site['cond_indep_stack']) or 'no plate'}"
                for name, site in sites.items()
            )
            raise ValueError(
                f"{guide} takes latents that all stand in one plate, and in no other; got {places}. Latents outside "
                "the plate: StructuredFlow(model, {plate: encoder}). Nested plates: make the inner one an event "
                "dimension, by .to_event(1)"
            )
    return trace


def has_rows(value: Any, size: int | None) -> bool:
    """Whether this is a tensor with a row for each of the `size` elements of a plate."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _explain_sizes(trace: poutine.Trace, values: tuple[Any, ...], error: Exception) -> None:
    """Raise a `ValueError` if a model that failed has a subsampled plate, and no data of that plate's size."""
    rows = [len(value) for value in values if isinstance(value, Tensor) and value.dim() > 0]
    for name, site in trace.nodes.items():
        fn = site.get("fn")
        subsampled = isinstance(fn, _Subsample) and fn.subsample_size not in (None, fn.size)
        if subsampled and rows and fn.size not in rows:
            raise ValueError(
                f"args hold data of {' and '.join(map(str, rows))} rows, on which the model fails: its plate {name!r} "
                f"has size {fn.size} and subsample_size {fn.subsample_size}. Pass all {fn.size} rows, for the model to "
                "take those with the plate's indices; or minibatches x, without indexing them, in "
                f"pyro.plate({name!r}, {fn.size}, subsample_size=len(x))"
            ) from error


class FlowGuide(AutoGuide):
    """A guide whose latents are a flow's coordinates, cut into sites and mapped to their supports.

    A subclass says what the posterior over the coordinates is and how they are cut (`get_posterior` and
    `_unpack_latent`); everything in the model's own space follows.
    """

    prototype_trace: Any
    _prototype_frames: Any
    _pyro_name: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending: dict[str, Tensor] = {}
        self._take_name()

    def _take_name(self) -> None:
        # Pyro keeps parameters by name, and gives every guide of a class the same: a second one would take over the
        # first one's parameters without a word. Here the first is AutoFlow, the next AutoFlow_1, ...
        kind = type(self).__name__
        number = next(_COUNTERS[kind])
        self._pyro_set_supermodule(f"{kind}_{number}" if number else kind, self._pyro_context)

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the posterior over the unconstrained coordinates."""
        raise NotImplementedError

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        raise NotImplementedError

    @takes_model_arguments
    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the guide's own draws of every latent site, `{site: (num_samples, *shape)}`, in one batch.

        No weights correct them, as those of `corrected_posterior`: they are the posterior's where the verdict of
        `diagnose` is "right". `Predictive(model, draws)` takes them.

        Args:
            num_samples: Draws.
            *args: The model's arguments, or all in one `Arguments`.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If `num_samples` is not positive, or may be meant for the model.
        """
        num_samples = check_whole_number("num_samples", num_samples)
        args, kwargs = unpacked(args, kwargs)
        self._ensure_prototype(*args, **kwargs)
        latents = self.get_posterior(*args, **kwargs).sample((num_samples,))
        draws: dict[str, Tensor] = _map_draws(self._constrain, latents)
        return draws

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
            ValueError: If a site is missing.
        """
        args, kwargs = unpacked(args, kwargs)
        self._ensure_prototype(*args, **kwargs)
        sites = list(self.prototype_trace.iter_stochastic_nodes())
        missing = [name for name, _ in sites if name not in latents]
        if missing:
            raise ValueError(f"latents must hold every latent site; {', '.join(missing)} missing")

        def one(values: dict[str, Tensor]) -> Tensor:
            posterior = self.get_posterior(*args, **kwargs)
            flat = [bijection(site).inv(values[name]) for name, site in sites]
            latent = self._pack_latent(flat)
            log_det = sum(d.sum() for _, _, d in self._constrained(latent))
            return posterior.log_prob(latent).sum() - log_det

        name, site = sites[0]
        batch = latents[name].shape[: latents[name].dim() - site["value"].dim()]
        flat = {name: latents[name].reshape(-1, *latents[name].shape[len(batch) :]) for name, _ in sites}
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
        asked = torch.as_tensor(quantiles, dtype=torch.get_default_dtype())
        if asked.dim() > 1 or not bool(((asked >= 0) & (asked <= 1)).all()):
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

    def _ensure_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self.prototype_trace is None:
            if self._model is None:
                raise RuntimeError(
                    f"{type(self).__name__} was pickled before its first call, and pickles go without the model: make "
                    "the guide anew"
                )
            with running():  # the prior's draws may be such that the model has no density there
                self._setup_prototype(*args, **kwargs)

    def _set_flow(self, flow: Flow, base: nn.Module) -> None:
        """Take flow and base, and the parameters that `load_state_dict` or the parameter store hold for them."""
        self.flow, self.base = flow, base
        pending, self._pending = self._pending, {}
        store = pyro.get_param_store()
        for part in ("flow", "base"):
            module = getattr(self, part)
            if pending:
                start = len(part) + 1
                module.load_state_dict({name[start:]: v for name, v in pending.items() if name.startswith(f"{part}.")})
            prefix = f"{self._pyro_name}.{part}$$$"
            for name, param in module.named_parameters():
                if prefix + name in store:
                    # Pyro would go on with the store's tensor, and the flow with its own: one must go.
                    with torch.no_grad():
                        param.copy_(store[prefix + name])
                    del store[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Before the first call there is no flow to load into yet.
        if not hasattr(self, "flow"):
            names = [name for name in state_dict if name.startswith((f"{prefix}flow.", f"{prefix}base."))]
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
        return {**self.__dict__, **dict.fromkeys(self._models()), "master": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "." not in self._pyro_name:  # not a part of another guide
            self._take_name()

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.__dict__.update(self._models())
        return twin

    def _models(self) -> dict[str, Any]:
        """The attributes that hold the model, which copies share and pickles go without."""
        return {name: self.__dict__[name] for name in ("_model", "_plain_model") if name in self.__dict__}


def _map_draws(function: Callable[..., Any], draws: Any) -> Any:
    """Apply a function of one draw to all; without validation, whose checks of values `vmap` cannot batch."""
    with pyro.validation_enabled(False):
        return torch.func.vmap(function)(draws)
