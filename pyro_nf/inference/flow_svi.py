"""FlowSVI: fit a guide, stop when it is done, keep the best."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nf.inference.graph import MIN_STEPS_TO_RECORD, GraphError, GraphStep, State, Step
from pyro_nf.inference.optim import GuardedAdam
from pyro_nf.inference.result import Evaluation, FitResult
from pyro_nf.inference.schedule import PlateauSchedule
from pyro_nf.objectives import ELBO
from pyro_nf.tracing import Particle, Program, log_prob_sum

# Non-finite steps in a row that end a run: by then no draw of the guide has a density that can be used.
_MAX_RUN_SKIPPED = 100


class FlowSVI:
    """Stochastic variational inference that stops by itself, for any Pyro guide with reparametrised draws.

    Each step takes the gradient of the objective over `num_particles` draws, batched by `vmap`, and updates all
    parameters of model and guide by Adam with clipping; a step with a non-finite loss or gradient changes nothing and
    is counted. Every `eval_every` steps the ELBO is evaluated on fresh draws (where a plate is subsampled, by the mean
    over the minibatches since the last evaluation): the best state is kept, and a plateau starts the cool-down that
    ends the run.

    Args:
        model: A Pyro model.
        guide: A Pyro guide: ours, Pyro's, or hand-written.
        objective: What to maximise; `None` for `ELBO()`.
        num_particles: Draws a step. Many fit better and cost a small model little; where each draw runs a network over
            a minibatch, take a few.
        learning_rate: Adam's rate between warm-up and cool-down.
        max_steps: Upper bound of the run.
        eval_every: Steps between evaluations.
        eval_particles: Draws of an evaluation.
        clip_norm: Largest norm of the gradient.
        compile: Whether to record a step as a graph of tensor operations and compile it, which takes from ten seconds
            to minutes and makes small models many times faster: pays where steps are many. It is compared with the
            plain step first; where that fails, or the model cannot be recorded, a warning says why and the run goes on
            without. "auto" does as much of it as pays within `max_steps`, by an estimate.
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
        learning_rate: float = 1e-2,
        max_steps: int = 10_000,
        eval_every: int = 100,
        eval_particles: int = 1000,
        clip_norm: float = 10.0,
        compile: bool | Literal["auto"] = False,  # noqa: A002 - as torch calls it
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        numbers = {
            "num_particles": num_particles,
            "learning_rate": learning_rate,
            "max_steps": max_steps,
            "eval_every": eval_every,
            "eval_particles": eval_particles,
            "clip_norm": clip_norm,
        }
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value!r}")
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto'; got {compile!r}")
        self.compile = compile
        self.program = Program(model, guide)
        self.objective = ELBO() if objective is None else objective
        self.num_particles, self.learning_rate, self.max_steps = num_particles, learning_rate, max_steps
        self.eval_every, self.eval_particles, self.clip_norm = eval_every, eval_particles, clip_norm
        self.seed, self.progress = seed, progress

    def run(self, *args: Any, **kwargs: Any) -> FitResult:
        """Fit to the model's arguments, from the guide's present state, and leave the best state in the guide.

        Raises:
            ValueError: If the pair cannot be fitted by reparametrised draws, or the data hold NaN.
        """
        with torch.random.fork_rng() if self.seed is not None else nullcontext():
            if self.seed is not None:
                torch.manual_seed(self.seed)
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FitResult:
        start = time.perf_counter()
        params = self._params(args, kwargs)
        adam = GuardedAdam(params, self.clip_norm)
        step, execution = self._prepare(adam, args, kwargs)
        compile_seconds = time.perf_counter() - start
        schedule = PlateauSchedule(self.learning_rate, self.max_steps)
        history: list[Tensor] = []
        evaluations = [self._evaluate(0, args, kwargs)]
        best, best_state = evaluations[0], [p.detach().clone() for p in params]
        stop_reason = ""
        with tqdm(total=self.max_steps, disable=not self.progress, desc="FlowSVI") as bar:
            while len(history) < schedule.last_step:
                rate = torch.tensor(schedule.rate(len(history)), dtype=params[0].dtype, device=params[0].device)
                adam.state, elbo = step(adam.state, rate)
                history.append(elbo)
                if len(history) % self.eval_every and len(history) < schedule.last_step:
                    continue
                evaluations.append(self._watch(history, args, kwargs))
                if not best.elbo >= evaluations[-1].elbo:
                    best, best_state = evaluations[-1], [p.detach().clone() for p in params]
                schedule.observe(evaluations)
                bar.total = schedule.last_step
                bar.update(len(history) - bar.n)
                bar.set_postfix_str(f"ELBO {evaluations[-1].elbo:.3f}")
                if int(adam.run_skipped) >= _MAX_RUN_SKIPPED:
                    stop_reason = self._blame(args, kwargs)
                    break
        with torch.no_grad():
            for param, value in zip(params, best_state, strict=True):
                param.copy_(value)
        final = self._evaluate(best.step, args, kwargs)
        converged = not stop_reason and schedule.plateau_step is not None and math.isfinite(final.elbo)
        if converged:
            stop_reason = f"converged: the ELBO reached a plateau at step {schedule.plateau_step}"
        elif not stop_reason:
            stop_reason = f"not converged: the ELBO reached no plateau within max_steps={self.max_steps}"
        return FitResult(
            elbo=final.elbo,
            elbo_mcse=final.mcse,
            converged=converged,
            stop_reason=stop_reason,
            steps=len(history),
            best_step=best.step,
            num_skipped=int(adam.num_skipped),
            seconds=time.perf_counter() - start,
            execution=execution,
            compile_seconds=compile_seconds,
            history=torch.stack(history),
            evaluations=tuple(evaluations),
        )

    def _prepare(self, adam: GuardedAdam, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Step, str]:
        """Return the step in the form that the run takes, and which form that is."""

        def plain(state: State, learning_rate: Tensor) -> tuple[State, Tensor]:
            adam.state = state
            elbo, surrogate = self.objective.estimate(self.program, self.num_particles, args, kwargs)
            grads = torch.autograd.grad(-surrogate, adam.params, allow_unused=True, materialize_grads=True)
            adam.step(elbo, grads, learning_rate)
            return adam.state, elbo

        if self.compile is False:
            return plain, "plain"
        state = adam.state
        rate = torch.tensor(self.learning_rate, dtype=adam.params[0].dtype, device=adam.params[0].device)
        form: tuple[Step, str] = plain, "plain"
        vectorized = self.program.vectorized
        try:
            if self.compile == "auto" and self.max_steps < MIN_STEPS_TO_RECORD:
                return form
            graph = GraphStep(plain, adam.params, state, rate)
            if not self.program.vectorized:
                raise GraphError("the model cannot be batched over draws")
            graph.verify()
            form = graph, "recorded"
            if self.compile == "auto" and not graph.pays_to_compile(self.max_steps):
                return form
            graph.compile()
            graph.verify()
            form = graph, "compiled"
        except GraphError as error:
            warnings.warn(f"the step runs {form[1]}, not compiled: {error}", stacklevel=4)
        finally:
            adam.state = state
            self.program.vectorized = vectorized  # what recording could not batch, a plain step can
        return form

    def _params(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The unconstrained tensors of every parameter that the objective touches."""
        self.program.structure(args, kwargs)
        with poutine.trace(param_only=True) as capture, torch.no_grad():
            self.objective.estimate(self.program, 1, args, kwargs)
        params = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        params = list({id(p): p for p in params if p.requires_grad}.values())
        if not params:
            raise ValueError("neither model nor guide has a parameter to fit")
        return params

    def _watch(self, history: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
        """Evaluate on the way: on fresh draws or, where data are subsampled, by the minibatches of late steps."""
        if self.program.structure(args, kwargs).subsamples:
            return _evaluation(len(history), torch.stack(history[-self.eval_every :]))
        return self._evaluate(len(history), args, kwargs)

    def _evaluate(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
        def elbo(particle: Particle) -> dict[str, Tensor]:
            return {"elbo": log_prob_sum(particle.model) - log_prob_sum(particle.guide)}

        if not self.program.structure(args, kwargs).subsamples:
            return _evaluation(step, self.program.map_in_chunks(elbo, self.eval_particles, args, kwargs)["elbo"])
        # Draws of one minibatch share its noise: the minibatches are what is averaged.
        with torch.no_grad():
            batches = [self.program.map(elbo, self.num_particles, args, kwargs) for _ in range(self.eval_every)]
        return _evaluation(step, torch.stack([batch["elbo"].mean() for batch in batches]))

    def _blame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Say which sites have no finite density."""

        def broken(particle: Particle) -> dict[str, Tensor]:
            sites = [site for trace in particle for site in trace.nodes.values() if site["type"] == "sample"]
            log_prob_sum(particle.model), log_prob_sum(particle.guide)
            return {site["name"]: ~torch.as_tensor(site["log_prob_sum"]).isfinite() for site in sites}

        found = self.program.map_in_chunks(broken, self.num_particles, args, kwargs)
        names = [name for name, flags in found.items() if bool(flags.any())] or ["the gradient alone"]
        return (
            f"failed: {_MAX_RUN_SKIPPED} steps in a row had a non-finite loss or gradient; "
            f"sites without a finite density: {', '.join(names)}"
        )


def _evaluation(step: int, values: Tensor) -> Evaluation:
    """Mean and standard error of independent estimates; minus infinity if one of them is not finite."""
    mean, sd = float(values.mean()), float(values.std())
    return Evaluation(step, mean if math.isfinite(mean) else -math.inf, sd / math.sqrt(len(values)))
