"""HI-VAE: a variational autoencoder of tables with columns of several kinds and missing entries."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_nf.interface.arguments import Size, checked
from pyro_nf.models.rows import IncompleteRows, Layout
from pyro_nf.models.tables import Table
from pyro_nf.networks import MLP, MaskedLinear, start_at_zero


class HIVAE(PyroModule):  # type: ignore[misc]
    r"""Variational autoencoder for incomplete heterogeneous data, the component of its Gaussian mixture summed out.

    For a row: a component `s ~ Categorical(1/S, ..., 1/S)`; `z ~ N(mu_s, I)`; `y = g(z)`, a part `y_d` for each column;
    and `x_d ~ p_d(x_d | h_d(y_d) + shift_sd)` for each column that is observed (`IncompleteRows`), h_d linear. Columns
    are normalised by their observed entries, and the likelihoods denormalised. What is not observed enters nowhere.

    The latent site is `xi`, standard normal, with `z = mu_s + xi`: its posterior does not fall apart into components.
    s is summed out exactly, where the paper relaxes it (Gumbel softmax): one bound less.

    With `neighbours=True`, y_d depends on the observed ones among the columns before d too ("missing flow"), through
    a network with MADE's masks: `p(x_d | z, s, x_1, ..., x_{d-1})`. The density stays normalised, for any set of
    observed columns, which it would not if columns depended on each other both ways.

    Args:
        table: The table, for its columns and their normalisation. Its rows are the arguments of `forward`.
        latent_dim: Width of z.
        num_components: S.
        y_dim: Width of each y_d.
        hidden_dims: Widths of g's hidden layers; empty, as in the authors' code, for a linear g.
        neighbours: Whether columns depend on the columns before them.
        neighbour_dim: Width of the hidden layer of that network.

    Raises:
        ValueError: If a width is not positive.

    References:
        Nazabal, Olmos, Ghahramani, Valera (2020), "Handling incomplete heterogeneous data using VAEs",
        arXiv:1807.03653, equations 4-11. Germain, Gregor, Murray, Larochelle (2015), "MADE", arXiv:1502.03509 (the
        masks).

    Example:
        >>> import torch
        >>> from pyro_nf.guides import AmortizedFlow
        >>> from pyro_nf.models import HIVAE, TableEncoder, tables
        >>> columns = [tables.Column("height", "real"), tables.Column("smokes", "cat", 2)]
        >>> values = torch.tensor([[1.7, 0.0], [1.8, 1.0], [float("nan"), 0.0]])
        >>> table = tables.make(columns, values)
        >>> model, encoder = HIVAE(table, latent_dim=2), TableEncoder(table, (16,), 8)
        >>> guide = AmortizedFlow(model, encoder)
        >>> guide(table.values, table.observed)["xi"].shape
        torch.Size([3, 2])
    """

    @checked
    def __init__(
        self,
        table: Table,
        latent_dim: Size = 10,
        num_components: Size = 10,
        y_dim: Size = 5,
        hidden_dims: Sequence[Size] = (),
        neighbours: bool = False,
        neighbour_dim: Size = 64,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.layout = Layout(table)
        like, num_columns = table.values, len(table.columns)
        of_local = self.layout.column_of(lambda group: group.num_local)
        of_shared = self.layout.column_of(lambda group: group.num_shared)
        self.decoder = MLP(latent_dim, hidden_dims, num_columns * y_dim).to(like)
        # A parameter of column d sees y_d alone.
        of_y = torch.arange(num_columns, device=like.device).repeat_interleave(y_dim)
        self.heads = MaskedLinear(of_local[:, None] == of_y).to(like)
        # Components that start equal would stay equal.
        self.locs = nn.Parameter(torch.randn(num_components, latent_dim).to(like))
        self.shifts = nn.Parameter(torch.zeros(num_components, len(of_local)).to(like))
        self.shared = nn.Parameter(torch.zeros(num_components, len(of_shared)).to(like))
        self.register_buffer("logits", like.new_zeros(num_components))
        self.neighbours = _Neighbours(table, neighbour_dim, y_dim) if neighbours else None

    def forward(self, x: Tensor, observed: Tensor, batch_size: int | None = None) -> Tensor:
        """Run the model on a table's rows, or on a random `batch_size` of them with the likelihood scaled up.

        Args:
            x: `Table.values`, `(rows, columns)`; what stands where `observed` is False has no effect.
            observed: `(rows, columns)`, True where the entry is observed.
            batch_size: Rows of a minibatch; `None` for all.

        Returns:
            The rows, `(batch_size, columns)`, 0 where an entry is not observed.

        Raises:
            ValueError: If the shapes do not fit.
        """
        self._check(x, observed)
        with pyro.plate("rows", len(x), subsample_size=batch_size, device=x.device) as rows:
            xi = pyro.sample("xi", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            if len(rows) < len(x):
                x, observed = x[rows], observed[rows]
            x = torch.where(observed, x, 0.0)  # data may hold NaN where nothing is observed
            result: Tensor = pyro.sample("x", self.likelihood(xi, x, observed), obs=x)
        return result

    def likelihood(self, xi: Tensor, x: Tensor, observed: Tensor) -> IncompleteRows:
        """Return the distribution of the rows given the latents, the component summed out.

        Args:
            xi: `(*batch, rows, latent_dim)`.
            x: `(rows, columns)`: with `neighbours`, the observed ones enter.
            observed: `(rows, columns)`.
        """
        decoder, heads, locs, shifts, shared = self.decoder, self.heads, self.locs, self.shifts, self.shared
        y = decoder(locs + xi[..., None, :])
        if self.neighbours is not None:
            y = y + self.neighbours(x, observed)[..., None, :]
        return IncompleteRows(self.layout, self.logits, heads(y) + shifts, shared, observed)

    def _check(self, x: Tensor, observed: Tensor) -> None:
        num_columns = len(self.layout.places)
        if x.dim() != 2 or x.shape[1] != num_columns or observed.shape != x.shape:
            raise ValueError(
                f"x and observed must have shape (rows, {num_columns}), as the table that the model was made "
                f"for; got {tuple(x.shape)} and {tuple(observed.shape)}"
            )


class TableEncoder(nn.Module):
    """Network from the observed entries of a row to a vector, `(rows, out_features)`: the encoder of a guide.

    A number enters normalised (positive ones and counts by `log(1 + x)`), a class as an indicator for each class, an
    ordinal as one for each class that it has reached; and, for each column, whether it is observed. What is not
    observed enters as 0, whatever its value.

    Args:
        table: The table, for its columns and their normalisation.
        hidden_dims: Widths of the hidden layers.
        out_features: Width of the output, after a nonlinearity.
    """

    @checked
    def __init__(self, table: Table, hidden_dims: Sequence[Size], out_features: Size) -> None:
        super().__init__()
        self.features = _Features(table)
        network = MLP(len(self.features.column_of), hidden_dims, out_features)
        self.network = nn.Sequential(network, nn.Tanh()).to(table.values)

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return the rows' contexts."""
        context: Tensor = self.network(self.features(x, observed))
        return context


