"""A (model, guide) pair run for many draws at once, as a plain function of tensors.

Everything above this file (objectives, diagnostics, inference) asks one thing of a model and a guide: run the guide
`num_particles` times, run the model on each draw, and return something of the two traces. `BoundProgram.vmap_traces`
does that under `torch.func.vmap`, so that a model is written for one draw and never needs to broadcast over particles.
What is random is an argument: normal noise and the indices of subsampled plates are drawn first, by
`BoundProgram.draw`.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_nf.compiler.recording import Repeated
from pyro_nf.interface.arguments import check_callable, explain_failure
from pyro_nf.programs._pyro import is_subsample, subsampled
from pyro_nf.programs.batching import culprit
from pyro_nf.programs.calls import signature
from pyro_nf.programs.data_checks import check_data, check_parameters
from pyro_nf.programs.enumeration import NOTHING, Enumeration, find_discrete, refusing_hidden_draws
from pyro_nf.programs.noise import CountedNoise, SharedSubsamples, SubstituteNormals, minibatches, running
from pyro_nf.programs.sites import detached, is_data, is_enumerated, is_latent, latent_names
from pyro_nf.programs.traces import log_prob_sum, obstacles, run_model

# Draws that are run at once, and numbers that their latents and data may take together: 64 MiB in float32.
_MAX_CHUNK, _MAX_NUMBERS = 1000, 2**24
# Runs of a model on other draws that tell what depends on the draw.
_NUM_OTHERS = 5
# Draws without a density that tell how many there are.
_MANY_OBSTACLES = 30
# Minibatches of a subsampled plate, and seconds, up to which its rows are checked before a fit.
_MAX_BLOCKS, _MAX_CHECK_SECONDS = 1000, 2.0


class Randomness(NamedTuple):
    """What is random in a run of many particles, or in several such runs, one after another.

    Attributes:
        noise: Standard normals for the guide to use up, `(*num_steps, num_particles, noise_dim)`.
        indices: `{plate name: indices}` of the subsampled plates, `(*num_steps, subsample_size)`: the particles of a
            run share them.
    """

    noise: Tensor
    indices: dict[str, Tensor]

    def step(self, index: int) -> "Randomness":
        """Return the draws of one run of several."""
        return Randomness(self.noise[index], {name: values[index] for name, values in self.indices.items()})


class TracePair(NamedTuple):
    """One draw of the guide and the model's run on it."""

    guide: poutine.Trace
    model: poutine.Trace


class ProgramSpec(NamedTuple):
    """What is fixed about a (model, guide) pair for arguments of given shapes.

    Attributes:
        traces: Those of one run, outside `vmap`.
        subsamples: `{plate name: (size, subsample_size)}` of the plates that are subsampled.
        enumeration: The discrete latents that are summed out.
        noise_dim: Number of normals that a draw of the guide takes.
        noise_like: An empty tensor with their dtype and device.
    """

    traces: TracePair
    subsamples: dict[str, tuple[int, int]]
    enumeration: Enumeration
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
        self._specs: dict[Any, ProgramSpec] = {}
        self.vectorized = True

    def bind(self, *args: Any, **kwargs: Any) -> "BoundProgram":
        """Return the pair with the arguments of both."""
        return BoundProgram(self, args, kwargs)


