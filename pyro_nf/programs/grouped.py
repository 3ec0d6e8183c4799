"""Log densities of sites that look alike, as of the steps of a chain, computed as one batch."""

from collections import defaultdict
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

# Sites that are worth a batch of their own.
_MIN_ALIKE = 4
# Distributions whose parameters, as they keep them, have the shape of the batch, and then their own.
_PLAIN = (
    dist.Bernoulli,
    dist.Beta,
    dist.Binomial,
    dist.Categorical,
    dist.Exponential,
    dist.Gamma,
    dist.Geometric,
    dist.Laplace,
    dist.LogNormal,
    dist.NegativeBinomial,
    dist.Normal,
    dist.Poisson,
    dist.StudentT,
)


def compute_log_prob(trace: poutine.Trace) -> None:
    """Compute the log densities of a trace's sites as `Trace.compute_log_prob` does, those that look alike together."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and "log_prob" not in site and type(site["fn"]) in _PLAIN:
            value = site["value"]
            if isinstance(value, Tensor):
                alike[_looks(site["fn"], value)].append(name)
    for names in alike.values():
        if len(names) >= _MIN_ALIKE:
            _compute(trace, names)
    trace.compute_log_prob()


def _parameters(fn: Any) -> dict[str, Tensor]:
    own = {name: vars(fn)[name] for name in fn.arg_constraints if name in vars(fn)}
    if "logits" in own:
        own.pop("probs", None)
    return own


def _looks(fn: Any, value: Tensor) -> Any:
    shapes = tuple((name, parameter.shape, parameter.dtype) for name, parameter in _parameters(fn).items())
    return type(fn), fn.batch_shape, value.shape, value.dtype, shapes


def _compute(trace: poutine.Trace, names: list[str]) -> None:
    sites = [trace.nodes[name] for name in names]
    first = sites[0]["fn"]
    rank = len(first.batch_shape)
    parameters = {name: stacked([_parameters(site["fn"])[name] for site in sites]) for name in _parameters(first)}
    values = stacked([site["value"] for site in sites])
    # A site's number stands to the left of all that its value and its batch have.
    depth = max(rank, values.dim() - 1)
    parameters = {name: _deepened(each, depth - rank) for name, each in parameters.items()}
    values = _deepened(values, depth - (values.dim() - 1))
    log_probs = type(first)(**parameters, validate_args=False).log_prob(values)
    rows = log_probs.unbind()
    for number, site in enumerate(sites):
        row = number if len(rows) > 1 else 0
        value = rows[row]
        value._row = Row(log_probs, row)
        site["unscaled_log_prob"] = value
        site["log_prob"] = scale_and_mask(value, site["scale"], site["mask"])
        site["log_prob_sum"] = torch.zeros(())  # which nobody asks for where latents are summed out


def stacked(tensors: list[Tensor]) -> Tensor:
    """Stack tensors; what is the same tensor in all of them becomes a single row."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0][None]
    return torch.stack(tensors)


class Row:
    """A row of a tensor that holds many alike: rows go from operation to operation together, and are not cut out.

    Attributes:
        tables: The tensor, `(number of rows, *shape)`.
        row: Which one.
    """

    __slots__ = ("row", "tables")

    def __init__(self, tables: Tensor, row: int) -> None:
        self.tables, self.row = tables, row

    @property
    def shape(self) -> torch.Size:
        """The row's own shape."""
        return self.tables.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.tables.dtype

    def value(self) -> Tensor:
        """Return the row."""
        return self.tables[self.row]

    def packed(self, shape: tuple[int, ...], sizes: tuple[int, ...], summed: tuple[int, ...]) -> "Row":
        """Reshape the row, expand it, and sum over dimensions; all the rows of a tensor at once."""
        known = getattr(self.tables, "_packings", None)
        if known is None:
            known = self.tables._packings = {}  # type: ignore[attr-defined]
        key = shape, sizes, summed
        if key not in known:
            number = len(self.tables)
            tables = self.tables if shape == self.shape else self.tables.reshape(number, *shape)
            tables = tables if sizes == shape else tables.expand(number, *sizes)
            known[key] = tables.sum(summed) if summed else tables
        return Row(known[key], self.row)


def row_of(tensor: Tensor) -> Row:
    """Return a tensor as a row, the one that it is if it was cut out of others."""
    row: Row | None = getattr(tensor, "_row", None)
    if row is None:
        row = tensor._row = Row(tensor[None], 0)  # type: ignore[attr-defined]
    return row


def rows_together(rows: list[Row]) -> Tensor:
    """Return rows of the same shape as one tensor, `(number, *shape)`; a single row if all are the same."""
    first = rows[0]
    if all(row.tables is first.tables for row in rows):
        if all(row.row == first.row for row in rows):
            return first.tables if len(first.tables) == 1 else first.tables[first.row : first.row + 1]
        return first.tables.index_select(0, torch.tensor([row.row for row in rows], device=first.tables.device))
    parts: list[Tensor] = []
    start = 0
    while start < len(rows):  # runs of one tensor's rows
        end = start
        while end < len(rows) and rows[end].tables is rows[start].tables:
            end += 1
        run = rows[start:end]
        index = torch.tensor([row.row for row in run], device=run[0].tables.device)
        parts.append(run[0].tables.index_select(0, index))
        start = end
    return torch.cat(parts)


def _deepened(tensor: Tensor, number: int) -> Tensor:
    """Put dimensions of size 1 behind the first one."""
    return tensor.reshape(tensor.shape[:1] + (1,) * number + tensor.shape[1:]) if number else tensor
