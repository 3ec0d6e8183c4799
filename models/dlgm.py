"""Deep latent Gaussian models: the variational autoencoder, and its like with any number of stochastic layers."""

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_nf.interface.arguments import Size, checked
from pyro_nf.models.likelihoods import BernoulliLikelihood, Likelihood
from pyro_nf.networks import MLP


class VAE(PyroModule):  # type: ignore[misc]
    r"""The model of a variational autoencoder: `z ~ N(0, I)`, `x ~ p(x | decoder(z))`, in the plate `"data"`.

    Its guide is `AmortizedFlow(model, encoder)`, or any other.

    Args:
        data_dim: Number of values in a datum.
        latent_dim: Width of z.
        decoder: A module from `(*batch, latent_dim)` to `(*batch, num_params * data_dim)`, `num_params` of the
            likelihood: `GatedMLP`, `ImageDecoder`, ...
        likelihood: Maps the decoder's outputs to a distribution of data; `None` for `BernoulliLikelihood()`.

    Raises:
        ValueError: If `latent_dim` is not positive; at a call, if the data or the decoder's outputs have another width.

    References:
        Kingma, Welling (2013), "Auto-encoding variational Bayes", arXiv:1312.6114.

    Example:
        >>> import torch
        >>> from pyro_nf.models import VAE
        >>> from pyro_nf.networks import GatedMLP
        >>> model = VAE(data_dim=6, latent_dim=2, decoder=GatedMLP(2, (8,), 6))
        >>> model(torch.zeros(10, 6), batch_size=4).shape
        torch.Size([4, 6])
    """

    @checked
    def __init__(
        self, data_dim: Size, latent_dim: Size, decoder: nn.Module, likelihood: Likelihood | None = None
    ) -> None:
        super().__init__()
        self.data_dim, self.latent_dim = data_dim, latent_dim
        self.likelihood = likelihood or BernoulliLikelihood()
        self.decoder = decoder

    def forward(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Run the model on `x: (size, data_dim)`, or on a random `batch_size` rows of it with the likelihood scaled up.

        Returns:
            The observed rows, `(batch_size, data_dim)`.
        """
        with _plate(x, self.data_dim, batch_size) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            return _observe(x, rows, self.decoder(z), self.likelihood)


class DLGM(PyroModule):  # type: ignore[misc]
    r"""Deep latent Gaussian model with L stochastic layers.

    `xi_l ~ N(0, I)`, `h_L = G_L xi_L`, `h_l = T_l(h_{l+1}) + G_l xi_l`, `x ~ p(x | T_0(h_1))`: the T are networks, the
    G matrices. The data stand in the plate `"data"`. A posterior over `xi_1, ..., xi_L` together, as `AmortizedFlow`
    is, puts the flow on every layer's xi.

    Args:
        data_dim: Number of values in a datum.
        latent_dims: Widths of `xi_1, ..., xi_L`, the layer next to the data first.
        hidden_dims: Widths of the hidden layers of every T.
        likelihood: Maps the outputs of T_0, `(*batch, num_params * data_dim)`, to a distribution of data; `None` for
            `BernoulliLikelihood()`.
        network: Makes a T: `(in_features, hidden_dims, out_features) -> module`; `GatedMLP` for instance.

    Raises:
        ValueError: If there is no latent layer; at a call, if the data have another width.

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

    @checked
    def __init__(
        self,
        data_dim: Size,
        latent_dims: Sequence[Size],
        hidden_dims: Sequence[Size],
        likelihood: Likelihood | None = None,
        network: Callable[[int, Sequence[int], int], nn.Module] = MLP,
    ) -> None:
        super().__init__()
        if not latent_dims:
            raise ValueError("latent_dims must hold the width of each layer; got none")
        self.data_dim = data_dim
        self.latent_dims = tuple(latent_dims)
        self.likelihood = likelihood or BernoulliLikelihood()
        out_dims = [self.likelihood.num_params * data_dim, *latent_dims[:-1]]
        self.networks = nn.ModuleList(
            network(latent, hidden_dims, out) for latent, out in zip(latent_dims, out_dims, strict=True)
        )
        self.mixers = nn.ModuleList(nn.Linear(latent, latent, bias=False) for latent in latent_dims)

    def forward(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Run the model on `x: (size, data_dim)`, or on a random `batch_size` rows of it with the likelihood scaled up.

        Returns:
            The observed rows, `(batch_size, data_dim)`.
        """
        networks, mixers = self.networks, self.mixers  # once: Pyro registers every parameter at each look
        with _plate(x, self.data_dim, batch_size) as rows:
            h = x.new_zeros(())
            for layer in reversed(range(len(self.latent_dims))):
                xi = pyro.sample(f"xi_{layer + 1}", dist.Normal(x.new_zeros(self.latent_dims[layer]), 1.0).to_event(1))
                h = networks[layer](h + mixers[layer](xi))
            return _observe(x, rows, h, self.likelihood)


def _plate(x: Tensor, data_dim: int, batch_size: int | None) -> pyro.plate:
    """The plate of the data, or of a minibatch of them."""
    if x.shape[1:] != (data_dim,):
        raise ValueError(f"x must have shape (size, data_dim={data_dim}); got {tuple(x.shape)}")
    return pyro.plate("data", len(x), subsample_size=batch_size, device=x.device)


def _observe(x: Tensor, rows: Tensor, outputs: Tensor, likelihood: Likelihood) -> Tensor:
    """Observe these rows of the data under what the decoder says of them, and return them."""
    width = likelihood.num_params * x.shape[1]
    if outputs.shape[-1] != width:
        raise ValueError(
            f"decoder must return {likelihood.num_params} x {x.shape[1]} = {width} outputs for a datum, for a "
            f"{type(likelihood).__name__} of {x.shape[1]} values; got {outputs.shape[-1]}"
        )
    result: Tensor = pyro.sample("x", likelihood(outputs), obs=x if len(rows) == len(x) else x[rows])
    return result
