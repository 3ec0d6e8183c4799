"""Missing entries filled in: by HI-VAE, by the columns' means as a baseline, and how well: the errors of its tables."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_nf.interface.arguments import Size, checked
from pyro_nf.models.hivae import HIVAE
from pyro_nf.models.tables import Column, Table


class Posterior(Protocol):
    """What draws latents: our guides do."""

    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return `{site: (num_samples, *shape)}`."""


class Imputation(NamedTuple):
    """A table's missing entries, predicted from the observed ones of their rows.

    Attributes:
        mean: The table with the predictive mean of a number or count, and the most probable class, where an entry is
            not observed, `(rows, columns)`.
        mode: The same with the likelihood's mode, averaged over draws, in place of its mean.
        log_prob: Log predictive density of each entry that is known but not observed, in nats, each given the observed
            ones alone; NaN elsewhere, `(rows, columns)`.
    """

    mean: Tensor
    mode: Tensor
    log_prob: Tensor


@torch.no_grad()
@checked
def impute(model: HIVAE, guide: Posterior, table: Table, num_samples: Size = 50, batch_size: Size = 500) -> Imputation:
    """Predict the missing entries of a table by draws of the latents.

    Args:
        model: The fitted model.
        guide: Its fitted guide.
        table: The table.
        num_samples: Draws for each row.
        batch_size: Rows that are worked on at once.

    Raises:
        ValueError: If a number is not positive.
    """
    mean, mode = table.values.clone(), table.values.clone()
    log_prob = torch.full_like(mean, math.nan)
    for rows in torch.arange(len(mean), device=mean.device).split(batch_size):
        x, observed, held_out = table.values[rows], table.observed[rows], table.held_out[rows]
        xi = guide.sample_posterior(num_samples, x, observed)["xi"]
        predicted = model.likelihood(xi, x, observed).given(x).pooled()
        mean[rows] = torch.where(observed, x, predicted.mean)
        mode[rows] = torch.where(observed, x, predicted.mode)
        log_prob[rows] = torch.where(held_out, predicted.entry_log_prob(x, held_out), math.nan)
    return Imputation(mean, mode, log_prob)


@checked
def impute_by_column(table: Table) -> Tensor:
    """Return the table with each entry that is not observed replaced by its column's mean, or most frequent class.

    Only observed entries count.

    Returns:
        `(rows, columns)`.
    """
    filled = table.values.clone()
    for d, column in enumerate(table.columns):
        seen = table.observed[:, d]
        values = table.values[seen, d]
        typical = values.mean() if column.num_classes == 0 else values.mode().values
        filled[~seen, d] = typical
    return filled


@checked
def errors(table: Table, imputed: Tensor) -> dict[str, float]:
    r"""Return the error of each column on the entries that are known but not observed.

    Numbers (real, positive, count): the root of the mean squared error over the range of the column's known values,
    NRMSE. Categorical: the share of wrong classes. Ordinal: the mean distance of the classes over their number.

    Args:
        table: The table.
        imputed: The table with values for all entries, `(rows, columns)`.

    Returns:
        `{column: error}`, without the columns that have no such entries.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Nazabal, Olmos, Ghahramani, Valera (2020), arXiv:1807.03653, section 5.2.
    """
    if imputed.shape != table.values.shape:
        raise ValueError(f"imputed must have the table's shape {tuple(table.values.shape)}; got {tuple(imputed.shape)}")
    found = {}
    for d, column in enumerate(table.columns):
        where = table.held_out[:, d]
        if bool(where.any()):
            found[column.name] = _error(column, table.values[:, d], table.values[where, d], imputed[where, d])
    return found


@checked
def error_by_kind(columns: Sequence[Column], by_column: dict[str, float]) -> dict[str, float]:
    """Return the mean error of the columns of each kind, and of `all`."""
    kinds = {column.name: column.kind for column in columns}
    groups: dict[str, list[float]] = {"all": list(by_column.values())}
    for name, error in by_column.items():
        groups.setdefault(kinds[name], []).append(error)
    return {kind: sum(values) / len(values) for kind, values in groups.items()}


def _error(column: Column, known: Tensor, truth: Tensor, imputed: Tensor) -> float:
    if column.kind == "cat":
        return float((truth != imputed).to(truth.dtype).mean())
    if column.kind == "ordinal":
        return float((truth - imputed).abs().mean()) / column.num_classes
    known = known[~known.isnan()]
    spread = float(known.max() - known.min())
    # A constant column has no range: any error at all is then infinite, and none is 0.
    error = float((truth - imputed).square().mean().sqrt())
    return error / spread if spread > 0 else (0.0 if error == 0 else torch.inf)
