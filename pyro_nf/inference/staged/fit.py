"""The staged fit of a guide: its density, the chain of stages, and the guide that takes the best of them over."""

import dataclasses
import itertools
import math
from typing import Any

import torch

from pyro_nf.approximations.approximation import Approximation
from pyro_nf.approximations.density import Density
from pyro_nf.approximations.improper import flat_directions
from pyro_nf.approximations.pairs import paired_density
from pyro_nf.inference.checkpoint import random_state, set_random_state
from pyro_nf.inference.elbo import ELBO, CoordinateELBO
from pyro_nf.inference.evaluation import checked_spec, notes, warn_of_nothing_observed
from pyro_nf.inference.loop import StepFit
from pyro_nf.inference.options import StepOptions
from pyro_nf.inference.result import FitResult, Status
from pyro_nf.inference.staged.chain import Chain
from pyro_nf.inference.staged.guide import StagedGuide
from pyro_nf.inference.staged.plan import DEFAULT, Plan
from pyro_nf.inference.staged.stage import Problem, StepPlan
from pyro_nf.inference.step_compiler import StepCompiler
from pyro_nf.inference.watch import Watch
from pyro_nf.interface.waits import silent
from pyro_nf.programs.coordinates import names_of
from pyro_nf.programs.program import BoundProgram

# Coordinates up to which there are stages: they need whole matrices of them.
_MAX_DIM = 1000
# Coordinates up to which directions are looked for along which a posterior is improper.
_MAX_IMPROPER_DIM = 500
# Starting points from which modes are looked for, unless others are asked for.
_NUM_STARTS = 8
# Numbers that the model makes in a step, at most, and draws that are taken in any case.
_MAX_WORK, _MIN_PARTICLES = 2**23, 64


def fit_in_stages(
    program: BoundProgram, guide: StagedGuide, options: StepOptions, watch: Watch, plan: Plan = DEFAULT
) -> FitResult | None:
    """Fit a guide in stages, and leave the best of them in it.

    Args:
        program: The model that is fitted, the guide, and their arguments.
        guide: The guide.
        options: Those of its fits by steps; rate, steps and the like are the stages' own.
        watch: What is shown and heeded on the way.
        plan: The stages.

    Returns:
        The account of all stages, or `None` where there can be none: parameters of the model's own, subsampled plates,
        a model that is random itself, too many coordinates, or a guide that was fitted before.
    """
    before = random_state()
    try:
        if options.seed is not None:
            torch.manual_seed(options.seed)  # before the first run, which makes the guide's networks
        spec = checked_spec(program)
        trained = any(site["type"] == "param" for site in spec.traces.model.nodes.values())
        if spec.subsamples or trained or program.own_randomness():
            return None
        program.check_data()
        warn_of_nothing_observed(program)
        density, improper = _proper_density(program, guide)
        start = guide.approximation()
        points = start.base().sample((10,))
        if start.dim > _MAX_DIM or not torch.equal(start.network(points), points):
            return None
        start = dataclasses.replace(start, has_network=False)
        result = _run(program, guide, options, watch, plan, density, start)
        return dataclasses.replace(result, notes=(*notes(program), *improper))
    finally:
        if options.seed is not None:
            set_random_state(before)


def _run(
    program: BoundProgram,
    guide: StagedGuide,
    options: StepOptions,
    watch: Watch,
    plan: Plan,
    density: Density,
    start: Approximation,
) -> FitResult:
    """Go through the stages, and leave the best in the guide, also where one raises."""
    train = _Trainer(program, guide, options, watch, density)
    problem = Problem(density, train, options.num_starts or _NUM_STARTS, silent)
    chain = Chain(problem, start, _blank(program), options.max_steps, options.num_particles, watch, guide.take_over)
    try:
        return chain.run(plan)
    finally:
        guide.take_over(dataclasses.replace(chain.best.fitted.approximation, has_network=True))


