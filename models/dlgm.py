"""Deep latent Gaussian model: the variational autoencoder, with any number of stochastic layers."""

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_nf.networks import MLP


def bernoulli_likelihood(outputs: Tensor) -> dist.TorchDistribution:
    """Return independent Bernoulli pixels with logits `outputs: (*batch, data_dim)`."""
    return dist.Bernoulli(logits=outputs).to_event(1)


def normal_likelihood(outputs: Tensor) -> dist.TorchDistribution:
    """Return independent normals; `outputs: (*batch, 2 data_dim)` are locations, then scales before softplus."""
    loc, raw_scale = outputs.chunk(2, -1)
    # The offset bounds the density: an autoencoder could otherwise put an infinite one on a constant pixel.
    return dist.Normal(loc, nn.functional.softplus(raw_scale) + 1e-3).to_event(1)


class DLGM(PyroModule):  # type: ignore[misc]
    r"""Deep latent Gaussian model with L stochastic layers.

    `xi_l ~ N(0, I)`, `h_L = G_L xi_L`, `h_l = T_l(h_{l+1}) + G_l xi_l`, `x ~ p(x | T_0(h_1))`: the T are networks, the
    G matrices. One layer is the variational autoencoder. The data stand in the plate `"data"`.

    Args:
        data_dim: Number of values in a datum.
        latent_dims: Widths of `xi_1, ..., xi_L`, the layer next to the data first.
        hidden_dims: Widths of the hidden layers of every T.
        likelihood: Maps the outputs of T_0, `(*batch, num_outputs)`, to a distribution of data, event shape
            `(data_dim,)`.
        num_outputs: Width of T_0's output; `None` for `data_dim`.
        activation: Makes the nonlinearity of the networks.

    Raises:
        ValueError: If there is no latent layer.

    References:
        Rezende, Mohamed, Wierstra (2014), "Stochastic backpropagation and approximate inference in deep generative
        models", arXiv:1401.4082, equations 1-4.

    Example:
        >>> import torch
        >>> from pyro_nf.models import DLGM
        >>> model = DLGM(data_dim=6, latent_dims=(2,), hidden_dims=(8,))
        >>> model(torch.zeros(10, 6), batch_size=4).shape
        torch.Size([4, 6])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dims: Sequence[int],
        hidden_dims: Sequence[int],
        likelihood: Callable[[Tensor], dist.TorchDistribution] = bernoulli_likelihood,
        num_outputs: int | None = None,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        if not latent_dims or min(latent_dims) < 1:
            raise ValueError(f"latent_dims must hold the positive width of each layer; got {tuple(latent_dims)}")
        self.data_dim = data_dim
        self.latent_dims = tuple(latent_dims)
        self.likelihood = likelihood
        out_dims = [data_dim if num_outputs is None else num_outputs, *latent_dims[:-1]]
        self.networks = nn.ModuleList(
            MLP(latent, hidden_dims, out, activation) for latent, out in zip(latent_dims, out_dims, strict=True)
        )
        self.mixers = nn.ModuleList(nn.Linear(latent, latent, bias=False) for latent in latent_dims)

    def forward(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Run the model on `x: (size, data_dim)`, or on a random `batch_size` rows of it with the likelihood scaled up.

        Returns:
            The observed rows, `(batch_size, data_dim)`.
        """
        if x.shape[1:] != (self.data_dim,):
            raise ValueError(f"x must have shape (size, data_dim={self.data_dim}); got {tuple(x.shape)}")
        networks, mixers = self.networks, self.mixers  # once: Pyro registers every parameter at each look
        with pyro.plate("data", len(x), subsample_size=batch_size, device=x.device) as rows:
            h = x.new_zeros(())
            for layer in reversed(range(len(self.latent_dims))):
                xi = pyro.sample(f"xi_{layer + 1}", dist.Normal(x.new_zeros(self.latent_dims[layer]), 1.0).to_event(1))
                h = networks[layer](h + mixers[layer](xi))
            batch = x if len(rows) == len(x) else x[rows]
            result: Tensor = pyro.sample("x", self.likelihood(h), obs=batch)
        return result
