"""Tensors that are rows of a larger one, and are computed with as that one as long as it can be."""

import torch
from torch import Tensor


class Row:
    """A row of a tensor that holds many alike: rows go from operation to operation together, and are not cut out.

    Attributes:
        tables: The tensor, `(number of rows, *shape)`.
        row: Which one.
    """

    __slots__ = ("row", "tables")

    def __init__(self, tables: Tensor, row: int) -> None:
        self.tables, self.row = tables, row % len(tables)

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


def row_of(tensor: Tensor | Row) -> Row:
    """Return a tensor as a row, the one that it is if it was cut out of others."""
    if isinstance(tensor, Row):
        return tensor
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
