"""Every flow and every named stack keeps the contract that `check_flow` checks."""

import signal
from collections.abc import Callable
from functools import partial

import pytest
import torch

from pyro_nf.flows import (
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    BatchNorm,
    BlockAutoregressive,
    CircularConvolution,
    ConvolutionCoupling,
    Coupling,
    DeepSigmoidal,
    Diagonal,
    ElementwiseAffine,
    Flow,
    Gated,
    Householder,
    Inverse,
    LinearIAF,
    LogisticMixture,
    LowerTriangularAffine,
    LULinear,
    Paced,
    Permutation,
    Planar,
    PReLU,
    QuadraticTriangularMap,
    Radial,
    RationalQuadraticSpline,
    Rotation,
    Sequential,
    SLog,
    Sylvester,
    SymmetricConvolution,
    stacks,
)
from pyro_nf.testing import check_flow

FLOWS: dict[str, Callable[..., Flow]] = {
    "ElementwiseAffine": ElementwiseAffine,
    "LowerTriangularAffine": LowerTriangularAffine,
    "Planar": Planar,
    "Radial": Radial,
    "Sylvester-orthogonal": Sylvester,
    "Sylvester-householder": partial(Sylvester, basis="householder"),
    "Sylvester-triangular": partial(Sylvester, basis="triangular"),
    "Householder": Householder,
    "LinearIAF": LinearIAF,
    "Coupling-affine": Coupling,
    "Coupling-additive": partial(Coupling, transformer=Additive()),
    "Coupling-gated": partial(Coupling, transformer=Gated()),
    "Coupling-spline": partial(Coupling, transformer=RationalQuadraticSpline()),
    "Coupling-logistic": partial(Coupling, transformer=LogisticMixture()),
    "Coupling-sigmoidal": partial(Coupling, transformer=DeepSigmoidal()),
    "CircularConvolution": CircularConvolution,
    "SymmetricConvolution": SymmetricConvolution,
    "ConvolutionCoupling-circular": ConvolutionCoupling,
    "ConvolutionCoupling-symmetric": partial(ConvolutionCoupling, kind="symmetric"),
    "QuadraticTriangularMap": QuadraticTriangularMap,
    "Triangular-straight": partial(QuadraticTriangularMap, quadratic=False),
    "PReLU": PReLU,
    "Diagonal": Diagonal,
    "LULinear": LULinear,
    "Rotation": Rotation,
    "ActNorm": ActNorm,
    "BatchNorm": lambda dim, context_dim: BatchNorm(dim, context_dim).eval(),
    "Paced": lambda dim, context_dim: Paced(stacks.realnvp(dim, 2, (8,), context_dim)),
    "Inverse-Planar": lambda dim, context_dim: Inverse(Planar(dim, context_dim)),
    "Sequential-mixed": lambda dim, context_dim: Sequential(
        ElementwiseAffine(dim), Permutation(range(dim)[::-1]), Radial(dim, context_dim)
    ),
}
AUTOREGRESSIVE: dict[str, Callable[..., Flow]] = {
    "affine": Autoregressive,
    "additive": partial(Autoregressive, transformer=Additive()),
    "gated": partial(Autoregressive, transformer=Gated()),
    "deep": partial(Autoregressive, transformer=Affine(), hidden_dims=(8, 12, 8)),
    "spline": partial(Autoregressive, transformer=RationalQuadraticSpline()),
}
# Their inverses are found by iteration, one coordinate after another: small sizes and few units do for every check.
ITERATED = {
    "sigmoidal": partial(Autoregressive, transformer=DeepSigmoidal(3), hidden_dims=(8,)),
    "logistic": partial(Autoregressive, transformer=LogisticMixture(3), hidden_dims=(8,)),
    "block": partial(BlockAutoregressive, units=3),
}
FEW_UNITS = {
    "naf": {"hidden_dims": (8,), "num_units": 3},
    "bnaf": {"units": 3},
    "flowpp": {"hidden_dims": (8,), "num_components": 3},
}
sizes = pytest.mark.parametrize(("dim", "context_dim"), [(d, c) for d in (1, 2, 5) for c in (0, 3)])

