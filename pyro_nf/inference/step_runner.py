"""The steps of a fit, taken in blocks, for as long as the watch lets them."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nf.inference.checkpoint import Progress
from pyro_nf.inference.optim import State
from pyro_nf.inference.step_compiler import StepCompiler, Steps
from pyro_nf.inference.steps import MAX_UNROLL
from pyro_nf.inference.watch import Watch
from pyro_nf.programs.program import BoundProgram, Randomness

# Normals that are drawn at once, for many steps of a small model.
_MAX_NOISE = 2**22


@dataclass
class StepRunner:
    """The steps of a fit: takes as many as are asked for, unless the watch ends them.

    Attributes:
        compiler: Makes the steps.
        particles: Draws a step.
        data: Model and guide with the arguments of the steps after this one.
        program: Those of this one.
        fixed: Whether these are the same all through.
        watch: Looked at between steps.
    """

    compiler: StepCompiler
    particles: int
    data: Iterator[BoundProgram]
    program: BoundProgram
    fixed: bool
    watch: Watch
    _pace: int = MAX_UNROLL

    def prepare(self, state: State, check: bool = False) -> Steps:
        """Return the step for the present data; before it is needed, it is prepared where a seed wants it to be."""
        return self.compiler.steps(state, self.particles, self.program, self.fixed, check)

    def changed(self, state: State) -> str:
        """Say how the plain step differs from the one that was taken, if it does."""
        if not self.fixed:
            return ""  # compared as batches come
        return self.compiler.changed(state, self.particles, self.program)

    def take(self, state: State, rates: Tensor, check: bool, fit: Progress | None, name: str) -> tuple[State, Tensor]:
        """Take as many steps as there are rates, or as time allows; return the state and the ELBOs."""
        values: list[Tensor] = []
        total = len(rates)
        while rates.numel() and self._goes_on(values, total, fit, name):
            steps = self.prepare(state, check)
            check = False
            spec = self.program.spec
            noise = max(1, self.particles * spec.noise_dim)
            at_once = max(1, _MAX_NOISE // noise // MAX_UNROLL) * MAX_UNROLL if self.fixed else 1
            # Whole epochs, where there is room: the noise of their minibatches cancels in a block's average.
            epoch = max((size // part * MAX_UNROLL for size, part in spec.subsamples.values()), default=1)
            at_once = at_once // epoch * epoch or at_once
            now, rates = rates.tensor_split((at_once,))
            draws = self.program.draw(self.particles, len(now))
            state, elbos = self._some(steps, state, now, draws)
            values.append(elbos)
            if len(elbos) < len(now):
                break
            self.program = next(self.data)
        return state, torch.cat([rates.new_empty(0), *values])

    def _goes_on(self, values: list[Tensor], total: int, fit: Progress | None, name: str) -> bool:
        if self.compiler.ranks.size > 1:  # which look at their clocks between blocks, together
            return True
        if fit is None:
            return self.watch.report(name, sum(map(len, values)), total, math.nan)
        done = fit.steps + sum(map(len, values))
        return self.watch.report(name, done, fit.schedule.last_step, fit.evaluations[-1].elbo)

    def _some(self, steps: Steps, state: State, rates: Tensor, draws: Randomness) -> tuple[State, Tensor]:
        """Take steps, in parts between which the watch is looked at: results are the same in whatever parts."""
        if self.compiler.ranks.size > 1:
            return steps(state, rates, draws)
        values: list[Tensor] = []
        done = 0
        while done < len(rates) and (not done or self.watch.ended is None):
            begin = time.perf_counter()
            part = slice(done, done + self._pace)
            indices = {name: rows[part] for name, rows in draws.indices.items()}
            state, elbos = steps(state, rates[part], Randomness(draws.noise[part], indices))
            values.append(elbos)
            done += len(elbos)
            self._pace = self.watch.num_steps(len(elbos), time.perf_counter() - begin, MAX_UNROLL)
        return state, torch.cat(values)
