"""A mixture of normals as the base of a flow: one component for each mode of the posterior."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.flows import Flow, LowerTriangularAffine
from pyro_nf.interface.arguments import check_whole_number

# How far from 0 components start, in standard deviations: enough for each to find a way of its own.
_SPREAD = 2.0
# How far a second component on a mode starts from it.
_ASIDE = 0.5


class LocatedNormal(Protocol):
    """A normal by its location and the Cholesky factor of its covariance."""

    @property
    def loc(self) -> Tensor:
        """Location, `(dim,)`."""

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor, `(dim, dim)`."""


class MixtureBase(nn.Module):
    r"""Mixture of full-rank normals over `dim` coordinates, `sum_k w_k N(loc_k, L_k L_k')`, all trainable.

    Weights start equal and locations at random; `AutoFlow.warm_start` puts a component on each mode that it finds.

    Args:
        dim: Number of coordinates.
        num_components: K, at least 2.

    Raises:
        ValueError: If `num_components` is no whole number of at least 2.
    """

    def __init__(self, dim: int, num_components: int = 4) -> None:
        dim = check_whole_number("dim", dim)
        num_components = check_whole_number("num_components", num_components, least=2)
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.components: Any = nn.ModuleList(
            LowerTriangularAffine(dim, loc=_SPREAD * torch.randn(dim)) for _ in range(num_components)
        )

    @torch.no_grad()
    def assign(self, modes: Sequence[LocatedNormal], shares: Sequence[float]) -> None:
        """Put components on modes, in coordinates in which the first mode is the standard normal.

        Components that are left over share the modes with others, a little aside.
        """
        first, num = modes[0], min(len(modes), len(self.components))
        for k, component in enumerate(self.components):
            mode = modes[k % num]
            loc, scale_tril = torch.linalg.solve_triangular(
                first.scale_tril, torch.cat([(mode.loc - first.loc)[:, None], mode.scale_tril], 1), upper=False
            ).split([1, len(first.loc)], 1)
            aside = 0.0 if k < num else _ASIDE * scale_tril @ torch.randn_like(first.loc)
            component.assign(loc[:, 0] + aside, scale_tril)
            sharing = len(range(k % num, len(self.components), num))
            self.logits[k] = math.log(shares[k % num] / sharing)

    def forward(self) -> "Mixture":
        """Return the distribution."""
        return Mixture(self.logits, list(self.components))

    def draw_from(self, prefix: str) -> "Mixture":
        """Sample a component, an auxiliary site, and return the distribution to draw from then."""
        which = dist.Categorical(logits=self.logits)
        component = pyro.sample(f"{prefix}_component", which, infer={"is_auxiliary": True, "_summed_out": True})
        return Mixture(self.logits, list(self.components), component)


class Mixture(TorchDistribution):
    r"""A mixture of images of the standard normal, `q(x) = sum_k w_k q_k(x)`; or what is left to draw once k is drawn.

    Given `component`, draws are q_k's, with gradients, and their log density is `log q(x) - log w_k`: together with k's
    own that is `log q(x)`, whichever component x came from.

    Args:
        logits: Unnormalised log weights, `(K,)`.
        components: K flows, from the standard normal to q_k.
        component: k, `(*batch,)`; `None` for the whole mixture.
        batch_shape: Of the whole mixture.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 1)

    def __init__(
        self,
        logits: Tensor,
        components: Sequence[Flow],
        component: Tensor | None = None,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.logits, self.components, self.component = logits, components, component
        shape = torch.Size(batch_shape) if component is None else component.shape
        super().__init__(shape, components[0].event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry all gradients: one of k carries none to the weights."""
        return self.component is not None

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Mixture":
        """Return the same distribution with a larger batch shape, whose draws are independent."""
        component = None if self.component is None else self.component.expand(batch_shape)
        return Mixture(self.logits, self.components, component, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws `(*sample_shape, *batch, dim)`, with gradients to the parameters of their components."""
        shape = torch.Size(sample_shape) + self.batch_shape
        component = self.component
        if component is None:
            component = dist.Categorical(logits=self.logits).sample(shape)
        noise = torch.randn(shape + self.event_shape, dtype=self.logits.dtype, device=self.logits.device)
        images = torch.stack([flow.forward_and_log_det(noise)[0] for flow in self.components], -2)
        index = component.expand(shape)[..., None, None].expand(*shape, 1, *self.event_shape)
        return images.gather(-2, index)[..., 0, :]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at `value: (*shape, *batch, dim)`."""
        normal = dist.Normal(torch.zeros_like(value), 1.0)
        weights = self.logits.log_softmax(-1)
        terms = []
        for weight, flow in zip(weights, self.components, strict=True):
            x, log_det = flow.inverse_and_log_det(value)
            terms.append(weight + normal.log_prob(x).sum(-1) + log_det)
        log_prob = torch.stack(terms, -1).logsumexp(-1)
        return log_prob if self.component is None else log_prob - weights[self.component]
