"""Linear inverse autoregressive flow."""

import torch
from torch import Tensor, nn

from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import multiply, solve_triangular, strictly_lower, strictly_lower_index
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters, freeze


class LinearIAF(Flow):
    r"""Linear inverse autoregressive flow, `y = (sum_k w_k L_k) x`, with unit lower triangular `L_k` and softmax `w`.

    `log_det = 0`: the weights sum to 1, so the combination is unit lower triangular as well. Both directions cost
    O(dim^2), the inverse by forward substitution; with a context, the combination costs O(K dim^2) for each context.

    The flow starts as the identity, `L_k = I`. The weights are the softmax of a linear layer of the context that
    starts at random, so that the K matrices, equal at first, receive different gradients.

    Both `w` and `L_k` are functions of the context. Given one, the flow is linear: it turns a standard normal into a
    correlated normal, and adds nothing to a base or a neighbour that has a full covariance already.

    Args:
        dim: Number of coordinates. A line (1) has nothing to mix: there the flow stays the identity.
        num_matrices: K. 1 (default) is linear IAF, more are the convex combination (ccLinIAF), which takes a context:
            without one it would be a single matrix, written K times.
        context_dim: Width of the context; 0 for none.

    Raises:
        ValueError: If `num_matrices` is less than 1, or more than 1 without a context.

    References:
        Tomczak, Welling (2017), "Improving variational auto-encoders using convex combination linear inverse
        autoregressive flow", arXiv:1706.02326.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.linear_iaf import LinearIAF
        >>> flow = LinearIAF(2, num_matrices=5, context_dim=3)
        >>> y, log_det = flow.forward_and_log_det(torch.ones(4, 2), torch.randn(4, 3))
        >>> y[0], log_det.shape
        (tensor([1., 1.], grad_fn=<SelectBackward0>), torch.Size([4]))
    """

    tril_index: Tensor

    @checked
    def __init__(self, dim: Size, num_matrices: Size = 1, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        if num_matrices > 1 and context_dim == 0:
            raise ValueError(
                "num_matrices must be 1, or more with a context, without which a combination is but one matrix; got "
                f"{num_matrices} and context_dim={context_dim}"
            )
        # At least one entry, because torch warns of layers without outputs; on a line it is neither read nor trained.
        entries = max(dim * (dim - 1) // 2, 1)
        self.params = ContextParameters({"tril": torch.zeros(num_matrices, entries)}, context_dim)
        self.mixture = nn.Linear(context_dim, num_matrices) if num_matrices > 1 else None
        if dim == 1:
            freeze(self)
        self.register_buffer("tril_index", strictly_lower_index(dim, entries))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `L x` and zero."""
        y = x + multiply(self._below_diagonal(context), x)
        return y, torch.zeros_like(y[..., 0])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve for `x`, and return zero."""
        below = self._below_diagonal(context)
        x = solve_triangular(below, y, upper=False, unitriangular=True)
        return x, torch.zeros_like(x[..., 0])

    def _below_diagonal(self, context: Tensor | None) -> Tensor:
        """Return `sum_k w_k L_k - I`, of which only the entries below the diagonal are combined."""
        (tril,) = self.params(context)
        if self.mixture is None:
            combined = tril[..., 0, :]
        else:
            combined = (self.mixture(context).softmax(-1)[..., None] * tril).sum(-2)
        return strictly_lower(combined, self.tril_index)
