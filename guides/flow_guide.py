"""What our guides share: draws, densities and quantiles in the model's own space."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import Distribution
from torch import Tensor
from torch.distributions import register_kl

from pyro_nf.distributions import FlowDistribution
from pyro_nf.guides.prototype import PrototypeGuide
from pyro_nf.interface.arguments import Arguments, check_whole_number, unpacked
from pyro_nf.programs.calls import takes_model_arguments
from pyro_nf.programs.supports import bijection

# Draws behind medians and quantiles: a median's error is 1.25 / sqrt(10,000) = 1.25% of a standard deviation.
_QUANTILE_DRAWS = 10_000


class MappedDraw(dist.Delta):
    """A site's value, computed from the guide's one draw; its log density is minus the log-determinant of the map.

    `TraceMeanField_ELBO` asks for a divergence from the model's distribution, and Pyro's from a `Delta` leaves the
    log density out. From this one it is in, and that ELBO is right.
    """


@register_kl(MappedDraw, Distribution)  # type: ignore[untyped-decorator]
def _kl_mapped_draw(p: MappedDraw, q: Any) -> Tensor:
    kl: Tensor = p.log_density - q.log_prob(p.v)
    return kl


class FlowGuide(PrototypeGuide):
    """A guide whose latents are a flow's coordinates, cut into sites and mapped to their supports.

    A subclass says what the posterior over the coordinates is and how they are cut (`get_posterior` and
    `_unpack_latent`); everything in the model's own space follows.
    """

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


def _map_draws(function: Callable[..., Any], draws: Any) -> Any:
    """Apply a function of one draw to all; without validation, whose checks of values `vmap` cannot batch."""
    with pyro.validation_enabled(False):
        return torch.func.vmap(function)(draws)
