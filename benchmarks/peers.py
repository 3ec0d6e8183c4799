"""Flows of other libraries behind one interface: `flows(library)` is a dictionary, name -> make(dim, hidden_dims).

Networks have the same architecture everywhere: an MLP with these hidden layers and tanh; splines have 8 bins on
[-5, 5]. `forward` is the direction that costs one pass. Libraries are imported when asked for.
"""

from functools import partial

import pyro.distributions.transforms as T
import torch
from pyro.distributions import TransformModule
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import nn

from pyro_nf.flows import Flow
from pyro_nf.networks import MLP

LIBRARIES = ("pyro", "zuko", "nflows", "normflows")
BINS, BOUND, UNITS = 8, 5.0, 16


def flows(library):
    """Return the flows of a library."""
    return {"pyro": _pyro, "zuko": _zuko, "nflows": _nflows, "normflows": _normflows}[library]()


class FromTransform(Flow):
    """A transform of torch or Pyro; log-determinants of single coordinates are summed."""

    def __init__(self, dim, transform):
        super().__init__((dim,))
        self.transform = transform

    def forward_and_log_det(self, x, context=None):
        y = self.transform(x)
        return y, self._log_det(x, y)

    def inverse_and_log_det(self, y, context=None):
        x = self.transform.inv(y)
        return x, -self._log_det(x, y)

    def _log_det(self, x, y):
        log_det = self.transform.log_abs_det_jacobian(x, y)
        return log_det if self.transform.domain.event_dim else log_det.sum(-1)


class Cholesky(FromTransform):
    """Pyro's `LowerCholeskyAffine`, built for each call of parameters, as a guide would."""

    def __init__(self, dim):
        super().__init__(dim, None)
        self.loc = nn.Parameter(torch.randn(dim))
        self.raw = nn.Parameter(torch.zeros(dim, dim))

    def forward_and_log_det(self, x, context=None):
        return self._built().forward_and_log_det(x)

    def inverse_and_log_det(self, y, context=None):
        return self._built().inverse_and_log_det(y)

    def _built(self):
        scale_tril = self.raw.tril(-1) + self.raw.diagonal().exp().diag()
        return FromTransform(len(self.loc), T.LowerCholeskyAffine(self.loc, scale_tril))


class FromLazy(Flow):
    """A transform of zuko, which the library builds anew for each call."""

    def __init__(self, dim, lazy):
        super().__init__((dim,))
        self.lazy = lazy

    def forward_and_log_det(self, x, context=None):
        return self.lazy().call_and_ladj(x)

    def inverse_and_log_det(self, y, context=None):
        return self.lazy().inv.call_and_ladj(y)


class FromPair(Flow):
    """A flow of nflows or normflows: each method returns the pair, for points of shape `(batch, dim)` only."""

    def __init__(self, dim, pair):
        super().__init__((dim,))
        self.pair = pair

    def forward_and_log_det(self, x, context=None):
        return self._flat(self.pair.forward, x)

    def inverse_and_log_det(self, y, context=None):
        return self._flat(self.pair.inverse, y)

    def _flat(self, function, point):
        batch = point.shape[:-1]
        value, log_det = function(point.reshape(batch.numel(), point.shape[-1]))
        return value.reshape(point.shape), log_det.expand(batch.numel()).reshape(batch)


