"""`check_flow` passes what is right, and says what is wrong with what is not."""

import re

import pytest
import torch
from pyro.distributions import transforms
from torch import Tensor, nn

from pyro_nf.flows import ElementwiseAffine, Flow, Inverse, Permutation, Planar
from pyro_nf.testing import FlowError, FlowReport, check_flow

Result = tuple[Tensor, Tensor]


class WrongLogDet(Planar):
    """Off by a constant factor, which the identity hides."""

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        y, log_det = super().forward_and_log_det(x, context)
        return y, 1.01 * log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Result:
        x, log_det = super().inverse_and_log_det(y, context)
        return x, 1.01 * log_det


class LostMass(ElementwiseAffine):
    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Result:
        x, log_det = super().inverse_and_log_det(y, context)
        return x, log_det - 0.01


class OffInverse(ElementwiseAffine):
    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Result:
        x, log_det = super().inverse_and_log_det(y, context)
        return x + 1e-6, log_det


class Unregistered(ElementwiseAffine):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.shift = [torch.zeros(dim, requires_grad=True)]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        y, log_det = super().forward_and_log_det(x, context)
        return y + self.shift[0], log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Result:
        return super().inverse_and_log_det(y - self.shift[0], context)


class Idle(ElementwiseAffine):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.forgotten = nn.Parameter(torch.zeros(2))


class Caching(ElementwiseAffine):
    last: tuple[Tensor, Result] | None = None

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        if self.last is None or self.last[0] is not x:
            self.last = x, super().forward_and_log_det(x, context)
        return self.last[1]


class ScalarLogDet(ElementwiseAffine):
    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det.flatten()[0] if log_det.numel() else log_det.sum()


class Bounded(Flow):
    """Onto (-1, 1)^n only."""

    def __init__(self, dim: int) -> None:
        super().__init__((dim,))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        return x.tanh(), -2 * x.cosh().log().sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Result:
        return y.atanh(), -(1 - y**2).log().sum(-1)


class DetachedLogDet(ElementwiseAffine):
    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det.detach()


class DoubleLogDet(ElementwiseAffine):
    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det.double()


class Mixing(ElementwiseAffine):
    """Points of a batch change one another, as in batch normalization."""

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        y, log_det = super().forward_and_log_det(x, context)
        return y + y.detach().flatten()[:1].sum(), log_det


class Branching(ElementwiseAffine):
    """Python control flow that depends on data."""

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        if bool((x > 1e9).any()):
            raise ValueError("too large")
        return super().forward_and_log_det(x, context)


class NanGradient(ElementwiseAffine):
    """The norm's derivative at 0, behind a `where`."""

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Result:
        y, log_det = super().forward_and_log_det(x, context)
        root = (x**2).sum(-1, keepdim=True).sqrt()
        return y + 0 * torch.where(root > 0, root, torch.zeros_like(root)), log_det


BROKEN = [
    (WrongLogDet, "forward log-det differs from autograd's", "~ N(0, 1^2)"),
    (WrongLogDet, "inverse log-det differs from autograd's", "~ N(0, 5^2)"),
    (OffInverse, "forward round trip misses the start: ", "as they came"),
    (OffInverse, "inverse round trip misses the start: ", "~ N(0, 5^2)"),
    (OffInverse, "joint score differs from the score of the draw", ""),
    (Unregistered, "parameters fail: a tensor of shape (3,) requires grad, but is not registered", ""),
    (Idle, "parameters fail: of no influence on point and log-det are forgotten", ""),
    (Caching, "forward cache differs from a fresh copy", ""),
    (ScalarLogDet, "forward log-det must have shape (18,); got ()", ""),
    (ScalarLogDet, "forward shapes are wrong: points (1, 3) give (1, 3), log-det ()", ""),
    (Bounded, "inverse log-det is not finite", "as they came"),
    (Bounded, "inverse round trip is not finite", ""),
    (Bounded, "inverse precision fails: point is not finite in torch.float64", ""),
    (DetachedLogDet, "forward gradcheck fails: Jacobian mismatch for output 0 with respect to params.log_scale (", ""),
    (DoubleLogDet, "forward precision fails: log-det is torch.float64", ""),
    (Mixing, "forward shapes differ from one point after another", ""),
    (Branching, "forward vmap raises RuntimeError", ""),
    (NanGradient, "forward precision fails: gradient to points is not finite", ""),
]


