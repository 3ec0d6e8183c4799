"""FlowSVI: fit a guide, stop when it is done, keep the best."""

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nf.flows import unpaced
from pyro_nf.inference.checkpoint import Progress, random_state, set_random_state
from pyro_nf.inference.execution import Execution
from pyro_nf.inference.graph import MAX_UNROLL, read, write
from pyro_nf.inference.optim import GuardedAdam, State
from pyro_nf.inference.ranks import Ranks
from pyro_nf.inference.result import Evaluation, FitResult
from pyro_nf.inference.schedule import PlateauSchedule
from pyro_nf.inference.stages import Staged, fit_in_stages
from pyro_nf.objectives import ELBO, CoordinateELBO
from pyro_nf.tracing import Particle, Program, log_prob_sum

# Non-finite steps in a row that end a run: by then no draw of the guide has a density that can be used.
_MAX_RUN_SKIPPED = 100
# Normals that are drawn at once, for many steps of a small model.
_MAX_NOISE = 2**22
# Minibatches of the first evaluation and the last ones, whose steps are plain and so slow.
_MAX_EVAL_BATCHES = 100
# Steps that leave room for stages.
_MIN_STAGED = 3000
# In stages: numbers that the model makes in a step, at most, and draws that are taken in any case.
_MAX_WORK, _MIN_STAGED_PARTICLES = 2**23, 64
# Learning rates that are tried, for how many steps, and how far below the best of them the fit stays: what rises
# fastest at first is too coarse near the end.
_RATES, _TRIAL_STEPS, _CAUTION = (0.1, 0.03, 0.01, 0.003), 100, 1 / 3

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Callback = Callable[[Evaluation], bool | None]


