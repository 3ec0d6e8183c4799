"""A (model, guide) pair run for many draws at once, as a plain function of tensors.

Everything above this file (objectives, diagnostics, inference) asks one thing of a model and a guide: run the guide
`num_particles` times, run the model on each draw, and return something of the two traces. `Program.map` does that
under `torch.func.vmap`, so that a model is written for one draw and never needs to broadcast over particles. What is
random is an argument: normal noise and the indices of subsampled plates are drawn first, by `Program.draw`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_nf.noise import BatchedWrites, CountedNoise, GivenNoise, SharedSubsamples, minibatches

# Draws that are run at once, and numbers that their latents and data may take together: 64 MiB in float32.
_MAX_CHUNK, _MAX_NUMBERS = 1000, 2**24


class Draws(NamedTuple):
    """What is random in a run of many particles, or in several such runs, one after another.

    Attributes:
        noise: Standard normals for the guide to use up, `(*num_steps, num_particles, noise_dim)`.
        indices: `{plate name: indices}` of the subsampled plates, `(*num_steps, subsample_size)`: the particles of a
            run share them.
    """

    noise: Tensor
    indices: dict[str, Tensor]

    def step(self, index: int) -> "Draws":
        """Return the draws of one run of several."""
        return Draws(self.noise[index], {name: values[index] for name, values in self.indices.items()})


class Particle(NamedTuple):
    """One draw of the guide and the model's run on it."""

    guide: poutine.Trace
    model: poutine.Trace


class Structure(NamedTuple):
    """What is fixed about a (model, guide) pair for arguments of given shapes.

    Attributes:
        particle: Traces of one run, outside `vmap`.
        subsamples: `{plate name: (size, subsample_size)}` of the plates that are subsampled.
        noise_dim: Number of normals that a draw of the guide takes.
        noise_like: An empty tensor with their dtype and device.
    """

    particle: Particle
    subsamples: dict[str, tuple[int, int]]
    noise_dim: int
    noise_like: Tensor