def failures(flow: nn.Module, **options: object) -> str:
    torch.manual_seed(0)
    with pytest.raises(FlowError) as caught:
        check_flow(flow, **options)
    assert all(sentence in str(caught.value) for sentence in caught.value.report.failures)
    return str(caught.value)


@pytest.mark.parametrize(("make", "sentence", "setting"), BROKEN)
def test_broken_flow_is_told(make: type[Flow], sentence: str, setting: str) -> None:
    told = [line for line in failures(make(3), identity=make is not Bounded).splitlines() if sentence in line]
    assert any(setting in line for line in told)


@pytest.mark.parametrize(
    ("make", "alone"),
    [
        (WrongLogDet, "(forward|inverse) log-det "),
        (Unregistered, "parameters "),
        (Idle, "parameters "),
        (DetachedLogDet, "forward gradcheck "),
        (DoubleLogDet, "forward precision "),
        (Branching, "forward vmap "),
        (NanGradient, "forward (log-det|precision) "),
    ],
)
def test_nothing_else_is_told(make: type[Flow], alone: str) -> None:
    _, *lines = failures(make(3)).splitlines()
    assert all(re.match(rf"\s+{alone}", line) for line in lines), lines


def test_error_hidden_by_the_identity_shows_only_at_other_parameters() -> None:
    assert "as they came" not in failures(WrongLogDet(3))


def test_missing_mass_is_told() -> None:
    assert "density has an integral off 1: 1.0e-02, allowed 5e-03" in failures(LostMass(2))


def test_size_of_the_error_is_told() -> None:
    message = failures(OffInverse(3))
    assert "1.0e-06, allowed 1e-08" in message


def test_identity_is_an_option() -> None:
    flow = ElementwiseAffine(2, scale=2.0)
    assert "identity is missed" in failures(flow)
    assert check_flow(flow, identity=False).failures == ()


def test_triangular_is_told() -> None:
    assert "Jacobian is not lower triangular" in failures(Permutation([1, 0]), identity=False, triangular="lower")


def test_other_architecture_is_told() -> None:
    assert "copies raises RuntimeError: Error(s) in loading state_dict" in failures(
        Planar(3), factory=lambda: Planar(4)
    )


def test_pyro_planar_has_no_inverse_and_a_cache() -> None:
    message = failures(transforms.Planar(3), identity=False)
    assert "inverse log-det raises KeyError" in message
    assert "forward cache differs from a fresh copy" in message
    assert "copies raises RuntimeError: Only Tensors created explicitly by the user" in message
    assert "forward log-det" not in message


def test_pyro_sylvester_has_a_wrong_log_det() -> None:
    message = failures(transforms.Sylvester(4), identity=False)
    assert re.search(r"forward log-det differs from autograd's: \d\.\de-01, .* N\(0, 1\^2\)", message)


def test_transform_of_torch_style_can_pass() -> None:
    report = check_flow(transforms.Permute(torch.tensor([1, 2, 0])), event_shape=(3,), identity=False)
    assert report.figures["inverse round trip"] == 0.0


def test_event_shape_must_be_known() -> None:
    with pytest.raises(ValueError, match="event_shape of a Permute must have 1 sizes; got None"):
        check_flow(transforms.Permute(torch.tensor([1, 0])))


def test_flow_and_random_state_stay_as_they_are() -> None:
    flow = Inverse(Planar(2, context_dim=1))
    state = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    random_state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with torch.no_grad():
        check_flow(flow)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_default_dtype() == dtype
    for name, tensor in flow.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name])
    assert all(p.grad is None for p in flow.parameters())


def test_report_is_the_same_for_the_same_seed() -> None:
    torch.manual_seed(0)
    flow = Planar(2)
    one, two, other = (check_flow(flow, seed=seed) for seed in (1, 1, 2))
    assert one == two != other


def test_report_is_a_table() -> None:
    report = check_flow(Planar(2))
    assert isinstance(report, FlowReport)
    assert report.failures == ()
    assert all(report.figures[name] <= report.limits[name] for name in report.figures)
    first, *rows = str(report).splitlines()
    assert first == "Planar"
    assert len(rows) == len(report.figures) + len(report.passed)
