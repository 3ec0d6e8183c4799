r"""Densities and draws of Pyro and torch, written anew where theirs depend on values in ways that `vmap` cannot batch.

Each function of `REWRITES` stands in for another while models are run (`pyro_nf.programs.batching`), and computes the
same.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import stable, stable_log_prob
from torch import Tensor
from torch.autograd import Function
from torch.distributions import Distribution, dirichlet
from torch.distributions.transforms import Transform
from torch.overrides import TorchFunctionMode

from pyro_nf.compiler.functorch import is_batched, sample_dirichlet, without_modes

Rewrite = tuple[Any, str, Any]
"""An owner (a class or a module), the name of one of its functions, and what stands in for it."""

# Points of the trapezoid rule over a circle: its error is below rounding for concentrations up to Pyro's bound, which
# make a density no narrower than 0.01.
_CIRCLE, _MAX_CONCENTRATION = 1024, 10_000.0


def may_hold(condition: Tensor) -> bool:
    """Whether a condition holds anywhere, as far as can be known: it may where its values differ between draws."""
    try:
        return bool(condition.any())
    except RuntimeError:  # of `vmap` or of a recording, which know no values
        return True


def nan_masked_normal(self: Any, value: Tensor) -> Tensor:
    """`NanMaskedNormal.log_prob`: 0 where a value is missing."""
    there = value.isfinite()
    value = torch.where(there, value, self.loc.detach())  # any number: where a value is NaN, so is its gradient
    log_prob: Tensor = dist.Normal.log_prob(self, value).masked_fill(~there, 0.0)
    return log_prob


def nan_masked_multivariate_normal(self: Any, value: Tensor) -> Tensor:
    r"""`NanMaskedMultivariateNormal.log_prob`: that of the entries which are there.

    The missing ones are given the standard normal's mean and variance, and no covariance with others. The joint density
    is then the marginal one times `(2 pi)^(-1/2)` for each of them.
    """
    there = value.isfinite()
    if not may_hold(~there):
        return dist.MultivariateNormal.log_prob(self, value)  # type: ignore[no-any-return]
    both = there[..., :, None] & there[..., None, :]
    covariance = torch.where(both, self.covariance_matrix, torch.eye(value.shape[-1]).to(value))
    factor = torch.linalg.cholesky(covariance)
    error = torch.where(there, value - self.loc, 0.0)
    scaled: Tensor = torch.linalg.solve_triangular(factor, error[..., None], upper=False)[..., 0]
    log_det: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * scaled.square().sum(-1) - log_det - 0.5 * math.log(2 * math.pi) * there.sum(-1)


def gaussian_scale_mixture(self: Any, value: Tensor) -> Tensor:
    r"""`GaussianScaleMixture.log_prob`, `log sum_k w_k N(x; 0, (c_k s)^2)`; Pyro's, in place, has no gradient."""
    scale = self.component_scale[:, None] * self.coord_scale
    parts = dist.Normal(torch.zeros_like(scale), scale).log_prob(value).sum(-1)
    return torch.logsumexp(self.categorical.logits + parts, -1)


def sine_bivariate_von_mises(self: Any) -> Tensor:
    r"""`SineBivariateVonMises.norm_const`, as an integral over one angle in place of a series.

    It is the logarithm of
    `int int exp(a cos x + b cos y + c sin x sin y) dx dy = 2 pi int exp(a cos x) I_0(sqrt(b^2 + c^2 sin^2 x)) dx`,
    whose integrand is the marginal density of x (Singh, Hnizdo and Demchuk, 2002, Probabilistic model for two dependent
    circular variables). The trapezoid rule is exact to rounding for what is smooth and periodic. NaN for concentrations
    above 10,000, which Pyro's constructor refuses.
    """
    x = torch.arange(_CIRCLE, dtype=self.phi_loc.dtype, device=self.phi_loc.device) * (2 * math.pi / _CIRCLE)
    a, b, c = (part[..., None] for part in (self.phi_concentration, self.psi_concentration, self.correlation))
    size = (b.square() + (c * x.sin()).square()).sqrt()
    parts = a * x.cos() + size + torch.special.i0e(size).log()
    log_norm: Tensor = parts.logsumexp(-1) + 2 * math.log(2 * math.pi) - math.log(_CIRCLE)
    too_large = torch.maximum(self.phi_concentration, self.psi_concentration) > _MAX_CONCENTRATION
    return log_norm.masked_fill(too_large, math.nan)