class _Trainer:
    """Fits an approximation by steps of the guide that holds it.

    Args:
        program: Model, guide and their arguments.
        guide: The guide.
        options: Of its fits by steps, as far as they are not a stage's own.
        watch: What is shown and heeded on the way.
        density: The model's over the guide's coordinates.
    """

    def __init__(
        self, program: BoundProgram, guide: StagedGuide, options: StepOptions, watch: Watch, density: Density
    ) -> None:
        self._program, self._guide, self._options, self._watch, self._density = program, guide, options, watch, density
        self._compilers: dict[str, StepCompiler] = {}

    def __call__(
        self, approximation: Approximation, plan: StepPlan, number: int = 0, steps_before: int = 0
    ) -> tuple[Approximation, FitResult]:
        """Take the steps of a plan, and return what they have come to and their account.

        Args:
            approximation: Where to begin.
            plan: What to do.
            number: How many stages went before: each has a seed of its own.
            steps_before: How many steps they took, of those that all may take together.
        """
        self._guide.take_over(approximation)
        density, options = self._density, self._options
        affordable = max(_MIN_PARTICLES, _MAX_WORK // max(density.work, 1))
        known = self._compilers.get(plan.graph)
        options = dataclasses.replace(
            options,
            objective=self._objective() if known is None else known.objective,
            learning_rate=plan.learning_rate,
            max_steps=min(plan.max_steps, options.max_steps - steps_before),
            eval_every=plan.eval_every,
            seed=None if options.seed is None else options.seed + number,
            num_particles=min(options.num_particles, density.size if density.is_long else affordable),
            num_starts=0,
        )

        def compiler(*given: Any) -> StepCompiler:
            """What the stage before used, where this one goes on with it: its step is recorded already."""
            found = StepCompiler(*given) if known is None else known.continued(options.max_steps, options.eval_every)
            self._compilers[plan.graph] = found
            return found

        data = itertools.repeat(self._program)
        watch = self._watch.after(steps_before)
        fit = StepFit(
            self._program.program, data, options, watch, name=plan.name, is_stage=True, make_compiler=compiler
        )
        account = fit.run()
        return dataclasses.replace(self._guide.approximation(), has_network=approximation.has_network), account

    def _objective(self) -> ELBO:
        """The ELBO by batched passes of both densities where they can be had, or else draw by draw through Pyro."""
        if self._density.vectorized and self._guide.get_posterior().has_rsample:
            return CoordinateELBO(self._guide.get_posterior, self._density)
        return self._options.objective


def _proper_density(program: BoundProgram, guide: StagedGuide) -> tuple[Density, list[str]]:
    """Return the density that stages fit, and a sentence if it is one only once improper directions are left out.

    Along these the guide gets a standard normal; along all others it is fitted to the posterior.
    """
    density = paired_density(program)
    with torch.random.fork_rng(), torch.no_grad():
        posterior = guide.get_posterior()
        dim = posterior.event_shape[0]
        if dim > _MAX_IMPROPER_DIM:
            return density, []
        found = flat_directions(density.gradients, posterior.sample((2 * dim + 10,)))
    if not found:
        return density, []
    proper = Density(found.made_proper(density.log_density), program.num_numbers)
    return proper, [found.describe(names_of(guide.latent_sites()))]


def _blank(program: BoundProgram) -> FitResult:
    """The account of natural gradients, before the first of them."""
    return FitResult(
        elbo=-math.inf,
        elbo_mcse=math.inf,
        status=Status.PLATEAU_NOT_REACHED,
        stop_reason="",
        notes=(),
        steps=0,
        best_step=0,
        plateau_step=None,
        num_skipped=0,
        seconds=0.0,
        learning_rate=math.nan,
        execution="recorded",
        execution_reason="a normal is fitted by natural gradients",
        compile_seconds=0.0,
        path_gradient=True,
        stages=(),
        starts=None,
        history=torch.empty(0),
        evaluations=(),
        model=program.program.model,
        guide=program.program.guide,
        args=program.args,
        kwargs=program.kwargs,
    )