class Program:
    """A model and a guide, to be run for many draws at once.

    Args:
        model: A Pyro model.
        guide: A Pyro guide for it, taking the same arguments; ours, Pyro's or hand-written.

    Attributes:
        vectorized: Whether draws are batched; false from the first model on that `vmap` could not batch.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        self.model, self.guide = model, guide
        self._structures: dict[Any, Structure] = {}
        self.vectorized = True

    def structure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
        """Return the pair's structure, running both once on first sight of arguments of these shapes.

        Raises:
            ValueError: If the pair cannot be fitted by reparametrised draws: the sentence says why.
        """
        key = signature(args, kwargs)
        if key not in self._structures:
            with torch.no_grad(), poutine.block():
                particle, count = self._first_run(args, kwargs)
            subsamples = _inspect(particle)
            like = torch.empty(0, device=_device(particle)) if count.like is None else count.like
            self._structures[key] = Structure(particle, subsamples, count.size, like)
        return self._structures[key]

    def draw(
        self, num_particles: int, args: tuple[Any, ...], kwargs: dict[str, Any], num_steps: int | None = None
    ) -> Draws:
        """Draw what `num_particles` particles need: once, or stacked for `num_steps` runs.

        Runs that follow one another take their minibatches from one permutation while it lasts, as epochs do. Where a
        plate is subsampled, the noise comes in pairs of opposite signs.
        """
        structure = self.structure(args, kwargs)
        steps = () if num_steps is None else (num_steps,)
        like = structure.noise_like
        # A minibatch's error is common to its particles, and multiplies their mean noise in the gradients of scales:
        # pairs of opposite signs have none.
        pairs = -(-num_particles // 2) if structure.subsamples else num_particles
        noise = torch.randn(*steps, pairs, structure.noise_dim, dtype=like.dtype, device=like.device)
        if pairs < num_particles:
            noise = torch.cat([noise, -noise], -2)[..., :num_particles, :]
        indices = {
            name: minibatches(size, part, num_steps or 1, like.device).view(*steps, part)
            for name, (size, part) in structure.subsamples.items()
        }
        return Draws(noise, indices)

    def map(
        self,
        extract: Callable[[Particle], dict[str, Tensor]],
        draws: Draws,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Run a particle for each row of `draws.noise` and return `extract`'s tensors, stacked along a new first dim.

        A model that `vmap` cannot batch (control flow that depends on values, say) is run draw by draw, with one
        warning.
        """
        self.structure(args, kwargs)

        def particle(noise: Tensor, zero: Tensor) -> dict[str, Tensor]:
            with SharedSubsamples(draws.indices), pyro.validation_enabled(False):
                return extract(self._run(args, kwargs, GivenNoise(noise, zero)))

        noise = draws.noise
        zeros = noise.new_zeros(len(noise))
        obstacle = ""
        if self.vectorized:
            try:
                return torch.func.vmap(particle, randomness="different")(noise, zeros)
            except RuntimeError as error:
                obstacle = str(error).splitlines()[0]
        # which raises, too, where the model itself is at fault
        results = [particle(row, zero) for row, zero in zip(noise, zeros, strict=True)]
        if obstacle:
            self.vectorized = False
            warnings.warn(
                f"the model cannot be batched over draws and runs them one by one, which is slow: {obstacle} "
                "(Usual causes: .item() or .numpy(), control flow that depends on a value, in-place writes.)",
                stacklevel=2,
            )
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    def map_in_chunks(
        self,
        extract: Callable[[Particle], dict[str, Tensor]],
        num_particles: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """`map` without gradients, in bounded memory: over `chunks`."""
        chunks = self.chunks(num_particles, args, kwargs)
        with torch.no_grad():
            parts = [self.map(extract, draws, args, kwargs) for draws in chunks]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def chunks(self, num_particles: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Draws]:
        """Yield the draws of `num_particles`, as many at once as make some millions of numbers."""
        chunk_size = max(1, min(_MAX_CHUNK, _MAX_NUMBERS // max(self.num_numbers(args, kwargs), 1)))
        for start in range(0, num_particles, chunk_size):
            yield self.draw(min(chunk_size, num_particles - start), args, kwargs)

    def num_numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return how many numbers the model's latents and data are."""
        sites = self.structure(args, kwargs).particle.model.nodes.values()
        return sum(site["value"].numel() for site in sites if is_latent(site) or is_data(site))

    def rescored(self, particle: Particle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
        r"""Run the guide on the particle's draw held fixed: its density's gradient is the score, d log q / d phi."""
        fixed = _detached(particle.guide)
        for name, site in particle.guide.nodes.items():
            if site["type"] == "sample" and isinstance(site["fn"], dist.Delta):
                # A deterministic function of the draw: recomputed, for a rounding difference would cost -inf.
                fixed.remove_node(name)
        return poutine.trace(poutine.replay(self.guide, trace=fixed)).get_trace(*args, **kwargs)

    def remodelled(self, particle: Particle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
        """Run the model on the particle's draw held fixed: the gradient is to the model's own parameters alone."""
        return run_model(self.model, _detached(particle.guide), args, kwargs)

    def _first_run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Particle, CountedNoise]:
        """Run a particle and count its noise; a guide whose sites are not the model's may look at the model again."""
        look_again = getattr(self.guide, "look_again", None)
        try:
            found = self._counted_run(args, kwargs)
            if look_again is None or _latents(found[0].guide) == _latents(found[0].model):
                return found
        except (RuntimeError, ValueError):
            if look_again is None:
                raise
        look_again(*args, **kwargs)
        return self._counted_run(args, kwargs)

    def _counted_run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Particle, CountedNoise]:
        # A first call lets an automatic guide set itself up, and report what is wrong with the model.
        self.guide(*args, **kwargs)
        count = CountedNoise()
        return self._run(args, kwargs, count), count

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], noise: AbstractContextManager[Any] | None = None
    ) -> Particle:
        with noise or nullcontext():  # only the guide draws
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        return Particle(guide_trace, run_model(self.model, guide_trace, args, kwargs))


def run_model(
    model: Callable[..., Any], latents: poutine.Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> poutine.Trace:
    """Run a model on the latents of a trace; return its trace."""
    return fill_masked(poutine.trace(poutine.replay(model, trace=latents)).get_trace(*args, **kwargs))


def fill_masked(trace: poutine.Trace) -> poutine.Trace:
    """Put values of the support where a model's data are NaN and masked, and return the trace."""
    for site in trace.nodes.values():
        if is_data(site) and isinstance(site["mask"], Tensor):
            site["value"] = _without_masked_nan(site["value"], site["mask"], site["fn"])
    return trace


def signature(args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
    """Return what a model's structure may depend on: the shapes of tensors, and other values that can be compared."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        if isinstance(value, dict):
            return tuple((key, describe(item)) for key, item in value.items())
        if isinstance(value, (tuple, list)):
            return tuple(map(describe, value))
        return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)

    return describe(tuple(args)), describe(kwargs)


def log_prob_sum(trace: poutine.Trace) -> Tensor:
    """Return the trace's log density, all scales and masks applied, as a tensor; each site keeps its `log_prob`."""
    _compute_log_prob(trace)
    return torch.as_tensor(trace.log_prob_sum())


def _compute_log_prob(trace: poutine.Trace) -> None:
    with BatchedWrites():
        trace.compute_log_prob()


def local_plate(particle: Particle) -> Any:
    """The frame of the one plate in which every site of the model stands, or `None`."""
    sites = [site for site in particle.model.nodes.values() if is_latent(site) or is_data(site)]
    frames = {site["cond_indep_stack"] for site in sites}
    return frames.pop()[0] if len(frames) == 1 and all(len(site["cond_indep_stack"]) == 1 for site in sites) else None


def local_log_prob(trace: poutine.Trace) -> Tensor:
    """Return a trace's log density for each element of its one plate, `(size,)`, without a subsample's scale."""
    _compute_log_prob(trace)
    total = torch.zeros(())
    for site in trace.nodes.values():
        if is_latent(site) or is_data(site):
            (frame,) = site["cond_indep_stack"]
            # One plate: one entry a datum, wherever its dimension is.
            total = total + site["log_prob"].reshape(-1) / subsample_scale(frame)
    return total


def subsample_scale(frame: Any) -> float:
    """By how much Pyro scales up what stands in a plate: 1 unless it is subsampled."""
    return 1.0 if frame.full_size is None else frame.full_size / frame.size


def score_sites(trace: poutine.Trace) -> list[str]:
    """Names of a guide's sites whose draws carry no gradient, as of a discrete variable."""
    return [name for name, site in trace.nodes.items() if is_latent(site) and not site["fn"].has_rsample]


def is_data(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is observed data (not a deterministic, which Pyro also marks as observed)."""
    return site["type"] == "sample" and site["is_observed"] and not is_deterministic(site)


def is_deterministic(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is a `pyro.deterministic`."""
    return site["type"] == "sample" and bool(site["infer"].get("_deterministic", False))


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is a latent variable (not the indices of a subsampled plate)."""
    return site["type"] == "sample" and not site["is_observed"] and not isinstance(site["fn"], _Subsample)


def _latents(trace: poutine.Trace) -> set[str]:
    """Names of a trace's latents, but for auxiliary ones."""
    sites = trace.nodes.items()
    return {name for name, site in sites if is_latent(site) and not site["infer"].get("is_auxiliary")}


def _detached(trace: poutine.Trace) -> poutine.Trace:
    fixed = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            fixed.nodes[name] = {**site, "value": site["value"].detach()}
    return fixed


def _without_masked_nan(value: Any, mask: Tensor, fn: Any) -> Any:
    """Put some value of the support where data are NaN and masked: the density's gradient would still be NaN."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    missing = value.isnan()
    if fn.event_dim:
        missing = missing.flatten(-fn.event_dim).any(-1)
    missing = (missing & ~mask)[(...,) + (None,) * fn.event_dim]
    if fn.support.is_discrete:  # 0 is a count, a class and a failure
        return torch.where(missing, torch.zeros_like(value), value)
    to_support = biject_to(fn.support)
    return torch.where(missing, to_support(value.new_zeros(to_support.inverse_shape(value.shape))), value)


def _device(particle: Particle) -> torch.device:
    for site in (*particle.guide.nodes.values(), *particle.model.nodes.values()):
        if is_latent(site):
            device: torch.device = site["value"].device
            return device
    return torch.get_default_device()


def _inspect(particle: Particle) -> dict[str, tuple[int, int]]:
    """Check that a pair can be fitted, and return its subsampled plates."""
    subsamples = {}
    for name, site in particle.model.nodes.items():
        if is_latent(site):
            if site["infer"].get("enumerate") == "parallel":
                raise ValueError(
                    f"site {name!r} is enumerated, which this objective does not sum over: "
                    "use pyro.infer.TraceEnum_ELBO with Pyro's SVI"
                )
            if name not in particle.guide.nodes:
                raise ValueError(
                    f"the guide has no site for the model's latent {name!r}; it must sample every latent (data have to "
                    "be passed to the model)"
                )
        elif is_data(site):
            if name in _latents(particle.guide):
                raise ValueError(
                    f"site {name!r} is observed by the model, and sampled by the guide: make a guide of the model that "
                    "is fitted, called with its data"
                )
            _check_data(name, site)
    for trace in particle:
        for name, site in trace.nodes.items():
            fn = site.get("fn")
            if isinstance(fn, _Subsample) and fn.subsample_size is not None and fn.subsample_size < fn.size:
                subsamples[name] = (fn.size, fn.subsample_size)
    if not any(map(is_latent, particle.model.nodes.values())):
        raise ValueError("the model has no latent variables: there is no posterior to fit")
    return subsamples


def _check_data(name: str, site: dict[str, Any]) -> None:
    value, mask = site["value"], site["mask"]
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return
    missing = (
        value.isnan().flatten(value.dim() - site["fn"].event_dim).any(-1) if site["fn"].event_dim else value.isnan()
    )
    if isinstance(mask, Tensor):
        missing = missing & mask
    if mask is not False and bool(missing.any()):
        raise ValueError(
            f"the data of site {name!r} hold {int(missing.sum())} NaN; drop them, or hide them with poutine.mask"
        )