class FlowSVI:
    """Stochastic variational inference that stops by itself, for any Pyro guide with reparametrised draws.

    Each step takes the gradient of the objective over `num_particles` draws, batched by `vmap`, and updates all
    parameters of model and guide by Adam with clipping; a step with a non-finite loss or gradient changes nothing and
    is counted. The ELBO of the last `eval_every` steps, each on draws of its own, is watched: the parameters of the
    best such block, averaged over its steps, are kept, and a plateau starts the cool-down that ends the run.

    An `AutoFlow` is fitted in stages. "normal": climbs from eight points, and from the best mode (or from the guide's
    own start, where the modes are worse) natural gradients to the normal that is nearest to the posterior. "curve", up
    to 100 coordinates: the triangular map of that normal, of second order, that is nearest. "flow": in coordinates in
    which the normal is the standard one, all of the flow; "flow, longer" goes on at a lower rate. Each stage is
    measured by the importance weights of 5,000 fresh draws, and what is better is kept; the first whose divergence from
    the posterior is below 0.005 nats (a normal's below 0.001, a curve's below 0.002), and whose effective draws are
    more than 98.5%, ends the fit. "tails": where k-hat is then 0.2 or higher, a share of the base gets wider, if that
    lowers k-hat by 0.1 and costs less than 0.003 nats. `result.stages` has the figures. Where a draw of the model takes
    much work, steps have fewer draws. A fit with a `learning_rate`, an `objective` or a `checkpoint`, with `max_steps`
    below 3,000, of a model with parameters of its own, by minibatches or on several processes is a single stage from
    where the guide is.

    Where `torch.distributed` is initialised (`torchrun`), the processes share the draws of each step, or have
    minibatches of their own, and average the gradient: their parameters stay equal. All make the same calls, with the
    same model, guide and options; the first one shows the progress bar, warns, and writes and reads the checkpoint, and
    a callback that ends the run on one ends it on all. Where one process ends or hangs the others raise, at the latest
    after the `timeout` of `init_process_group`.

    Args:
        model: A Pyro model.
        guide: A Pyro guide: ours, Pyro's, or hand-written.
        objective: What to maximise; `None` for `ELBO()`.
        num_particles: Draws a step. Many fit better and cost a small model little; where each draw runs a network over
            a minibatch, take a few.
        learning_rate: Adam's rate between warm-up and cool-down. `None` tries four, from 0.1 to 0.003, for 100 steps
            each from the start, and takes a third of the one that came furthest (in stages, theirs are fixed).
        weight_decay: Decoupled decay of every parameter (AdamW).
        max_steps: Upper bound of the run.
        eval_every: Steps between evaluations (in stages, theirs are fixed).
        eval_particles: Draws of the final evaluation.
        clip_norm: Where gradients are usually longer than this, all are scaled down; single long ones are cut.
        num_starts: Before the first step, let the guide look for modes from so many points and begin there, if it can
            (`AutoFlow.warm_start`); the result says whether they agree. 0 begins where the guide is, unless the fit is
            one in stages.
        compile: Whether to record a step as a graph of tensor operations and compile it, which takes from ten seconds
            to minutes and makes small models many times faster. It is compared with the plain step first; where that
            fails, or the model cannot be recorded, a warning says why and the run goes on without. "auto" does as much
            of it as pays within `max_steps`, by an estimate from the number of operations.
        checkpoint: A file to write the fit's whole state to at each evaluation, for `resume`.
        callbacks: Called with each `Evaluation` while the guide holds the state that was reached; one that returns
            `True` ends the run.
        seed: Makes the run reproducible bit for bit on one machine, and leaves the global random state as it was.
            `None` draws from the global state.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.inference import FlowSVI
        >>> from pyro_nf.guides import AutoFlow
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.5, 0.3))
        >>> guide = AutoFlow(model)
        >>> result = FlowSVI(model, guide, seed=0, progress=False, max_steps=600).run()
        >>> abs(result.elbo) < 0.01
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        objective: ELBO | None = None,
        num_particles: int = 256,
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        max_steps: int = 10_000,
        eval_every: int = 100,
        eval_particles: int = 1000,
        clip_norm: float = 10.0,
        num_starts: int = 0,
        compile: bool | Literal["auto"] = "auto",  # noqa: A002 - as torch calls it
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        numbers = {
            "num_particles": num_particles,
            "learning_rate": 1.0 if learning_rate is None else learning_rate,
            "max_steps": max_steps,
            "eval_every": eval_every,
            "eval_particles": eval_particles,
            "clip_norm": clip_norm,
        }
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value!r}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative; got {weight_decay!r}")
        if not num_starts >= 0:
            raise ValueError(f"num_starts must not be negative; got {num_starts!r}")
        if num_starts and not hasattr(guide, "warm_start"):
            raise ValueError(f"num_starts must be 0 for a guide without warm_start; got a {type(guide).__name__}")
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto'; got {compile!r}")
        self.compile = compile
        self.program = Program(model, guide)
        self._own_objective = objective is None
        self.objective = ELBO() if objective is None else objective
        self.num_particles, self.learning_rate, self.weight_decay = num_particles, learning_rate, weight_decay
        self.max_steps, self.eval_every, self.eval_particles = max_steps, eval_every, eval_particles
        self.num_starts = num_starts
        self.clip_norm, self.callbacks = clip_norm, tuple(callbacks)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.seed, self.progress = seed, progress

    def run(self, *args: Any, **kwargs: Any) -> FitResult:
        """Fit to the model's arguments, from the guide's present state, and leave the best state in the guide.

        Ctrl-C ends the run and returns the best state until then; with several processes it leaves that state in the
        guide and is raised, as is the end of another process.

        Raises:
            ValueError: If the pair cannot be fitted by reparametrised draws, or the data hold NaN.
        """
        return self._in_stages(args, kwargs) or self._run(itertools.repeat((args, kwargs)), fixed=True)

    def run_batches(self, batches: Iterable[Any]) -> FitResult:
        """Fit to minibatches, one for each step, over and over.

        Args:
            batches: What a `torch.utils.data.DataLoader` is: each iteration over it gives the minibatches of an epoch,
                as tuples or lists of the model's arguments, dictionaries of keyword arguments, or one argument.
                The model scales the likelihood to the whole data itself (`pyro.plate(name, size, len(batch))`). With
                several processes each has batches of its own.

        Raises:
            ValueError: If there are no batches; else as `run`.
        """
        return self._run(_arguments(batches), fixed=False)

    def resume(self, *args: Any, **kwargs: Any) -> FitResult:
        """Go on with the run that wrote the checkpoint, to the result that it would have had, bit for bit.

        Raises:
            ValueError: If there is no checkpoint, or one of other parameters or of another number of processes; else as
                `run`.
        """
        if self.checkpoint is None or not Ranks().from_first(self.checkpoint.exists):
            got = None if self.checkpoint is None else str(self.checkpoint)
            raise ValueError(f"checkpoint must name a file that a run has written; got {got!r}")
        return self._run(itertools.repeat((args, kwargs)), fixed=True, resume=self.checkpoint)

    def _in_stages(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FitResult | None:
        """Fit in stages, unless something that the user asked for is of a single one."""
        asked = self.learning_rate is not None or self.checkpoint is not None or not self._own_objective
        if asked or self.max_steps < _MIN_STAGED or Ranks().size > 1 or not isinstance(self.program.guide, Staged):
            return None

        before = random_state()
        try:
            if self.seed is not None:
                torch.manual_seed(self.seed)  # before the first run, which makes the guide's networks
            structure = self.program.structure(args, kwargs)
            trained = any(site["type"] == "param" for site in structure.particle.model.nodes.values())
            if structure.subsamples or trained:
                return None
            guide: Any = self.program.guide
            density = guide.density(*args, **kwargs)
            svi = copy.copy(self)
            svi.num_starts = 0
            executions: dict[str, Execution] = {}

            def fit(name: str, learning_rate: float, max_steps: int, eval_every: int, number: int) -> FitResult:
                svi.learning_rate, svi.max_steps, svi.eval_every = learning_rate, max_steps, eval_every
                svi.seed = None if self.seed is None else self.seed + number
                affordable = max(_MIN_STAGED_PARTICLES, _MAX_WORK // max(density.work, 1))
                svi.num_particles = min(self.num_particles, density.size if density.is_long else affordable)
                if density.vectorized and guide.get_posterior().has_rsample:
                    svi.objective = CoordinateELBO(guide.get_posterior, density)
                stem = name.partition(",")[0]

                def execution(*given: Any) -> Execution:
                    """What the stage before used, where this one goes on with it: its step is recorded already."""
                    return executions.get(stem) or executions.setdefault(stem, Execution(*given))

                return svi._run(itertools.repeat((args, kwargs)), fixed=True, make_execution=execution)

            return fit_in_stages(fit, self.program, density, self.num_starts, self.max_steps, args, kwargs)
        finally:
            if self.seed is not None:
                set_random_state(before)

    def _run(
        self,
        data: Iterator[Arguments],
        fixed: bool,
        resume: Path | None = None,
        make_execution: Callable[..., Execution] = Execution,
    ) -> FitResult:
        ranks = Ranks()
        before = random_state()
        try:
            ranks.seed(self.seed)
            first = next(data)
            self.program.structure(*first)  # which makes the guide's flows
            # Here the learning rate is found for the parameters as they are.
            with unpaced(self.program.guide):
                return self._fit(itertools.chain([first], data), fixed, ranks, resume, make_execution)
        finally:
            if self.seed is not None:
                set_random_state(before)

    def _fit(
        self,
        data: Iterator[Arguments],
        fixed: bool,
        ranks: Ranks,
        resume: Path | None,
        make_execution: Callable[..., Execution],
    ) -> FitResult:
        start = time.perf_counter()
        args, kwargs = next(data)
        params = self._params(args, kwargs)
        starts = None
        if self.num_starts and resume is None:
            starts = self.program.guide.warm_start(*args, num_starts=self.num_starts, **kwargs)  # type: ignore[attr-defined]
        ranks.part()
        shapes = ranks.gather([tuple(param.shape) for param in params])
        if any(other != shapes[0] for other in shapes):
            raise ValueError(f"model and guide must be the same on all processes; got parameters of shapes {shapes}")
        flat = ranks.of_first(read(params))
        write(flat, params)
        adam = GuardedAdam(self.clip_norm, self.weight_decay)
        execution = make_execution(
            self.compile, self.program, self.objective, adam, params, ranks, self.max_steps, self.eval_every
        )
        particles = ranks.share(self.num_particles)
        self.objective.start_block(self.objective.annealing_steps, math.inf, flat)
        execution.steps(State.start(flat), particles, args, kwargs, fixed)

        def advance(state: State, rates: Tensor) -> tuple[State, Tensor]:
            """Take as many steps as there are rates."""
            nonlocal args, kwargs
            values = []
            while rates.numel():
                steps = execution.steps(state, particles, args, kwargs, fixed)
                noise = max(1, particles * self.program.structure(args, kwargs).noise_dim)
                at_once = max(1, _MAX_NOISE // noise // MAX_UNROLL) * MAX_UNROLL if fixed else 1
                # Whole epochs, where there is room: the noise of their minibatches cancels in a block's average.
                subsamples = self.program.structure(args, kwargs).subsamples.values()
                epoch = max((size // part * MAX_UNROLL for size, part in subsamples), default=1)
                at_once = at_once // epoch * epoch or at_once
                now, rates = rates.tensor_split((at_once,))
                state, elbos = steps(state, now, self.program.draw(particles, args, kwargs, len(now)))
                values.append(elbos)
                args, kwargs = next(data)
            return state, torch.cat(values)

        if resume is None:
            state = State.start(flat)
            try:
                rate = self._find_rate(advance, state) if self.learning_rate is None else self.learning_rate
            finally:
                write(flat, params)
            fit = Progress(state, PlateauSchedule(rate, self.max_steps))
            fit.observe(self._evaluate(0, ranks, args, kwargs), torch.stack([flat, flat]))
        else:
            fit = Progress.load(resume, flat, ranks)
        earlier = fit.seconds
        stop_reason = ""
        hidden = not self.progress or ranks.index > 0
        try:
            with tqdm(total=fit.schedule.last_step, disable=hidden, desc="FlowSVI") as bar:
                while fit.steps < fit.schedule.last_step and not stop_reason:
                    num_steps = min(self.eval_every, fit.schedule.last_step - fit.steps)
                    self.objective.start_block(fit.steps, fit.scatter(self.num_particles), flat)
                    rates = fit.schedule.rates(fit.steps, num_steps, flat)
                    fit.state, elbos = advance(fit.state.restart_average(), rates)
                    fit.history.append(elbos)
                    fit.observe(_of_steps(fit.steps, elbos), torch.stack([fit.state.average, fit.state.params]))
                    fit.schedule.observe([e for e in fit.evaluations if e.step >= self.objective.annealing_steps])
                    fit.seconds = earlier + time.perf_counter() - start
                    if self.checkpoint is not None:
                        fit.save(self.checkpoint, ranks)
                    bar.total = fit.schedule.last_step
                    bar.update(fit.steps - bar.n)
                    bar.set_postfix_str(f"ELBO {fit.evaluations[-1].elbo:.3f}")
                    write(fit.state.params, params)
                    stops = [callback(fit.evaluations[-1]) for callback in self.callbacks]
                    if fit.state.run_skipped >= _MAX_RUN_SKIPPED:
                        stop_reason = self._blame(ranks, args, kwargs)
                    elif ranks.any(any(stops)):
                        stop_reason = f"stopped by a callback at step {fit.steps}"
        except KeyboardInterrupt:
            if ranks.size > 1:  # the others are at another step, or run on
                raise
            stop_reason = f"interrupted after step {fit.steps}"
        finally:
            write(fit.best[0], params)
        final = self._choose(fit, params, ranks, args, kwargs)
        converged = not stop_reason and fit.schedule.plateau_step is not None and math.isfinite(final.elbo)
        if converged:
            stop_reason = f"converged: the ELBO reached a plateau at step {fit.schedule.plateau_step}"
        elif not stop_reason:
            stop_reason = f"not converged: the ELBO reached no plateau within max_steps={self.max_steps}"
        return FitResult(
            elbo=final.elbo,
            elbo_mcse=final.mcse,
            converged=converged,
            stop_reason=stop_reason,
            steps=fit.steps,
            best_step=fit.best_evaluation.step,
            plateau_step=fit.schedule.plateau_step,
            num_skipped=int(fit.state.num_skipped),
            seconds=earlier + time.perf_counter() - start,
            learning_rate=fit.schedule.learning_rate,
            execution=execution.form,
            execution_reason=execution.reason,
            compile_seconds=execution.seconds,
            path_gradient=self.objective.path_gradient,
            stages=(),
            starts=starts,
            history=torch.cat([flat.new_empty(0), *fit.history]),
            evaluations=tuple(fit.evaluations),
            model=self.program.model,
            guide=self.program.guide,
            args=args if fixed else None,
            kwargs=kwargs if fixed else {},
        )

    def _find_rate(self, advance: Callable[[State, Tensor], tuple[State, Tensor]], state: State) -> float:
        """Try each learning rate from the start, and return one below that whose last steps have the highest ELBO."""
        reached = {}
        for rate in _RATES:
            rates = PlateauSchedule(rate, self.max_steps).rates(0, _TRIAL_STEPS, state.params)
            elbos = advance(state, rates)[1][_TRIAL_STEPS // 2 :]
            reached[rate] = float(elbos.mean()) if elbos.isfinite().all() else -math.inf
        return _CAUTION * max(reached, key=lambda rate: reached[rate])

    def _params(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The unconstrained tensors of every parameter that the objective touches."""
        self.program.structure(args, kwargs)
        with poutine.trace(param_only=True) as capture, torch.no_grad():
            ELBO().estimate(self.program, self.program.draw(1, args, kwargs), args, kwargs)
        params = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        params = list({id(p): p for p in params if p.requires_grad}.values())
        if not params:
            raise ValueError("neither model nor guide has a parameter to fit")
        return params

    def _choose(
        self, fit: Progress, params: Sequence[Tensor], ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Evaluation:
        """Leave the best block's average or its last state in the guide, whichever is better; return its evaluation."""
        found = []
        same = random_state()  # on the same draws and minibatches, whose noise may hide the difference
        for candidate in fit.best:
            set_random_state(same)
            write(candidate, params)
            found.append(self._evaluate(fit.best_evaluation.step, ranks, args, kwargs))
        chosen = int(found[1].elbo > found[0].elbo)
        write(fit.best[chosen], params)
        return found[chosen]

    def _evaluate(self, step: int, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
        """Evaluate on fresh draws, and on fresh minibatches where a plate is subsampled."""

        def elbo(particle: Particle) -> dict[str, Tensor]:
            return {"elbo": log_prob_sum(particle.model) - log_prob_sum(particle.guide)}

        if not self.program.structure(args, kwargs).subsamples:
            number = ranks.share(self.eval_particles)
            values = self.program.map_in_chunks(elbo, number, args, kwargs)["elbo"]
        else:
            # Draws of one minibatch share its noise: the minibatches are what is averaged.
            particles = ranks.share(self.num_particles)
            with torch.no_grad():
                number = min(self.eval_every, _MAX_EVAL_BATCHES)
                # As epochs, in which the noise of minibatches cancels.
                draws = self.program.draw(particles, args, kwargs, number)
                batches = [self.program.map(elbo, draws.step(i), args, kwargs)["elbo"] for i in range(number)]
                values = torch.stack([batch.mean() for batch in batches])
        mean = ranks.mean(values.mean())
        variance = ranks.mean((values - mean).square().mean())
        return _evaluation(step, float(mean), float(variance), ranks.size * len(values))

    def _blame(self, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Say which sites have no finite density."""

        def broken(particle: Particle) -> dict[str, Tensor]:
            sites = [site for trace in particle for site in trace.nodes.values() if site["type"] == "sample"]
            log_prob_sum(particle.model), log_prob_sum(particle.guide)
            return {site["name"]: ~torch.as_tensor(site["log_prob_sum"]).isfinite() for site in sites}

        found = self.program.map_in_chunks(broken, self.num_particles, args, kwargs)
        broken_here = [name for name, flags in found.items() if bool(flags.any())]
        # A dictionary, for its order: each name once.
        names = list(dict.fromkeys(itertools.chain(*ranks.gather(broken_here)))) or ["the gradient alone"]
        return (
            f"failed: {_MAX_RUN_SKIPPED} steps in a row had a non-finite loss or gradient; "
            f"sites without a finite density: {', '.join(names)}"
        )


def _arguments(batches: Iterable[Any]) -> Iterator[Arguments]:
    """Go through the batches again and again, each as arguments of the model."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            if isinstance(batch, Mapping):
                yield (), dict(batch)
            else:
                yield (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}
        if empty:
            raise ValueError(
                "batches must give minibatches at each iteration over it; it gave none (a generator gives them once: "
                "pass a list or a DataLoader)"
            )


def _of_steps(step: int, elbos: Tensor) -> Evaluation:
    """Evaluate by the ELBOs of steps: of the finite ones, unless these are few."""
    finite = elbos[elbos.isfinite()]
    if 2 * len(finite) < len(elbos):
        return Evaluation(step, -math.inf, math.inf)
    return _evaluation(step, float(finite.mean()), float(finite.var(correction=0)), len(finite))


def _evaluation(step: int, mean: float, variance: float, number: int) -> Evaluation:
    """Mean and standard error of independent estimates; minus infinity if one of them is not finite."""
    if not math.isfinite(mean):
        return Evaluation(step, -math.inf, math.inf)
    return Evaluation(step, mean, math.sqrt(variance / max(number - 1, 1)))