def log_prob_of_stable(alpha: Tensor, beta: Tensor, value: Tensor, coords: str) -> Tensor:
    r"""`stable_log_prob._stable_log_prob`: near alpha = 1 a mixture of the densities to both sides of it.

    From S coordinates to S0, `z0 = z - beta tan(pi alpha / 2)` (Nolan, 2017, section 1.3); Pyro takes the tangent of
    all of it.
    """
    width = stable_log_prob.alpha_near_one_tolerance
    if coords == "S":
        value = torch.where(alpha == 1, value, value - beta * (math.pi / 2 * alpha).tan())
    near = (alpha - 1).abs() < width
    above = _stable_s0(torch.where(near, 1 + width, alpha), beta, value)
    if not may_hold(near):
        return above
    below = _stable_s0(torch.full_like(alpha, 1 - width), beta, value)
    return torch.where(near, _between(above, below, torch.where(near, (alpha - 1) / (2 * width) + 0.5, 0.5)), above)


def _stable_s0(alpha: Tensor, beta: Tensor, value: Tensor) -> Tensor:
    """`stable_log_prob._unsafe_alpha_stable_log_prob_S0`: near 0 a mixture of the densities to both sides of it."""
    z = value + beta * (math.pi / 2 * alpha).tan()
    at_zero = stable_log_prob._unsafe_alpha_stable_log_prob_at_zero(alpha, 0)
    width = (stable_log_prob.value_near_zero_tolerance_alpha * alpha / (1 - alpha).abs()).minimum(
        stable_log_prob.value_near_zero_tolerance_density * at_zero.neg().exp()
    )
    near = z.abs() < width
    above: Tensor = stable_log_prob._unsafe_stable_log_prob(alpha, beta, torch.where(near, width, z))
    if not may_hold(near):
        return above
    below = stable_log_prob._unsafe_stable_log_prob(alpha, beta, -width)
    return torch.where(near, _between(above, below, torch.where(near, z / (2 * width) + 0.5, 0.5)), above)


def _between(above: Tensor, below: Tensor, weight: Tensor) -> Tensor:
    return torch.logaddexp(above + weight.log(), below + (1 - weight).log())


def standard_stable(alpha: Tensor, beta: Tensor, uniform: Tensor, exponential: Tensor, coords: str) -> Tensor:
    """`stable._standard_stable`: near alpha = 1 a mean of the draws to both sides of it."""
    near = (alpha - 1).abs() <= stable.RADIUS
    if not may_hold(near):
        plain: Tensor = stable._unsafe_standard_stable(alpha, beta, uniform, exponential, coords=coords)
        return plain
    if coords == "S":
        draw = standard_stable(alpha, beta, uniform, exponential, "S0")
        return torch.where(alpha == 1, draw, draw + beta * (math.pi / 2 * alpha).tan())
    below, above = (
        # Moved to the side in value alone: the gradient is as if it had not been.
        stable._unsafe_standard_stable(
            torch.where(near, alpha + (1 + side - alpha).detach(), alpha), beta, uniform, exponential, coords=coords
        )
        for side in (-stable.RADIUS, stable.RADIUS)
    )
    weight = (alpha.detach() - (1 - stable.RADIUS)) / (2 * stable.RADIUS)
    return torch.where(near, (1 - weight) * below + weight * above, below)


def wishart(self: Any, sample_shape: Any = (), max_try_correction: int | None = None) -> Tensor:
    """`Wishart.rsample`, without its second draws in place of singular ones, for which torch takes all that are not."""
    drawn: Tensor = self._bartlett_sampling(torch.Size(sample_shape))
    return drawn


def dirichlet_draw(self: Any, sample_shape: Any = ()) -> Tensor:
    """`Dirichlet.rsample`, for all draws at once."""
    drawn: Tensor = _DirichletDraw.apply(self.concentration.expand(self._extended_shape(sample_shape)), torch.rand(()))
    return drawn


class _DirichletDraw(Function):
    """torch's draw and its gradient; the second argument makes draws differ that share their concentration."""

    @staticmethod
    def forward(concentration: Tensor, other: Tensor) -> Tensor:
        return sample_dirichlet(concentration)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _DirichletGradient.apply(*ctx.saved_tensors, *grads), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, concentration: Tensor, other: Tensor) -> tuple[Tensor, int]:
        (concentration,) = _in_front(info.batch_size, in_dims[:1], concentration)
        return _DirichletDraw.apply(concentration, other[..., 0] if other.dim() else other), 0


