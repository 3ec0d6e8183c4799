"""Posteriors of posteriordb: model, data, reference draws."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_nf.interface import untrusted
from pyro_nf.interface.arguments import checked, did_you_mean
from pyro_nf.models.benchmarks.posteriordb.catalogue import ENTRIES, Data, Floats

_VARIABLE = "PYRO_NF_POSTERIORDB"
_T = TypeVar("_T")


class Posterior(NamedTuple):
    """A posterior, `model(*args)`, and what is known of it.

    Attributes:
        name: Its name in posteriordb.
        model: The Pyro model.
        args: The model's arguments: the data.
        reference: Draws of every latent and deterministic site, `{site: (num_chains, num_draws, *shape)}`; in
            posteriordb ten chains of 1,000 nearly independent draws; `None` where the folder has none.
        log_evidence: `log p(data)` in nats, all constants of the densities included; `None` where the folder has none.
        log_evidence_se: Its standard error.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    reference: dict[str, Tensor] | None = None
    log_evidence: float | None = None
    log_evidence_se: float | None = None


class _Record(NamedTuple):
    """What a folder holds of a posterior; the draws are `{site: (num_chains, num_draws, *shape)}`."""

    data: dict[str, Any]
    draws: dict[str, Floats] | None = None
    log_evidence: float | None = None
    log_evidence_se: float | None = None


def names() -> list[str]:
    """Return the names that `load` knows."""
    return sorted(ENTRIES)


@checked
def load(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Posterior:
    """Read a posterior of posteriordb.

    The folder is a checkout of https://github.com/stan-dev/posteriordb, or one with `index.json` (a list with `name`,
    `data`, `reference`, `log_evidence` and `log_evidence_se` of each posterior), `data/DATA.json.gz` and
    `reference/REFERENCE.npz` (`names` and `draws` of the parameters).

    Args:
        name: One of `names()`.
        folder: Where the files are; `None` for the environment variable `PYRO_NF_POSTERIORDB`.
        dtype: Of data and draws. The scales of some posteriors differ by orders of magnitude: float64 is the default.
        device: Of data and draws.

    Raises:
        ValueError: If there is no such name (the nearest one is offered), no such folder, or no such posterior in it.
            If a file is damaged, holds or unpacks to more than 256 MiB, or lies outside the folder, by its name or by
            a link.

    References:
        Magnusson, Torgander, Bürkner, Zhang, Carpenter, Vehtari (2024), "posteriordb: testing, benchmarking and
        developing Bayesian inference algorithms", arXiv:2407.04967.

    Example:
        >>> from pyro_nf.models.benchmarks import posteriordb
        >>> posteriordb.names()[0]
        'arK-arK'
    """
    if name not in ENTRIES:
        hint = did_you_mean(name, ENTRIES)
        raise ValueError(f"name must be one of the {len(ENTRIES)} in posteriordb.names(); got {name!r}{hint}")
    entry, record = ENTRIES[name], _read(_folder(folder), name)
    tensor = partial(torch.as_tensor, dtype=dtype, device=device)
    reference = None
    with untrusted.damaged(f"the folder's record of {name}"):
        given = entry.arguments(_arrays(record.data))
        args = tuple(value if isinstance(value, int) else tensor(value) for value in given)
        if record.draws is not None:
            draws = {**record.draws, **entry.derived(record.draws)}
            reference = {site: tensor(values) for site, values in draws.items()}
    return Posterior(name, entry.model, args, reference, record.log_evidence, record.log_evidence_se)


def _folder(folder: str | os.PathLike[str] | None) -> Path:
    given = os.environ.get(_VARIABLE) if folder is None else folder
    if not given:
        raise ValueError(f"folder must be that of posteriordb's files; give it, or set {_VARIABLE}")
    if not Path(given).is_dir():
        raise ValueError(f"folder must be that of posteriordb's files; there is no folder {str(given)!r}")
    return Path(given)


def _read(folder: Path, name: str) -> _Record:
    if (folder / "index.json").is_file():
        return _read_indexed(folder, name)
    for database in (folder / "posterior_database", folder):
        if (database / "posteriors").is_dir():
            return _read_original(database, name)
    raise ValueError(f"folder must hold index.json or posterior_database/posteriors; {str(folder)!r} has neither")


def _read_indexed(folder: Path, name: str) -> _Record:
    entries = _parse(folder / "index.json", lambda index: {entry["name"]: entry for entry in index})
    if name not in entries:
        raise ValueError(f"folder {str(folder)!r} has no posterior {name!r} in its index.json")
    entry = entries[name]
    with untrusted.damaged(str(folder / "index.json")):
        data, reference = entry["data"], entry["reference"]
    data = _parse(untrusted.inside(folder, "data", f"{data}.json.gz"), dict)
    draws, path = None, untrusted.inside(folder, "reference", f"{reference}.npz")
    if path.is_file():
        array = untrusted.arrays(path)
        draws = _by_site(array("names").tolist(), array("draws"))
    return _Record(data, draws, entry.get("log_evidence"), entry.get("log_evidence_se"))


def _read_original(database: Path, name: str) -> _Record:
    path = database / "posteriors" / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"folder {str(database)!r} has no posterior {name!r}")
    data_name, reference = _parse(path, lambda entry: (entry["data_name"], entry.get("reference_posterior_name")))
    data = _parse(untrusted.inside(database, "data", "data", f"{data_name}.json.zip"), dict)
    path = untrusted.inside(database, "reference_posteriors", "draws", "draws", f"{reference}.json.zip")
    return _Record(data, _parse(path, _draws) if path.is_file() else None)


def _draws(chains: list[dict[str, list[float]]]) -> dict[str, Floats]:
    variables = list(chains[0])
    draws = np.array([[chain[variable] for variable in variables] for chain in chains], np.float64)
    return _by_site(variables, draws.swapaxes(1, 2))


def _parse(path: Path, make: Callable[[Any], _T]) -> _T:
    """Read JSON, as it is, compressed (`.gz`) or the member of an archive (`.zip`), and make something of it."""
    content = untrusted.read(path)
    if path.suffix == ".zip":
        _, member = untrusted.unzip(str(path), content)
        content = member(path.stem)
    with untrusted.damaged(str(path)):
        return make(json.loads(content))


def _arrays(data: Mapping[str, Any]) -> Data:
    return {key: np.array(value, np.float64) if isinstance(value, list) else value for key, value in data.items()}


def _by_site(variables: Sequence[str], draws: Floats) -> dict[str, Floats]:
    """Gather `"beta[1]"`, `"beta[2]"`, ... into `"beta"`, whose last dimension they are; a name alone is a scalar.

    Args:
        variables: Names, in any order.
        draws: `(num_chains, num_draws, num_variables)`.
    """
    positions: dict[str, dict[int, int]] = {}
    for position, variable in enumerate(variables):
        site, _, index = variable.partition("[")
        positions.setdefault(site, {})[int(index.rstrip("]") or 0)] = position
    sites = {}
    for site, where in positions.items():
        sites[site] = draws[..., where[0]] if 0 in where else draws[..., [where[index] for index in sorted(where)]]
    return sites