class BoundProgram:
    """A model and a guide with their arguments: what objectives, diagnostics and fits run.

    Args:
        program: Model and guide.
        args: Their arguments.
        kwargs: Their keyword arguments.
    """

    def __init__(self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.program, self.args, self.kwargs = program, args, kwargs
        self.model = functools.partial(program.model, *args, **kwargs)
        self.guide = functools.partial(program.guide, *args, **kwargs)

    @property
    def spec(self) -> ProgramSpec:
        """What is fixed about the pair: both are run once, on first sight of arguments of these shapes.

        Raises:
            ValueError: If the pair cannot be fitted by reparametrised draws: the sentence says why.
        """
        key = signature(self.args, self.kwargs)
        if key not in self.program._specs:
            with torch.no_grad(), poutine.block(), running():
                try:
                    pair, enumeration, count = self._first_run()
                except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                    explain_failure(self.program.model, self.args, self.kwargs, error)
                    raise
            subsamples = _inspect(pair)
            self._check(pair.model)
            like = torch.empty(0, device=_device(pair)) if count.like is None else count.like
            spec = ProgramSpec(pair, subsamples, enumeration, count.size, like)
            self._check_enumeration(spec)
            self.program._specs[key] = spec
        return self.program._specs[key]

    def check_data(self) -> None:
        """Check data of shapes that may be known already: all the rows of subsampled plates, up to some thousand runs.

        The global random state stays as it was.

        Raises:
            ValueError: If observed values are outside their support, or parameters outside their constraint whatever
                the draw.
        """
        spec = self.spec
        sizes = spec.subsamples
        blocks = max([-(-size // part) for size, part in sizes.values()], default=1)
        begin = time.perf_counter()
        with torch.random.fork_rng():
            for block in range(min(blocks, _MAX_BLOCKS)):
                indices = {
                    name: min(block * part, size - part) + torch.arange(part) for name, (size, part) in sizes.items()
                }
                self._check(self._again(indices).model, indices)
                if time.perf_counter() - begin > _MAX_CHECK_SECONDS:
                    break

    def own_randomness(self) -> str:
        """Say by what the model's density differs from run to run at one draw; an empty string if it does not."""
        latents = self.spec.traces.guide
        runs = []
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            for _ in range(2):
                runs.append(run_model(self.model, latents, self.spec.enumeration))
            one, other = (log_prob_sum(trace) for trace in runs)
        if torch.isclose(one, other, rtol=1e-5, equal_nan=True):
            return ""
        for name, site in runs[0].nodes.items():
            if is_subsample(site) and not torch.equal(site["value"], runs[1].nodes[name]["value"]):
                return f"plate {name!r} has random indices"
        return "the model's density is random: it differs from run to run at the same latents"

    def without_density(self, num_draws: int) -> dict[str, float]:
        """Return for which share of the guide's draws which site of the model has no density, and why.

        Args:
            num_draws: How many draws to look at, at most: enough are looked at to know the shares roughly.

        Returns:
            Shares by reasons, the largest first; each draw counts for the first site that has none. `in_words` makes
            a sentence of them.
        """
        counts: dict[str, float] = {}
        looked_at = 0
        while looked_at < num_draws and sum(counts.values()) < _MANY_OBSTACLES:
            part = min(_MAX_CHUNK, num_draws - looked_at)
            found = self.vmap_in_chunks(lambda pair: obstacles(pair.model), part)
            counts = {reason: counts.get(reason, 0.0) + float(flags.sum()) for reason, flags in found.items()}
            looked_at += part
        shares = [(reason, count / looked_at) for reason, count in counts.items() if count]
        return dict(sorted(shares, key=lambda item: -item[1]))

    def draw(self, num_particles: int, num_steps: int | None = None) -> Randomness:
        """Draw what `num_particles` particles need: once, or stacked for `num_steps` runs.

        Runs that follow one another take their minibatches from one permutation while it lasts, as epochs do. Where a
        plate is subsampled, the noise comes in pairs of opposite signs.
        """
        spec = self.spec
        steps = () if num_steps is None else (num_steps,)
        like = spec.noise_like
        # A minibatch's error is common to its particles, and multiplies their mean noise in the gradients of scales:
        # pairs of opposite signs have none.
        pairs = -(-num_particles // 2) if spec.subsamples else num_particles
        noise = torch.randn(*steps, pairs, spec.noise_dim, dtype=like.dtype, device=like.device)
        if pairs < num_particles:
            noise = torch.cat([noise, -noise], -2)[..., :num_particles, :]
        indices = {
            name: minibatches(size, part, num_steps or 1, like.device).view(*steps, part)
            for name, (size, part) in spec.subsamples.items()
        }
        return Randomness(noise, indices)

    def vmap_traces(self, extract: Callable[[TracePair], dict[str, Tensor]], draws: Randomness) -> dict[str, Tensor]:
        """Run a particle for each row of `draws.noise` and return `extract`'s tensors, stacked along a new first dim.

        A model that `vmap` cannot batch (control flow that depends on values, say) is run draw by draw, with one
        warning.
        """
        particle, noise = self._particle(extract, draws.indices), draws.noise
        zeros = noise.new_zeros(len(noise))
        obstacle, who = "", ""
        if self.program.vectorized:
            try:
                return torch.func.vmap(particle, randomness="different")(noise, zeros)
            except RuntimeError as error:
                obstacle, who = str(error).splitlines()[0], culprit(error)
        # which raises, too, where the model itself is at fault
        results = [particle(row, zero) for row, zero in zip(noise, zeros, strict=True)]
        if obstacle:
            self.program.vectorized = False
            if who == "the model":
                said = f"the model cannot be batched over draws and runs them one by one, which is slow: {obstacle}"
                said += " (Usual causes: .item() or .numpy(), control flow that depends on a value.)"
            else:
                said = f"{who} cannot be batched over draws, so the model runs them one by one, slowly: {obstacle}"
            warnings.warn(said, stacklevel=2)
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    def _particle(
        self, extract: Callable[[TracePair], dict[str, Tensor]], indices: dict[str, Tensor]
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        enumeration = self.spec.enumeration

        def particle(noise: Tensor, zero: Tensor) -> dict[str, Tensor]:
            with SharedSubsamples(indices), running():
                return extract(self._run(SubstituteNormals(noise, zero), enumeration))

        return particle

    def vmap_in_chunks(
        self, extract: Callable[[TracePair], dict[str, Tensor]], num_particles: int
    ) -> dict[str, Tensor]:
        """`vmap_traces` without gradients, in bounded memory: over `chunks`."""
        parts = list(map(self.repeated(extract), self.chunks(num_particles)))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def repeated(self, extract: Callable[[TracePair], dict[str, Tensor]]) -> Callable[[Randomness], dict[str, Tensor]]:
        """Return `vmap_traces` of the same extract without gradients, for many calls: later ones go without Python.

        Parameters must stay as they are from call to call.
        """
        # Not `vmap_traces`: what cannot be recorded can be batched all the same.
        batched = torch.func.vmap(self._particle(extract, {}), randomness="different")
        recorded = Repeated(
            lambda noise: self.vmap_traces(extract, Randomness(noise, {})),
            lambda noise: batched(noise, noise.new_zeros(len(noise))),
        )

        def call(draws: Randomness) -> dict[str, Tensor]:
            with torch.no_grad():
                in_batch = self.program.vectorized and not draws.indices
                return recorded(draws.noise) if in_batch else self.vmap_traces(extract, draws)

        return call

    def chunks(self, num_particles: int) -> Iterator[Randomness]:
        """Yield the draws of `num_particles`, as many at once as make some millions of numbers."""
        chunk_size = max(1, min(_MAX_CHUNK, _MAX_NUMBERS // max(self.num_numbers, 1)))
        for start in range(0, num_particles, chunk_size):
            yield self.draw(min(chunk_size, num_particles - start))

    @property
    def num_numbers(self) -> int:
        """How many numbers the model's latents and data are."""
        sites = self.spec.traces.model.nodes.values()
        return sum(torch.as_tensor(site["value"]).numel() for site in sites if is_latent(site) or is_data(site))

    def guide_at_fixed_draw(self, pair: TracePair) -> poutine.Trace:
        r"""Run the guide on the particle's draw held fixed: its density's gradient is the score, d log q / d phi."""
        fixed = detached(pair.guide)
        for name, site in pair.guide.nodes.items():
            if site["type"] == "sample" and isinstance(site["fn"], dist.Delta):
                # A deterministic function of the draw: recomputed, for a rounding difference would cost -inf.
                fixed.remove_node(name)
        return poutine.trace(poutine.replay(self.guide, trace=fixed)).get_trace()

    def model_at_fixed_draw(self, pair: TracePair) -> poutine.Trace:
        """Run the model on the particle's draw held fixed: the gradient is to the model's own parameters alone."""
        return run_model(self.model, detached(pair.guide), self.spec.enumeration)

    def _check(
        self,
        trace: poutine.Trace,
        indices: dict[str, Tensor] | None = None,
    ) -> None:
        """Check a trace; what may depend on the draw is looked at on others, on the same minibatch."""
        if indices is None:
            indices = {name: s["value"] for name, s in trace.nodes.items() if is_subsample(s)}

        def others() -> list[poutine.Trace]:
            with torch.random.fork_rng():
                return [self._again(indices).model for _ in range(_NUM_OTHERS)]

        check_data(trace, others)
        check_parameters(trace, others)

    def _again(self, indices: dict[str, Tensor]) -> TracePair:
        with torch.no_grad(), poutine.block(), running(), SharedSubsamples(indices):
            return self._run()

    def _first_run(self) -> tuple[TracePair, Enumeration, CountedNoise]:
        """Run a particle and count its noise; a guide whose sites are not the model's may look at the model again."""
        look_again = getattr(self.program.guide, "look_again", None)
        try:
            found = self._counted_run()
            if look_again is None or latent_names(found[0].guide) == latent_names(found[0].model):
                return found
        except (RuntimeError, ValueError):
            if look_again is None:
                raise
        look_again(*self.args, **self.kwargs)
        return self._counted_run()

    def _counted_run(self) -> tuple[TracePair, Enumeration, CountedNoise]:
        # A first call lets an automatic guide set itself up, and report what is wrong with the model.
        self.guide()
        count = CountedNoise()
        pair = self._run(count)
        enumeration = find_discrete(pair.model, set(pair.guide.nodes))
        for name in enumeration.names:
            pair.model.nodes[name]["infer"]["_enumerated"] = True
        return pair, enumeration, count

    def _check_enumeration(self, spec: ProgramSpec) -> None:
        """Run the model once with all values of its discrete latents, and report what stands in the way."""
        with torch.random.fork_rng(), torch.no_grad(), poutine.block(), running(), refusing_hidden_draws():
            trace = run_model(self.model, spec.traces.guide, spec.enumeration)
        if spec.enumeration.names:
            log_prob_sum(trace)

    def _run(self, noise: AbstractContextManager[Any] | None = None, enumeration: Enumeration = NOTHING) -> TracePair:
        with noise or nullcontext():  # only the guide draws
            guide_trace = poutine.trace(self.guide).get_trace()
        return TracePair(guide_trace, run_model(self.model, guide_trace, enumeration))


def _device(pair: TracePair) -> torch.device:
    for site in (*pair.guide.nodes.values(), *pair.model.nodes.values()):
        if is_latent(site):
            device: torch.device = site["value"].device
            return device
    return torch.get_default_device()


def _inspect(pair: TracePair) -> dict[str, tuple[int, int]]:
    """Check that a pair can be fitted, and return its subsampled plates."""
    subsamples = {}
    for name, site in pair.model.nodes.items():
        if is_latent(site) and name not in pair.guide.nodes:
            raise ValueError(
                f"the guide has no site for the model's latent {name!r}; it must sample every latent (data have to be "
                "passed to the model)"
            )
    for trace in pair:
        for name, site in trace.nodes.items():
            if (sizes := subsampled(site)) is not None:
                subsamples[name] = sizes
    if not any(map(is_latent, pair.model.nodes.values())):
        discrete = any(map(is_enumerated, pair.model.nodes.values()))
        what = "no continuous latents: its discrete ones are summed out, and" if discrete else "no latent variables:"
        raise ValueError(f"the model has {what} there is no posterior to fit")
    return subsamples