class _DirichletGradient(Function):
    @staticmethod
    def forward(x: Tensor, concentration: Tensor, grad: Tensor) -> Tensor:
        return dirichlet._Dirichlet_backward(x, concentration, grad)  # type: ignore[no-any-return, no-untyped-call]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("draws of a Dirichlet have no second derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Tensor, int]:
        return _DirichletGradient.apply(*_in_front(info.batch_size, in_dims, *tensors)), 0


def _in_front(size: int, dims: Any, *tensors: Tensor) -> list[Tensor]:
    """Move the dimension that `vmap` batches to the front, or put one there."""
    return [
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]


class _Answer(TorchFunctionMode):
    """Answer every question that is asked of what differs between draws the same way.

    Args:
        answer: The answer.
    """

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or answer."""
        if func is Tensor.__bool__ and is_batched(args[0]):
            return self.answer
        if func is Tensor.__format__ and is_batched(args[0]):  # in an assertion's message
            return repr(args[0])
        return func(*args, **(kwargs or {}))


def _answered(owner: Any, name: str, answer: bool) -> Rewrite:
    """Rewrite a function that looks at values only to refuse some, or to warn of them, so that it passes them all."""
    function = vars(owner)[name]

    @functools.wraps(function)
    def passing(*args: Any, **kwargs: Any) -> Any:
        with _Answer(answer):
            return function(*args, **kwargs)

    return owner, name, passing


class _Drawn(Function):
    """A sample as one operation, which `vmap` makes draw by draw, below the model: its loops may look at values."""

    @staticmethod
    def forward(draw: Callable[..., Tensor], zero: Tensor, *tensors: Tensor) -> Tensor:
        # Below all modes: its normals are no noise of the guide's, for their number depends on values.
        with torch.no_grad(), without_modes():
            return draw(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def vmap(info: Any, in_dims: Any, draw: Any, zero: Tensor, *tensors: Tensor) -> tuple[Tensor, int]:
        dims = in_dims[2:]
        rows = []
        for i in range(info.batch_size):
            own = [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)]
            rows.append(_Drawn.apply(draw, zero, *own))
        return torch.stack(rows), 0


def _drawn_singly(owner: type[Distribution], name: str = "sample") -> Rewrite:
    """Rewrite a sampler that looks at values, as loops do, as an operation of the distribution's tensors.

    Where it has a gradient that may be asked for, it stays as it is.
    """
    sample = vars(owner)[name]

    @functools.wraps(sample)
    def draw(self: Any, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  as torch has it
        if name == "rsample" and torch.is_grad_enabled():
            return sample(self, sample_shape)  # type: ignore[no-any-return]
        tensors: list[Tensor] = []
        _collect(self, tensors)

        def with_tensors(*values: Tensor) -> Tensor:
            drawn: Tensor = sample(_rebuilt(self, iter(values)), sample_shape)
            return drawn

        # A random number differs between the draws, as the sample shall also where no parameter does.
        result: Tensor = _Drawn.apply(with_tensors, torch.rand(()), *tensors)
        return result

    return owner, name, draw


def _collect(value: Any, tensors: list[Tensor]) -> None:
    """Append the tensors that a distribution is made of."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, tensors)
    elif isinstance(value, Distribution | Transform):
        for item in vars(value).values():
            _collect(item, tensors)


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Copy a distribution, with other tensors in the order of `_collect`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_rebuilt(item, tensors) for item in value)
    if isinstance(value, Distribution | Transform):
        new = copy.copy(value)
        for name, item in list(vars(value).items()):
            new.__dict__[name] = _rebuilt(item, tensors)
        return new
    return value


REWRITES: tuple[Rewrite, ...] = (
    (dist.NanMaskedNormal, "log_prob", nan_masked_normal),
    (dist.NanMaskedMultivariateNormal, "log_prob", nan_masked_multivariate_normal),
    (dist.GaussianScaleMixture, "log_prob", gaussian_scale_mixture),
    (dist.SineBivariateVonMises, "norm_const", property(sine_bivariate_von_mises)),
    (stable, "_stable_log_prob", log_prob_of_stable),
    (stable, "_standard_stable", standard_stable),
    _answered(dist.SineBivariateVonMises, "__init__", True),
    _answered(dist.SineSkewed, "__init__", False),
    (torch.distributions.Dirichlet, "rsample", dirichlet_draw),
    (torch.distributions.Wishart, "rsample", wishart),
    _drawn_singly(torch.distributions.VonMises),
    _drawn_singly(dist.SineBivariateVonMises),
    _drawn_singly(dist.SpanningTree),
    _drawn_singly(dist.CoalescentTimes),
    _drawn_singly(dist.GaussianScaleMixture, "rsample"),
    _drawn_singly(dist.Rejector, "rsample"),
)
