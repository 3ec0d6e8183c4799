"""Tables with columns of several kinds and missing entries: read, checked, and three of them from the literature."""

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_nf.interface import untrusted
from pyro_nf.interface.arguments import checked, did_you_mean
from pyro_nf.models.files import Files, Remote

KINDS = ("real", "pos", "count", "cat", "ordinal")
_WITH_CLASSES = ("cat", "ordinal")

_FOLDER = "hivae"
_ADDRESS = "https://raw.githubusercontent.com/probabilistic-learning/HI-VAE/master/{name}/{part}.csv"
# SHA-256 of the files there.
_FILES = MappingProxyType(
    {
        "Adult": {
            "data": "a38d3e228cc9cc12eca35ea3439706906aae966372fdd791ef8f9c347b37cb77",
            "data_types": "6f5fe8db1634101eed8b4c1549b3ae1f4f92dca88b34af13a9b5d8e8e5012fd5",
            "Missing10_1": "8328666a0c79bccd541e0a3ddce5ae8fb4b1bbb2451036e1aac17094eab94d3a",
            "Missing20_1": "5640540fcbb8424d1b24edddb9b7edd9985e4e4a9011dc76210185fb65f1dfcb",
            "Missing30_1": "a663e57381397b51645677e1e6b81efe42b48ea90f7b969369fb487d4921d200",
            "Missing40_1": "f10dade39330c4be99c5b8a8b808e767a57d5188cc2f9922346f92fb8f88d0c0",
            "Missing50_1": "93b254301c76b5c9acc8148e4e502020c5b41d1b6fb791585bf2888ff868c4d6",
        },
        "Breast": {
            "data": "d4d43352cba0201a31c2416bc9fad9fe8ca16178b144bbbf4da652430821808f",
            "data_types": "8b1ba8de34d376124497dd13fa6f8fe765632223ee61ccabe30df3c456ec8393",
            "Missing10_1": "7809520f0d9d6b0018ff56169bc7c396526a3d9c88e7ab9c22c6fbefd5eba83c",
            "Missing20_1": "407fc07c131418667d50920945e305373887303d561159b50a127f51a8c86cc6",
            "Missing30_1": "7963c05e78ab96a11d8c9b93646c68e3dc621f65594960437586cbd7052f2641",
            "Missing40_1": "6ee76b3b4ebec20a1df3aedde6e956a18fe37b89106a26f69a26b6bdfbcc0483",
            "Missing50_1": "9b190fee89bbf2bd8b57742607e3b96205b7d770b6adf16e96b677a10c3b29d9",
        },
        "Wine": {
            "data": "e53e2d65da18808d241fd0fd743b7a40fbf4117727a104c1a342a0a789a955fb",
            "data_types": "1574fdccbc8a651c0e69f0780d089fad9792919ba357c186ba52673437c52716",
            "Missing10_1": "97de56e4c2cd05ef39ff67034b4a30e8678d6f48baa0dfc95940a93d68c041f3",
            "Missing20_1": "52e90483c7f11905a23955208fac5d235f2991b3bcdbd840d185f8b2b49ca8bf",
            "Missing30_1": "9bc14c39b4d2b4233b64d0f054d6ed33dbc4565d6672c2a3a84028bc6b8eb487",
            "Missing40_1": "c9ccd02b240dad65e8b4800b19649cf3b13356040ce515b3dc81f3db9274522c",
            "Missing50_1": "f304bb0712a745909cd6f97af7104e469bf3555dcf03c4ee6872682acc65c3f2",
        },
    }
)
PERCENTS = (10, 20, 30, 40, 50)


class Column(NamedTuple):
    """What a column of a table holds.

    Attributes:
        name: Its name, for messages.
        kind: "real"; "pos" (not negative); "count" (0, 1, 2, ...); "cat" (a class) or "ordinal" (an ordered one).
        num_classes: Number of classes of a "cat" or an "ordinal"; 0 for the others.
    """

    name: str
    kind: str
    num_classes: int = 0

    def __str__(self) -> str:
        return f"column {self.name!r} ({self.kind})"


class Table(NamedTuple):
    """Columns of several kinds, with missing entries. Made by `make`, which checks it.

    Attributes:
        columns: What each column holds.
        values: `(rows, columns)`: numbers, and for classes their index from 0; NaN where a value is not known.
        observed: `(rows, columns)`, `True` where a model may see the value.
    """

    columns: tuple[Column, ...]
    values: Tensor
    observed: Tensor

    @property
    def held_out(self) -> Tensor:
        """Where the value is known but not observed: what imputations are measured on, `(rows, columns)`."""
        return ~self.observed & ~self.values.isnan()


