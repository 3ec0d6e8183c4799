"""What our guides share: draws, densities and quantiles in the model's own space."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import biject_to

from pyro_nf.distributions import FlowDistribution
from pyro_nf.flows import Flow, stacks
from pyro_nf.tracing import Program, SharedSubsamples, is_latent, log_prob_sum, run_model

# Draws behind medians and quantiles: a median's error is 1.25 / sqrt(10,000) = 1.25% of a standard deviation.
_QUANTILE_DRAWS = 10_000

_COUNTERS: dict[str, Iterator[int]] = defaultdict(itertools.count)

FlowLike = str | Flow | Callable[..., Flow]


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


def check_latents(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], guide: str, local: bool = False
) -> None:
    """Run the model once and check that its latents are of the kind that a guide takes.

    Args:
        model: The Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        guide: Name of the guide, for the message.
        local: Whether the guide is for the local latents of one plate, or for latents that are always all there.

    Raises:
        ValueError: If there is no latent, a discrete one, or one inside (`local`: outside) a subsampled plate.
    """
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    sites = {name: site for name, site in trace.nodes.items() if is_latent(site)}
    if not sites:
        raise ValueError(f"{guide} found no latent variables in the model: there is no posterior to fit")
    for name, site in sites.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"{guide} takes continuous latents; site {name!r} is discrete. Sum it out: enumerate it with "
                f"TraceEnum_ELBO and build the guide on pyro.poutine.block(model, hide=[{name!r}])"
            )
        subsampled = [f.name for f in site["cond_indep_stack"] if f.full_size is not None and f.size < f.full_size]
        if subsampled and not local:
            raise ValueError(
                f"site {name!r} is local to the subsampled plate {subsampled[0]!r}, so that each step sees other "
                f"latents: {guide} needs them all. Use AmortizedFlow(model, encoder)"
            )
    if local:
        plates = {tuple(frame.name for frame in site["cond_indep_stack"]) for site in sites.values()}
        if len(plates) > 1 or any(len(names) != 1 for names in plates):
            places = ", ".join(
                f"{name!r} in {' and '.join(f.name for f in site['cond_indep_stack']) or 'no plate'}"
                for name, site in sites.items()
            )
            raise ValueError(
                f"{guide} takes latents that all stand in one plate; got {places}. Give the others a guide of their "
                "own: AutoGuideList of AutoFlow(poutine.block(model, expose=[...])) and this one, likewise blocked"
            )


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
        # Pyro keeps parameters by name, and gives every guide of a class the same: a second one would take over the
        # first one's parameters without a word. Here the first is AutoFlow, the next AutoFlow_1, ...
        number = next(_COUNTERS[type(self).__name__])
        if number > 0:
            self._pyro_name = f"{self._pyro_name}_{number}"

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the posterior over the unconstrained coordinates."""
        raise NotImplementedError

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        raise NotImplementedError

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return draws of every latent site, `{site: (num_samples, *shape)}`, in one batch."""
        self._ensure_prototype(*args, **kwargs)
        latents = self.get_posterior(*args, **kwargs).sample((num_samples,))
        draws: dict[str, Tensor] = _map_draws(self._constrain, latents)
        return draws

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
        self._ensure_prototype(*args, **kwargs)
        sites = list(self.prototype_trace.iter_stochastic_nodes())
        missing = [name for name, _ in sites if name not in latents]
        if missing:
            raise ValueError(f"latents must hold every latent site; {', '.join(missing)} missing")

        def one(values: dict[str, Tensor]) -> Tensor:
            posterior = self.get_posterior(*args, **kwargs)
            flat = [biject_to(site["fn"].support).inv(values[name]) for name, site in sites]
            latent = self._pack_latent(flat)
            log_det = sum(d.sum() for _, _, d in self._constrained(latent))
            return posterior.log_prob(latent).sum() - log_det

        name, site = sites[0]
        batch = latents[name].shape[: latents[name].dim() - site["value"].dim()]
        flat = {name: latents[name].reshape(-1, *latents[name].shape[len(batch) :]) for name, _ in sites}
        result: Tensor = _map_draws(one, flat)
        return result.reshape(batch)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of every latent site's entries, `{site: shape}`, from 10,000 draws."""
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return posterior quantiles of every latent site's entries, `{site: (len(quantiles), *shape)}`."""
        result = {}
        for name, value in self.sample_posterior(_QUANTILE_DRAWS, *args, **kwargs).items():
            levels = torch.as_tensor(quantiles, dtype=value.dtype, device=value.device)
            # In parts, because torch.quantile refuses more than 2^24 numbers.
            parts = [part.quantile(levels, 0) for part in value.reshape(len(value), -1).split(1000, 1)]
            result[name] = torch.cat(parts, 1).reshape(-1, *value.shape[1:])
        return result

    def _log_density(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """The model's log density over the unconstrained coordinates; of one minibatch, where a plate is subsampled."""
        model = self._plain_model[0]
        indices = Program(model, self).draw(1, args, kwargs).indices

        def log_density(latent: Tensor) -> Tensor:
            latents, log_det = poutine.Trace(), latent.new_zeros(())
            for site, value, one in self._constrained(latent):
                latents.add_node(
                    site["name"], name=site["name"], type="sample", value=value, is_observed=False, infer={}
                )
                log_det = log_det + one.sum()
            with SharedSubsamples(indices), pyro.validation_enabled(False):
                return log_det + log_prob_sum(run_model(model, latents, args, kwargs))

        return log_density

    def _pack_latent(self, parts: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def _ensure_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _constrain(self, latent: Tensor) -> dict[str, Tensor]:
        return {site["name"]: value for site, value, _ in self._constrained(latent)}

    def _constrained(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Yield each site, its value, and the log-determinant of its map to the support, `(*batch of the site,)`."""
        for site, unconstrained in self._unpack_latent(latent):
            transform = biject_to(site["fn"].support)
            value = transform(unconstrained)
            log_det = transform.log_abs_det_jacobian(unconstrained, value)
            extra = log_det.dim() - (value.dim() - site["fn"].event_dim)
            yield site, value, log_det.sum(tuple(range(-extra, 0))) if extra else log_det

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own sets the *original's* model to None. Here only the pickle goes without it, as it must.
        return {**self.__dict__, "_model": None, "_plain_model": None, "master": None}


def _map_draws(function: Callable[..., Any], draws: Any) -> Any:
    """Apply a function of one draw to all; without validation, whose checks of values `vmap` cannot batch."""
    with pyro.validation_enabled(False):
        return torch.func.vmap(function)(draws)