def _pyro():
    def made(dim, hidden, *param_dims):
        order = torch.arange(dim)
        return AutoRegressiveNN(dim, hidden, list(param_dims), permutation=order, nonlinearity=nn.Tanh())

    def dense(dim, hidden, *sizes):
        return DenseNN(dim // 2, hidden, [(dim - dim // 2) * size for size in sizes], nn.Tanh())

    quadratic = {"count_bins": BINS, "bound": BOUND, "order": "quadratic"}
    knots = (BINS, BINS, BINS - 1)
    return {
        "Planar": lambda dim, hidden: T.Planar(dim),
        "Radial": lambda dim, hidden: T.Radial(dim),
        "Sylvester": lambda dim, hidden: T.Sylvester(dim, dim),
        "Householder": lambda dim, hidden: T.Householder(dim, dim),
        "Polynomial": lambda dim, hidden: T.Polynomial(made(dim, hidden, 15), dim, count_degree=4, count_sum=3),
        "AffineAutoregressive": lambda dim, hidden: T.AffineAutoregressive(made(dim, hidden, 1, 1)),
        "AffineAutoregressive stable": lambda dim, hidden: T.AffineAutoregressive(made(dim, hidden, 1, 1), stable=True),
        "AffineCoupling": lambda dim, hidden: T.AffineCoupling(dim // 2, dense(dim, hidden, 1, 1)),
        "NeuralAutoregressive": lambda dim, hidden: T.NeuralAutoregressive(made(dim, hidden, *[UNITS] * 3), UNITS),
        "BlockAutoregressive": lambda dim, hidden: T.BlockAutoregressive(dim),
        "BlockAutoregressive residual": lambda dim, hidden: T.BlockAutoregressive(dim, residual="normal"),
        "Spline": lambda dim, hidden: FromTransform(dim, T.Spline(dim, **quadratic)),
        "Spline linear": lambda dim, hidden: FromTransform(dim, T.Spline(dim, BINS, BOUND, "linear")),
        "SplineCoupling": lambda dim, hidden: T.SplineCoupling(
            dim, dim // 2, dense(dim, hidden, *knots), identity=True, **quadratic
        ),
        "SplineAutoregressive": lambda dim, hidden: T.SplineAutoregressive(dim, made(dim, hidden, *knots), **quadratic),
        "MatrixExponential": lambda dim, hidden: T.MatrixExponential(dim),
        "GeneralizedChannelPermute": lambda dim, hidden: T.GeneralizedChannelPermute(dim),
        "BatchNorm": lambda dim, hidden: FromTransform(dim, T.BatchNorm(dim).eval()),
        "LowerCholeskyAffine": lambda dim, hidden: Cholesky(dim),
        "Permute": lambda dim, hidden: FromTransform(dim, T.Permute(torch.arange(dim).roll(1))),
    }


def _zuko():
    validate = torch.distributions.Distribution._validate_args  # which zuko switches off for everybody
    import zuko.flows
    import zuko.transforms as zt
    from zuko.flows.neural import MNN, UMNN

    torch.distributions.Distribution.set_default_validate_args(validate)

    def wired(wiring, univariate, *shapes):
        """Any univariate transform in a wiring; `univariate` may depend on the dimension."""

        def make(dim, hidden):
            kwargs = {"hidden_features": hidden, "activation": nn.Tanh} if dim > 1 else {}
            return FromLazy(dim, wiring(dim, univariate=univariate(dim), shapes=shapes, **kwargs))

        return make

    autoregressive, coupling = zuko.flows.MaskedAutoregressiveTransform, zuko.flows.GeneralCouplingTransform
    spline = ((BINS,), (BINS,), (BINS - 1,))
    lazy = zuko.flows.UnconditionalTransform
    return {
        "MAF": wired(autoregressive, lambda dim: zt.MonotonicAffineTransform, (), ()),
        "NSF": wired(autoregressive, lambda dim: partial(zt.MonotonicRQSTransform, bound=BOUND), *spline),
        "NAF": wired(autoregressive, lambda dim: MNN(signal=UNITS, stack=dim), (UNITS,)),
        "UNAF": wired(autoregressive, lambda dim: UMNN(signal=UNITS, stack=dim), (UNITS,), ()),
        "SOSPF": wired(autoregressive, lambda dim: zt.SOSPolynomialTransform, (3, 5)),
        "BPF": wired(autoregressive, lambda dim: zt.BoundedBernsteinTransform, (16,)),
        "GF": wired(zuko.flows.ElementWiseTransform, lambda dim: zt.GaussianizationTransform, (BINS,), (BINS,)),
        "NICE": wired(coupling, lambda dim: zt.AdditiveTransform, ()),
        "RealNVP": wired(coupling, lambda dim: zt.MonotonicAffineTransform, (), ()),
        "RQS coupling": wired(coupling, lambda dim: partial(zt.MonotonicRQSTransform, bound=BOUND), *spline),
        "LU": lambda dim, hidden: FromLazy(dim, lazy(zt.LULinearTransform, torch.randn(dim, dim))),
        "Rotation": lambda dim, hidden: FromLazy(dim, lazy(zt.RotationTransform, torch.randn(dim, dim))),
        "CNF": lambda dim, hidden: FromLazy(dim, zuko.flows.FFJTransform(dim, hidden_features=hidden)),
    }


def _nflows():
    import nflows.transforms as nt

    # Two hidden layers: the first one and one block.
    made = {"num_blocks": 1, "use_residual_blocks": False, "activation": torch.tanh}
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}

    def coupling(transform, **kwargs):
        def make(dim, hidden):
            return transform(torch.arange(dim) >= dim // 2, lambda m, n: MLP(m, hidden, n), **kwargs)

        return make

    made_of = {
        "MaskedAffineAutoregressive": lambda dim, hidden: nt.MaskedAffineAutoregressiveTransform(
            dim, hidden[0], **made
        ),
        "MaskedRQSAutoregressive": lambda dim, hidden: nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            features=dim, hidden_features=hidden[0], **made, **spline
        ),
        "MaskedQuadraticAutoregressive": lambda dim, hidden: nt.MaskedPiecewiseQuadraticAutoregressiveTransform(
            features=dim, hidden_features=hidden[0], **made, **spline
        ),
        "AdditiveCoupling": coupling(nt.AdditiveCouplingTransform),
        "AffineCoupling": coupling(nt.AffineCouplingTransform),
        "RQSCoupling": coupling(nt.PiecewiseRationalQuadraticCouplingTransform, **spline),
        "CubicCoupling": coupling(nt.PiecewiseCubicCouplingTransform, **spline),
        "LULinear": lambda dim, hidden: nt.LULinear(dim),
        "QRLinear": lambda dim, hidden: nt.QRLinear(dim, dim),
        "SVDLinear": lambda dim, hidden: nt.SVDLinear(dim, 2 * ((dim + 1) // 2)),
        "NaiveLinear": lambda dim, hidden: nt.NaiveLinear(dim),
        "HouseholderSequence": lambda dim, hidden: nt.HouseholderSequence(dim, dim),
        "LeakyReLU": lambda dim, hidden: nt.LeakyReLU(),
        "BatchNorm": lambda dim, hidden: nt.BatchNorm(dim).eval(),
        "ActNorm": lambda dim, hidden: nt.ActNorm(dim).eval(),  # as after its first batch
    }
    return _paired(made_of)


def _normflows():
    import normflows as nf
    from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    made = {"num_blocks": 1, "use_residual_blocks": False, "activation": torch.tanh}
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}

    def affine(scale, dim, hidden):
        kept, moved = dim - dim // 2, dim // 2  # as torch.chunk splits
        return nf.flows.AffineCouplingBlock(MLP(kept, hidden, moved * (2 if scale else 1)), scale=scale)

    def masked(dim, hidden):
        mask = (torch.arange(dim) < dim // 2).to(torch.get_default_dtype())
        return nf.flows.MaskedAffineFlow(mask, t=MLP(dim, hidden, dim), s=MLP(dim, hidden, dim))

    def act_norm(dim):
        flow = nf.flows.ActNorm((dim,))
        flow.data_dep_init_done.fill_(1.0)  # as after its first batch
        return flow

    made_of = {
        "Planar": lambda dim, hidden: nf.flows.Planar((dim,)),
        "Planar leaky_relu": lambda dim, hidden: nf.flows.Planar((dim,), act="leaky_relu"),
        "Radial": lambda dim, hidden: nf.flows.Radial((dim,)),
        "AdditiveCouplingBlock": partial(affine, False),
        "AffineCouplingBlock": partial(affine, True),
        "MaskedAffineFlow": masked,
        "MaskedAffineAutoregressive": lambda dim, hidden: nf.flows.MaskedAffineAutoregressive(dim, hidden[0], **made),
        "RQSCoupling": lambda dim, hidden: PiecewiseRationalQuadraticCoupling(
            torch.arange(dim) >= dim // 2, lambda m, n: MLP(m, hidden, n), **spline
        ),
        "RQSAutoregressive": lambda dim, hidden: MaskedPiecewiseRationalQuadraticAutoregressive(
            features=dim, hidden_features=hidden[0], **made, **spline
        ),
        "LULinearPermute": lambda dim, hidden: nf.flows.LULinearPermute(dim),
        "InvertibleAffine": lambda dim, hidden: nf.flows.InvertibleAffine(dim),
        "AffineConstFlow": lambda dim, hidden: nf.flows.AffineConstFlow((dim,)),
        "ActNorm": lambda dim, hidden: act_norm(dim),
        "Permute": lambda dim, hidden: nf.flows.Permute(dim),
    }
    return _paired(made_of)


def _paired(made_of):
    return {name: partial(_pair, make) for name, make in made_of.items()}


def _pair(make, dim, hidden):
    return FromPair(dim, make(dim, hidden))


def as_flow(dim, flow):
    """Return a flow with both methods, whatever the dictionary holds."""
    return FromTransform(dim, flow) if isinstance(flow, TransformModule) and not isinstance(flow, Flow) else flow