small_sizes = pytest.mark.parametrize(("dim", "context_dim"), [(1, 0), (2, 3), (3, 0), (3, 3)])
EVERY = FLOWS | AUTOREGRESSIVE | ITERATED


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@sizes
@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_flow(make: Callable[..., Flow], dim: int, context_dim: int) -> None:
    factory = partial(make, dim, context_dim=context_dim)
    identity = not any(isinstance(part, Permutation) for part in factory().modules()) or dim == 1
    check_flow(factory(), factory=factory, identity=identity)


@sizes
@pytest.mark.parametrize("make", AUTOREGRESSIVE.values(), ids=AUTOREGRESSIVE)
def test_autoregressive(make: Callable[..., Flow], dim: int, context_dim: int) -> None:
    factory = partial(make, dim, context_dim=context_dim)
    check_flow(factory(), factory=factory, triangular="lower")


@small_sizes
@pytest.mark.parametrize("make", ITERATED.values(), ids=ITERATED)
def test_iterated(make: Callable[..., Flow], dim: int, context_dim: int) -> None:
    factory = partial(make, dim, context_dim=context_dim)
    check_flow(factory(), factory=factory, triangular="lower")


@sizes
def test_convex_combination(dim: int, context_dim: int) -> None:
    factory = partial(LinearIAF, dim, 4 if context_dim else 1, context_dim)
    check_flow(factory(), factory=factory, triangular="lower")


@sizes
def test_slog(dim: int, context_dim: int) -> None:
    factory = partial(SLog, dim, context_dim)
    check_flow(factory(), factory=factory, reach=10.0)  # one direction is exponential


def stack(name: str, dim: int, context_dim: int, depth: int = 2) -> Flow:
    return stacks.make(name, dim, depth=depth, context_dim=context_dim, **FEW_UNITS.get(name, {}))


@small_sizes
@pytest.mark.parametrize("name", sorted({*stacks.names()} - {"naf", "bnaf"}))
def test_stack(name: str, dim: int, context_dim: int) -> None:
    factory = partial(stack, name, dim, context_dim)
    check_flow(factory(), factory=factory)


@pytest.mark.parametrize("name", ["naf", "bnaf"])
def test_iterated_stack(name: str) -> None:
    factory = partial(stack, name, 3, 3)  # of layers that `test_iterated` has at all sizes
    check_flow(factory(), factory=factory)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that end a loop")
def test_shapes_without_numbers_pass_through_in_no_time() -> None:
    makers = EVERY | {name: partial(stacks.make, name, depth=1) for name in stacks.names()}
    x = torch.empty(3, 2, device="meta")
    for name, make in makers.items():
        flow = make(dim=2, context_dim=0).to("meta")
        signal.signal(signal.SIGALRM, lambda *_, name=name: pytest.fail(f"{name} does not end"))
        signal.setitimer(signal.ITIMER_REAL, 10.0)
        try:
            for way in (flow.forward_and_log_det, flow.inverse_and_log_det):
                assert [tuple(part.shape) for part in way(x)] == [(3, 2), (3,)]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_permutation(dim: int) -> None:
    check_flow(Permutation([*range(1, dim), 0]), identity=dim == 1)


@pytest.mark.parametrize("name", stacks.names())
def test_conditioned(name: str) -> None:
    depth = 1 if name in ("naf", "bnaf") else 2
    check_flow(stack(name, 3, 4, depth).condition(torch.randn(4)))


@pytest.mark.slow  # minutes: nothing but their size differs from `test_stack`
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("name", stacks.names())
def test_wide(name: str, context_dim: int) -> None:
    dim = 8 if name in ("bnaf", "naf") else 32  # minutes, where an inverse solves for one coordinate after another
    check_flow(stacks.make(name, dim, depth=2, context_dim=context_dim))


@pytest.mark.slow  # a compilation each
@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_compiled(make: Callable[..., Flow]) -> None:
    check_flow(make(5, context_dim=3), identity=False, compile="forward")


@pytest.mark.slow  # a compilation each
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("name", stacks.names())
def test_compiled_stack(name: str, context_dim: int) -> None:
    fast = "inverse" if name == "maf" else "forward"
    check_flow(stacks.make(name, 5, depth=2, context_dim=context_dim), compile=fast)