def names() -> list[str]:
    """Return the names that `load` knows."""
    return sorted(_FILES)


@checked
def load(
    name: str,
    percent_missing: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Table:
    """Return one of HI-VAE's tables, with so many entries held out, missing completely at random.

    The files are taken from the folder `hivae` in the folder that the environment variable `PYRO_NF_DATA` names, as
    `Wine_data.csv.gz` and so on; those that are not there are downloaded once, and their checksums are compared.

    Args:
        name: "Wine" (6,497 x 13), "Adult" (32,561 x 12) or "Breast" (699 x 10).
        percent_missing: 10, 20, 30, 40 or 50.
        dtype: Of the values.
        device: Of the tensors.

    Raises:
        ValueError: If there is no such table, or `PYRO_NF_DATA` names no folder; if a file is damaged, as `read`.
        ConnectionError: If a file has to be downloaded and cannot be.
        ImportError: If it has to be downloaded and pooch is not installed.

    References:
        Nazabal, Olmos, Ghahramani, Valera (2020), "Handling incomplete heterogeneous data using VAEs",
        arXiv:1807.03653, section 5; the tables are from the UCI machine learning repository.
    """
    if name not in _FILES:
        raise ValueError(f"name must be one of {', '.join(names())}; got {name!r}{did_you_mean(name, _FILES)}")
    if percent_missing not in PERCENTS:
        raise ValueError(f"percent_missing must be one of {', '.join(map(str, PERCENTS))}; got {percent_missing!r}")
    data, types, missing = (_file(name, part) for part in ("data", "data_types", f"Missing{percent_missing}_1"))
    return _table(data, types, missing, dtype, device)


@checked
def read(
    data: str | os.PathLike[str],
    types: str | os.PathLike[str],
    missing: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Table:
    """Read a table in HI-VAE's format: comma-separated files, as they are or compressed (`.gz`).

    Args:
        data: The table, without names of columns; `NaN` or nothing where a value is not known. Classes are whole
            numbers, in a range from any first one.
        types: A line for each column, after the line `type,dim,nclass`; type is one of "real", "pos", "count", "cat",
            "ordinal", and nclass the number of classes of the last two.
        missing: A line `row,column` for each entry to hold out, both counted from 1; `None` for none.
        dtype: Of the values.
        device: Of the tensors.

    Raises:
        ValueError: If an entry is no number or not of its column's kind, or the files do not fit; with the column's
            number, from 1. If a file holds or unpacks to more than 256 MiB.
    """
    hidden = None if missing is None else _sheet(Path(missing))
    return _table(_sheet(Path(data)), _sheet(Path(types)), hidden, dtype, device)


@checked
def make(columns: Sequence[Column], values: Tensor, observed: Tensor | None = None) -> Table:
    """Return a table, after a look at every entry.

    Args:
        columns: What each column holds.
        values: `(rows, columns)`: numbers, and for classes their index from 0; NaN where a value is not known.
        observed: `(rows, columns)`, `True` where a model may see the value; `None` for wherever it is known.

    Raises:
        ValueError: If a column's kind is unknown or an entry is not of its column's kind; if nothing is observed in a
            column; if the shapes do not fit.
    """
    for column in columns:
        _check_column(column)
    if values.dim() != 2 or values.shape[1] != len(columns) or not values.is_floating_point():
        raise ValueError(
            f"values must be floating-point numbers of shape (rows, {len(columns)}), one column for each of columns; "
            f"got {values.dtype} of shape {tuple(values.shape)}"
        )
    known = ~values.isnan()
    observed = known if observed is None else observed
    if observed.shape != values.shape or observed.dtype != torch.bool:
        raise ValueError(
            f"observed must be True or False for each entry of values, of shape {tuple(values.shape)}; "
            f"got {observed.dtype} of shape {tuple(observed.shape)}"
        )
    for d, column in enumerate(columns):
        _check_values(column, values[:, d])
        if not bool((observed & known)[:, d].any()):
            raise ValueError(f"{column} has no observed entry: nothing can be learned of it; leave it out")
    return Table(tuple(columns), values, observed & known)


def _check_column(column: Column) -> None:
    if column.kind not in KINDS:
        raise ValueError(f"column {column.name!r} must be one of {', '.join(KINDS)}; got {column.kind!r}")
    if column.kind in _WITH_CLASSES and column.num_classes < 2:
        raise ValueError(f"{column} must have at least two classes; got {column.num_classes}")


def _check_values(column: Column, values: Tensor) -> None:
    """Raise a `ValueError` at the first entry that is not of the column's kind."""
    whole = values == values.round()
    if column.kind == "real":
        good, accepted = torch.ones_like(whole), "finite numbers"
    elif column.kind == "pos":
        good, accepted = values >= 0, "finite numbers that are not negative"
    elif column.kind == "count":
        good, accepted = whole & (values >= 0), "whole numbers that are not negative"
    else:
        good = whole & (values >= 0) & (values < column.num_classes)
        accepted = f"classes, whole numbers in a range of {column.num_classes}"
    bad = ~values.isnan() & ~(good & values.isfinite())
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        got = f"{float(values[row]):g}" + (", counted from its lowest," if column.kind in _WITH_CLASSES else "")
        raise ValueError(f"{column} must hold {accepted}; got {got} in row {row + 1}")


class _Sheet(NamedTuple):
    """The entries of a comma-separated file, line by line, and its name for messages."""

    name: str
    lines: list[list[str]]


def _sheet(path: Path, sha256: str | None = None) -> _Sheet:
    content = untrusted.read(path, sha256=sha256)
    with untrusted.damaged(str(path)):
        # Line ends of all systems: HI-VAE's files have three kinds.
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline=None)
        return _Sheet(path.name, [line for line in csv.reader(text) if line])


def _table(
    data: _Sheet,
    types: _Sheet,
    missing: _Sheet | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Table:
    columns = _read_types(types)
    rows = _read_numbers(data, columns)
    values = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(columns))
    for d, column in enumerate(columns):
        if column.kind in _WITH_CLASSES:
            known = values[:, d][~values[:, d].isnan()]
            if len(known):
                values[:, d] -= known.min()
    observed = ~values.isnan()
    if missing is not None:
        positions = _read_positions(missing, len(rows), columns)
        observed[positions[:, 0] - 1, positions[:, 1] - 1] = False
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return make(columns, values.to(device, dtype), observed.to(device))


def _read_types(sheet: _Sheet) -> tuple[Column, ...]:
    header, *lines = sheet.lines or [[]]
    if header[:1] != ["type"] or "nclass" not in header:
        raise ValueError(f"{sheet.name} must begin with the line type,dim,nclass; got {','.join(header)!r}")
    columns = []
    for number, line in enumerate(lines, 1):
        entry = dict(zip(header, line, strict=False))
        kind, classes = entry["type"].strip(), entry.get("nclass", "").strip()
        if kind in _WITH_CLASSES and not classes.isdigit():
            raise ValueError(f"{sheet.name}: column {number} ({kind}) must have its number of classes; got {classes!r}")
        columns.append(Column(str(number), kind, int(classes) if kind in _WITH_CLASSES else 0))
        _check_column(columns[-1])
    return tuple(columns)


def _read_numbers(sheet: _Sheet, columns: Sequence[Column]) -> list[list[float]]:
    rows = []
    for number, line in enumerate(sheet.lines, 1):
        if len(line) != len(columns):
            raise ValueError(f"{sheet.name}: row {number} has {len(line)} entries; the types are of {len(columns)}")
        rows.append([_number(text, column, number) for text, column in zip(line, columns, strict=True)])
    return rows


def _number(text: str, column: Column, row: int) -> float:
    try:
        return float(text) if text.strip() else math.nan
    except ValueError:
        raise ValueError(f"{column} must hold numbers, or NaN; got {text!r} in row {row}") from None


def _read_positions(sheet: _Sheet, num_rows: int, columns: Sequence[Column]) -> Tensor:
    positions = []
    for line in sheet.lines:
        try:
            row, column = (int(text) for text in line)
        except ValueError:
            raise ValueError(f"{sheet.name} must hold lines row,column; got {','.join(line)!r}") from None
        if not (1 <= row <= num_rows and 1 <= column <= len(columns)):
            raise ValueError(
                f"{sheet.name} must hold rows of 1 .. {num_rows} and columns of 1 .. {len(columns)}; "
                f"got row {row}, column {column}"
            )
        positions.append((row, column))
    return torch.tensor(positions, dtype=torch.long).reshape(-1, 2)


def _file(name: str, part: str) -> _Sheet:
    """Return a file of one of HI-VAE's tables, downloaded if need be."""
    files, file, checksum = Files(_FOLDER), f"{name}_{part}.csv", _FILES[name][part]
    path = files.local(f"{file}.gz") or files.get(file, Remote(_ADDRESS.format(name=name, part=part), checksum))
    return _sheet(path, checksum)
