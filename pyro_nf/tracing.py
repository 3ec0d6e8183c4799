"""A (model, guide) pair run for many draws at once, as a plain function of tensors.

Everything above this file (objectives, diagnostics, inference) asks one thing of a model and a guide: run the guide
`num_particles` times, run the model on each draw, and return something of the two traces. `Program.map` does that
under `torch.func.vmap`, so that a model is written for one draw and never needs to broadcast over particles. What is
random is an argument: normal noise and the indices of subsampled plates are drawn first, by `Program.draw`.
"""

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_nf.arguments import check_callable, explain_failure
from pyro_nf.batching import culprit
from pyro_nf.noise import CountedNoise, GivenNoise, SharedSubsamples, minibatches, running
from pyro_nf.rewrites import is_batched
from pyro_nf.validity import (
    bounds,
    can_fail,
    demand,
    holds,
    is_checked,
    parameters,
    seen,
    support_of,
    unwrap,
    value_fault,
)

# Draws that are run at once, and numbers that their latents and data may take together: 64 MiB in float32.
_MAX_CHUNK, _MAX_NUMBERS = 1000, 2**24
# Runs of a model on other draws that tell what depends on the draw.
_NUM_OTHERS = 5
# Draws without a density that tell how many there are.
_MANY_OBSTACLES = 30
# Minibatches of a subsampled plate, and seconds, up to which its rows are checked before a fit.
_MAX_BLOCKS, _MAX_CHECK_SECONDS = 1000, 2.0


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

    Raises:
        ValueError: If one of them cannot be called.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        check_callable("model", model)
        check_callable("guide", guide)
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
            with torch.no_grad(), poutine.block(), running():
                try:
                    particle, count = self._first_run(args, kwargs)
                except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                    explain_failure(self.model, args, kwargs, error)
                    raise
            subsamples = _inspect(particle)
            self._check(particle.model, args, kwargs)
            like = torch.empty(0, device=_device(particle)) if count.like is None else count.like
            self._structures[key] = Structure(particle, subsamples, count.size, like)
        return self._structures[key]

    def check_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check data of shapes that may be known already: all the rows of subsampled plates, up to some thousand runs.

        The global random state stays as it was.

        Raises:
            ValueError: If observed values are outside their support, or parameters outside their constraint whatever
                the draw.
        """
        structure = self.structure(args, kwargs)
        sizes = structure.subsamples
        blocks = max([-(-size // part) for size, part in sizes.values()], default=1)
        begin = time.perf_counter()
        with torch.random.fork_rng():
            for block in range(min(blocks, _MAX_BLOCKS)):
                indices = {
                    name: min(block * part, size - part) + torch.arange(part) for name, (size, part) in sizes.items()
                }
                self._check(self._again(args, kwargs, indices).model, args, kwargs, indices)
                if time.perf_counter() - begin > _MAX_CHECK_SECONDS:
                    break

    def own_randomness(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Say by what the model's density differs from run to run at one draw; an empty string if it does not."""
        latents = self.structure(args, kwargs).particle.guide
        runs = []
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            for _ in range(2):
                runs.append(run_model(self.model, latents, args, kwargs))
            one, other = (log_prob_sum(trace) for trace in runs)
        if torch.isclose(one, other, rtol=1e-5, equal_nan=True):
            return ""
        for name, site in runs[0].nodes.items():
            if isinstance(site.get("fn"), _Subsample) and not torch.equal(site["value"], runs[1].nodes[name]["value"]):
                return f"plate {name!r} has random indices"
        return "the model's density is random: it differs from run to run at the same latents"

    def without_density(self, num_draws: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
        """Return for which share of the guide's draws which site of the model has no density, and why.

        Args:
            num_draws: How many draws to look at, at most: enough are looked at to know the shares roughly.
            args: The model's arguments.
            kwargs: The model's keyword arguments.

        Returns:
            Shares by reasons, the largest first; each draw counts for the first site that has none. `in_words` makes
            a sentence of them.
        """
        counts: dict[str, float] = {}
        looked_at = 0
        while looked_at < num_draws and sum(counts.values()) < _MANY_OBSTACLES:
            part = min(_MAX_CHUNK, num_draws - looked_at)
            found = self.map_in_chunks(lambda particle: _obstacles(particle.model), part, args, kwargs)
            counts = {reason: counts.get(reason, 0.0) + float(flags.sum()) for reason, flags in found.items()}
            looked_at += part
        shares = [(reason, count / looked_at) for reason, count in counts.items() if count]
        return dict(sorted(shares, key=lambda item: -item[1]))

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
            with SharedSubsamples(draws.indices), running():
                return extract(self._run(args, kwargs, GivenNoise(noise, zero)))

        noise = draws.noise
        zeros = noise.new_zeros(len(noise))
        obstacle, who = "", ""
        if self.vectorized:
            try:
                return torch.func.vmap(particle, randomness="different")(noise, zeros)
            except RuntimeError as error:
                obstacle, who = str(error).splitlines()[0], culprit(error)
        # which raises, too, where the model itself is at fault
        results = [particle(row, zero) for row, zero in zip(noise, zeros, strict=True)]
        if obstacle:
            self.vectorized = False
            if who == "the model":
                said = f"the model cannot be batched over draws and runs them one by one, which is slow: {obstacle}"
                said += " (Usual causes: .item() or .numpy(), control flow that depends on a value.)"
            else:
                said = f"{who} cannot be batched over draws, so the model runs them one by one, slowly: {obstacle}"
            warnings.warn(said, stacklevel=2)
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
        return sum(torch.as_tensor(site["value"]).numel() for site in sites if is_latent(site) or is_data(site))

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

    def _check(
        self,
        trace: poutine.Trace,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        indices: dict[str, Tensor] | None = None,
    ) -> None:
        """Check a trace; what may depend on the draw is looked at on others, on the same minibatch."""
        if indices is None:
            indices = {name: s["value"] for name, s in trace.nodes.items() if isinstance(s.get("fn"), _Subsample)}

        def others() -> list[poutine.Trace]:
            with torch.random.fork_rng():
                return [self._again(args, kwargs, indices).model for _ in range(_NUM_OTHERS)]

        check_data(trace, others)
        _check_parameters(trace, others)

    def _again(self, args: tuple[Any, ...], kwargs: dict[str, Any], indices: dict[str, Tensor]) -> Particle:
        with torch.no_grad(), poutine.block(), running(), SharedSubsamples(indices):
            return self._run(args, kwargs)

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
    with running():
        return fill_masked(poutine.trace(poutine.replay(model, trace=latents)).get_trace(*args, **kwargs))


def fill_masked(trace: poutine.Trace) -> poutine.Trace:
    """Put values of the support where a model's data are masked and have no density, and return the trace."""
    for site in trace.nodes.values():
        if is_data(site) and isinstance(site["value"], Tensor):
            leaf, mask = unwrap(site["fn"], site["mask"])
            if isinstance(mask, Tensor):
                site["value"] = _filled(site["value"], mask, leaf)
    return trace


def check_data(trace: poutine.Trace, others: Callable[[], Iterable[poutine.Trace]] | None = None) -> None:
    """Check the observed values of a model's trace, made under `noise.running`, against their supports.

    Args:
        trace: The model's trace.
        others: Return traces on other draws: they tell a support that depends on latents, which values may leave for
            some draws, from one that is fixed. Without them only supports of fixed numbers count.

    Raises:
        ValueError: If values are NaN, infinite, or outside the support, and not masked.
    """
    for name, site in trace.nodes.items():
        fault = value_fault(site["fn"], site["value"], site["mask"]) if is_data(site) else None
        if fault is None or (fault.bounds and (others is None or _moves(name, fault.bounds, others()))):
            continue
        first = "" if fault.first != fault.first else f" (the first is {_short(fault.first)})"
        remedy = "mend or drop them, or hide them with poutine.mask"
        raise ValueError(f"the data of site {name!r} hold {fault.what}{first}; {remedy}")


def _check_parameters(trace: poutine.Trace, others: Callable[[], Iterable[poutine.Trace]]) -> None:
    """Check the parameters of a model's distributions that are NaN or outside their constraint whatever the draw.

    Raises:
        ValueError: If there are entries that are the same on all draws, and wrong; all NaN is no such case, for a few
            draws near the guide's start do not tell.
    """
    for name, site in trace.nodes.items():
        if not (is_latent(site) or is_data(site)):
            continue
        for number, parameter in enumerate(parameters(site["fn"], site["mask"])):
            nan = parameter.is_nan()
            wrong = nan if bool(nan.any()) else torch.broadcast_tensors(~parameter.holds(), nan)[0]
            if bool(nan.all()) or not bool(wrong.any()):
                continue
            for other in others():
                there = other.nodes[name]
                value = [*parameters(there["fn"], there["mask"])][number].value
                equal = torch.isclose(value, parameter.value, 0.0, 0.0, equal_nan=True)
                wrong = wrong & ~seen(~equal, parameter.constraint.event_dim, None)
            if bool(wrong.any()):
                how = "NaN" if bool(nan.any()) else f"not {demand(parameter.constraint)}"
                raise ValueError(
                    f"site {name!r}: its {parameter.name} is {how} for {int(wrong.sum())} of {wrong.numel()} entries, "
                    "whatever the draw; look at what the model computes it from: covariates that are NaN, say"
                )


def in_words(shares: dict[str, float]) -> str:
    """Say why draws have no density, as `Program.without_density` found it: the two most frequent reasons."""
    if not shares:
        return "a few of very many draws have no density under the model"
    parts = [f"{reason} in {_percent(share)} of the draws" for reason, share in itertools.islice(shares.items(), 2)]
    return f"draws have no density: {'; '.join(parts)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _moves(name: str, limits: tuple[Tensor, ...], others: Iterable[poutine.Trace]) -> bool:
    """Whether the bounds of a site's support are others on other draws."""
    for trace in others:
        support = support_of(unwrap(trace.nodes[name]["fn"], None)[0])
        elsewhere = () if support is None else bounds(support)
        if len(elsewhere) != len(limits) or not all(map(torch.equal, elsewhere, limits)):
            return True
    return False


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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


def log_prob_sum(trace: poutine.Trace, has_coordinates: bool = False) -> Tensor:
    """Return a model's log density, all scales and masks applied, as a tensor; each site keeps its `log_prob`.

    It is minus infinity for a draw for which a distribution's parameter leaves its constraint, or a value its support:
    formulas give some number there.

    Args:
        trace: The model's.
        has_coordinates: Whether the latents come from the real line, and so are inside their supports.
    """
    with running():
        usable = [inside for *_, inside in _validity(trace, latents=not has_coordinates)]
    total = guide_log_prob(trace)
    if not usable:
        return total
    return torch.where(functools.reduce(torch.logical_and, usable), total, -math.inf)


def guide_log_prob(trace: poutine.Trace) -> Tensor:
    """Return a guide's log density as a tensor; each site keeps its `log_prob`."""
    with running():
        trace.compute_log_prob()
    return torch.as_tensor(trace.log_prob_sum())


def _validity(trace: poutine.Trace, latents: bool, everything: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what can leave its constraint: the site, what is wrong then, and whether this draw's is inside, `()`.

    Args:
        trace: The model's.
        latents: Whether to look at the values of latents, too.
        everything: Whether to look for NaN, and at what is the same for all draws.
    """
    trained = any(site["type"] == "param" for site in trace.nodes.values())
    stack = torch._C._functorch.get_interpreter_stack() or []
    in_batch = any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)

    def varies(tensor: Tensor) -> bool:
        """Whether a tensor may depend on the draw: where draws are batched, what is not in the batch does not."""
        return everything or trained or not in_batch or is_batched(tensor)

    for name, site in trace.nodes.items():
        if not (is_latent(site) or is_data(site)):
            continue
        leaf, mask = unwrap(site["fn"], site["mask"])
        for parameter in parameters(site["fn"], site["mask"]):
            if everything:
                yield name, f"its {parameter.name} is NaN", _all(~parameter.is_nan())
            if can_fail(parameter.constraint) and varies(parameter.value):
                yield name, f"its {parameter.name} is not {demand(parameter.constraint)}", _all(parameter.holds())
        support = support_of(leaf)
        if mask is False or support is None or not can_fail(support) or not is_checked(site["fn"]):
            continue
        if any(map(varies, bounds(support))) or (latents and is_latent(site) and varies(site["value"])):
            inside = holds(support, site["value"], closed=True)
            inside = inside | ~mask if isinstance(mask, Tensor) else inside
            yield name, f"its value is outside the support of {type(leaf).__name__}", _all(inside)


def _obstacles(trace: poutine.Trace) -> dict[str, Tensor]:
    """Return for each reason why the model has no density at a draw whether it is the first of them, `()`."""
    found: dict[str, Tensor] = {}
    with running():
        reasons = [*_validity(trace, latents=True, everything=True)]
    guide_log_prob(trace)
    so_far = torch.tensor(True)
    for name, site in trace.nodes.items():
        if is_latent(site) or is_data(site):
            own = [(what, inside) for place, what, inside in reasons if place == name]
            own.append(("its density is not finite", torch.as_tensor(site["log_prob_sum"]).isfinite()))
            for what, inside in own:
                found[f"site {name!r}: {what}"] = so_far & ~inside
                so_far = so_far & inside
    return found


def _all(flags: Tensor) -> Tensor:
    return flags.all() if flags.dim() else flags


def local_plate(particle: Particle) -> Any:
    """The frame of the one plate in which every site of the model stands, or `None`."""
    sites = [site for site in particle.model.nodes.values() if is_latent(site) or is_data(site)]
    frames = {site["cond_indep_stack"] for site in sites}
    return frames.pop()[0] if len(frames) == 1 and all(len(site["cond_indep_stack"]) == 1 for site in sites) else None


def local_log_prob(trace: poutine.Trace) -> Tensor:
    """Return a trace's log density for each element of its one plate, `(size,)`, without a subsample's scale."""
    guide_log_prob(trace)
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


def _filled(value: Tensor, mask: Tensor, leaf: Any) -> Tensor:
    """Put some value of the support where data have no density and are masked: its gradient would still be NaN."""
    support = support_of(leaf)
    if support is None:
        return value
    broken = ~value.isfinite()
    if not bounds(support):
        broken = broken | ~_spread(support.check(value), value)
    missing = (seen(broken, leaf.event_dim, None) & ~mask)[(...,) + (None,) * leaf.event_dim]
    if support.is_discrete:  # 0 is a count, a class and a failure
        return torch.where(missing, torch.zeros_like(value), value)
    to_support = biject_to(support)
    return torch.where(missing, to_support(value.new_zeros(to_support.inverse_shape(value.shape))), value)


def _spread(entries: Tensor, value: Tensor) -> Tensor:
    """Repeat what is said of vectors or matrices for each of their numbers."""
    return entries[(...,) + (None,) * (value.dim() - entries.dim())].expand_as(value)


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
    for trace in particle:
        for name, site in trace.nodes.items():
            fn = site.get("fn")
            if isinstance(fn, _Subsample) and fn.subsample_size is not None and fn.subsample_size < fn.size:
                subsamples[name] = (fn.size, fn.subsample_size)
    if not any(map(is_latent, particle.model.nodes.values())):
        raise ValueError("the model has no latent variables: there is no posterior to fit")
    return subsamples