class _Features(nn.Module):
    """What a network sees of the observed entries of a row.

    Attributes:
        column_of: Index of each feature's column, `(features,)`.
    """

    column_of: Tensor
    loc: Tensor
    scale: Tensor
    threshold: Tensor
    is_number: Tensor
    is_logged: Tensor
    is_ordinal: Tensor

    def __init__(self, table: Table) -> None:
        super().__init__()
        like = table.values
        # A feature is of column d and class k; a number has one feature.
        sizes = [max(1, column.num_classes) for column in table.columns]
        features = [(d, k) for d, size in enumerate(sizes) for k in range(size)]
        kinds = [table.columns[d].kind for d, _ in features]
        loc, scale = [], []
        for d, column in enumerate(table.columns):
            values = table.values[table.observed[:, d], d]
            values = values if column.kind == "real" else values.log1p()
            loc.append(values.mean())
            scale.append(values.std(correction=0))
        column_of, threshold = torch.tensor(features, device=like.device).unbind(-1)
        flags = {
            "is_number": [kind in ("real", "pos", "count") for kind in kinds],
            "is_logged": [kind in ("pos", "count") for kind in kinds],
            "is_ordinal": [kind == "ordinal" for kind in kinds],
        }
        for name, flag in flags.items():
            self.register_buffer(name, torch.tensor(flag, device=like.device))
        scales = torch.stack(scale)[column_of]
        self.register_buffer("loc", torch.stack(loc)[column_of])
        self.register_buffer("scale", torch.where(scales > 0, scales, 1.0))
        self.register_buffer("threshold", threshold.to(like))
        self.register_buffer("column_of", torch.cat([column_of, torch.arange(len(sizes), device=like.device)]))

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return `(rows, features)`."""
        column_of = self.column_of[: len(self.threshold)]
        value = torch.where(observed, x, 0.0).index_select(-1, column_of)
        # The logarithm of what is not logged may be NaN, and is not taken.
        number = torch.where(self.is_logged, torch.where(self.is_logged, value, 0.0).log1p(), value)
        number = (number - self.loc) / self.scale
        reached = torch.where(self.is_ordinal, value >= self.threshold, value == self.threshold).to(x.dtype)
        features = torch.where(self.is_number, number, reached)
        seen = observed.index_select(-1, column_of)
        return torch.cat([torch.where(seen, features, 0.0), observed.to(x.dtype)], -1)


class _Neighbours(nn.Module):
    """Network from the observed columns to all y, in which y_d sees the columns before d alone; zero at first."""

    def __init__(self, table: Table, hidden_dim: int, y_dim: int) -> None:
        super().__init__()
        self.features = _Features(table)
        num_columns = len(table.columns)
        # MADE's masks, by column: a hidden unit of degree k sees columns <= k, y_d sees units of degree < d.
        device = table.values.device
        degrees = torch.arange(hidden_dim, device=device) * max(num_columns - 1, 1) // hidden_dim
        of_y = torch.arange(num_columns, device=device).repeat_interleave(y_dim)
        first = MaskedLinear(degrees[:, None] >= self.features.column_of)
        last = MaskedLinear(of_y[:, None] > degrees)
        start_at_zero(last)
        self.network = nn.Sequential(first, nn.Tanh(), last).to(table.values)

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return `(rows, columns * y_dim)`."""
        y: Tensor = self.network(self.features(x, observed))
        return y
