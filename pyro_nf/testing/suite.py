"""`check_flow`: a conformance suite for any flow, and for any torch or Pyro transform of R^n with parameters."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pyro.distributions import TransformModule

from pyro_nf.interface.arguments import Positive, check_has, checked
from pyro_nf.testing import cases, checks

# The parameters at which most checks run.
_EVERY = (cases.INITIAL, cases.RANDOM, cases.WILD)


@dataclass(frozen=True)
class FlowReport:
    """What `check_flow` measured.

    Args:
        flow: Name of the flow's class.
        figures: The largest error that each check saw; NaN where there was none to compute.
        limits: The limit of each error.
        passed: The checks without a figure that found nothing wrong.
        failures: A sentence for each failure; empty if the flow keeps its contract.
    """

    flow: str
    figures: dict[str, float]
    limits: dict[str, float]
    passed: tuple[str, ...]
    failures: tuple[str, ...]

    def __str__(self) -> str:
        """Return a table of the figures, and the failures below it."""
        rows = [f"  {name:<20} {self.figures[name]:8.1e}  (limit {self.limits[name]:.0e})" for name in self.figures]
        rows += [f"  {name:<20} {'passed':>8}" for name in self.passed]
        return "\n".join([self.flow, *rows, *self.failures])


class FlowError(AssertionError):
    """A flow breaks its contract: the message has a sentence for each failure, `report` all figures."""

    def __init__(self, report: FlowReport) -> None:
        super().__init__("\n  ".join([f"{report.flow} breaks its contract:", *report.failures]))
        self.report = report


@checked
def check_flow(
    flow: Any,
    *,
    event_shape: tuple[int, ...] | None = None,
    identity: bool = True,
    triangular: Literal["lower", "upper"] | None = None,
    factory: Callable[[], TransformModule] | None = None,
    compile: Literal["forward", "inverse"] | None = None,  # noqa: A002 - as torch calls it
    reach: Positive = 1000.0,
    seed: int = 0,
) -> FlowReport:
    r"""Check that a flow keeps its contract, and say where it does not.

    The flow is copied, so that it stays as it is; so does the global random state. The checks run at the parameters as
    they came, at parameters `~ N(0, 1)` and `~ N(0, 5^2)`; at standard normal points, the same times 10, 100 and 1000,
    zero, and every parameter that has the shape of a point (the centre of a radial flow); in both directions:

    - log-determinants are those of autograd's Jacobian, and cancel in a round trip;
    - `f(f^{-1}(y)) = y` and `f^{-1}(f(x)) = x`; the joint score of a draw is the score of this draw;
    - values and gradients are finite in float64 and, except at N(0, 5^2), in float32; gradients agree with finite
      differences; in 1 and 2 dimensions the density integrates to 1;
    - dtype, device and batch shape are kept, contexts broadcast, `vmap` gives the same;
    - parameters are registered and of influence; there is no cache; copies and pickles give the same; torch's and
      Pyro's `TransformedDistribution` can score any point.

    Args:
        flow: A `Flow`, or another transform module with domain and codomain R^n.
        event_shape: Shape of one point; `None` to ask the flow (`event_shape`, or Pyro's `input_dim`).
        identity: Whether the flow is the identity at the parameters as they came.
        triangular: Shape of the Jacobian, for autoregressive flows.
        factory: Makes another flow of this architecture, into which the `state_dict` has to load.
        compile: Direction that `torch.compile(fullgraph=True)` has to leave unchanged; takes a while.
        reach: Largest of 10, 100 and 1000 by which points are multiplied; less for a flow that grows exponentially.
        seed: Seed of points and parameters.

    Returns:
        The largest error that each check saw.

    Raises:
        FlowError: If a check fails, after all have run.
        ValueError: If the shape of a point is not known.

    Example:
        >>> from pyro_nf.testing import check_flow
        >>> from pyro_nf.flows import Planar
        >>> check_flow(Planar(3)).failures
        ()
    """
    check_has("flow", flow, ("domain", "log_abs_det_jacobian"), "a flow, or a transform of torch or Pyro")
    if event_shape is None:
        width: Any = getattr(flow, "input_dim", None)
        event_shape = getattr(flow, "event_shape", None if width is None else (width,))
    if event_shape is None or len(event_shape) != flow.domain.event_dim:
        raise ValueError(
            f"event_shape of a {type(flow).__name__} must have {flow.domain.event_dim} sizes; got {event_shape}"
        )
    plan = _plan(math.prod(event_shape), identity, triangular, factory, compile)
    figures: dict[str, float] = {}
    failures: dict[str, list[str]] = defaultdict(list)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
        tried = {scale: cases.Case.make(flow, event_shape, scale, seed, reach) for scale in (*_EVERY, cases.MODERATE)}
        for check in plan:
            for case in map(tried.__getitem__, check.scales):
                figure, failure = check.run(case)
                if figure is not None:
                    figures[check.name] = cases.largest([figures.get(check.name, 0.0), figure])
                if failure is not None:
                    failures[f"{check.name} {failure}"].append(case.name)
    sentences = tuple(f"{failure} (parameters {', '.join(names)})" for failure, names in failures.items())
    limits = {check.name: check.limit for check in plan if check.name in figures}
    quiet = (check.name for check in plan if check.name not in figures)
    passed = tuple(name for name in quiet if not any(failure.startswith(name) for failure in failures))
    report = FlowReport(type(flow).__name__, figures, limits, passed, sentences)
    if failures:
        raise FlowError(report)
    return report


def _plan(
    size: int,
    identity: bool,
    triangular: str | None,
    factory: Callable[[], TransformModule] | None,
    compile: str | None,  # noqa: A002 - as torch calls it
) -> list[cases.Check]:
    """Return the checks of a flow over so many numbers."""
    plan = []
    for name, inverse in (("forward", False), ("inverse", True)):
        plan += [
            cases.Check(f"{name} log-det", "differs from autograd's", partial(checks.log_det, inverse=inverse), _EVERY),
            cases.Check(f"{name} round trip", "misses the start", partial(checks.round_trip, inverse=inverse), _EVERY),
            cases.Check(f"{name} precision", "", partial(checks.precision, inverse=inverse), _EVERY),
            cases.Check(f"{name} gradcheck", "", partial(checks.gradcheck, inverse=inverse)),
            cases.Check(
                f"{name} shapes", "differ from one point after another", partial(checks.shapes, inverse=inverse)
            ),
            cases.Check(f"{name} cache", "differs from a fresh copy", partial(checks.cache, inverse=inverse)),
            cases.Check(
                f"{name} vmap",
                "differs from the batch",
                partial(checks.transformed, inverse=inverse, by=torch.func.vmap),
            ),
        ]
    plan += [
        cases.Check("sum of log-dets", "of both directions is not 0", checks.cancel, _EVERY),
        cases.Check("joint score", "differs from the score of the draw", checks.joint_score, _EVERY),
        cases.Check("pushed score", "differs from autograd's", checks.pushed_score, (cases.MODERATE,)),
        cases.Check("parameters", "", checks.parameters, (cases.MODERATE,)),
        cases.Check("copies", "differ from the original", partial(checks.copies, factory=factory), limit=0.0),
        cases.Check("distributions", "of torch and Pyro score differently", checks.distributions),
    ]
    if size <= 2:
        plan.append(
            cases.Check(
                "density", "has an integral off 1", checks.integral, (cases.MODERATE,), cases.INTEGRAL_TOLERANCE
            )
        )
    if identity:
        plan.append(cases.Check("identity", "is missed", checks.identity, (cases.INITIAL,)))
    if triangular is not None:
        fault = f"is not {triangular} triangular"
        plan.append(cases.Check("Jacobian", fault, partial(checks.triangular, kind=triangular), limit=0.0))
    if compile is not None:
        compiled = partial(checks.transformed, inverse=compile == "inverse", by=checks.compiled)
        plan.append(cases.Check(f"{compile} compile", "differs from the plain call", compiled))
    return plan
