r"""Sums over discrete latents: `log sum_z exp(sum of factors)`, in the order that the factors' dimensions allow.

Factors are the log densities of sites, with a dimension for each discrete latent that they depend on and for each plate
that they stand in. Plates are products of independent factors, so sums inside a plate are done before the product over
it (tensor variable elimination). Within one plate context latents are
eliminated in rounds: in each round those that share no factor, with all that look alike as one batched operation. A
chain of T latents, as `pyro.markov` makes, thus takes some log2(T) rounds.

What was done is noted on a tape: from its end to its beginning, each latent can be drawn given those that were
eliminated after it (forward filtering, backward sampling).

References:
    Obermeyer, Bingham, Jankowiak, Pradhan, Chiu, Rush, Goodman (2019), "Tensor variable elimination for plated factor
    graphs", arXiv:1902.03210.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import opt_einsum
import torch
from pyro import poutine
from torch import Tensor

from pyro_nf.programs.rows import Row, row_of, rows_together
from pyro_nf.programs.sites import is_data, is_enumerated, is_latent

# Numbers in the largest table of a sum, for one draw, and in tables whose size does not matter.
_MAX_TABLE, _SMALL_TABLE = 2**22, 2**10


class Elimination(NamedTuple):
    """A latent that was summed out.

    Attributes:
        dim: Its symbol.
        tables: Sums of the factors that held it, and of those that held others like it.
        row: Which of the tables is its own.
        dims: Symbols of a table's dimensions; `dim` is one of them.
    """

    dim: str
    tables: Tensor
    row: int
    dims: str


class Term(NamedTuple):
    """A part of a log density: that of a site, or of sites that are linked by discrete latents, these summed out.

    Attributes:
        sites: Names of the sites.
        plates: Names of the plates that it is a product over, in the order of `value`'s dimensions.
        value: Without its scale, of the plates' sizes.
        scale: By how much it counts.
    """

    sites: tuple[str, ...]
    plates: tuple[str, ...]
    value: Tensor
    scale: Any


class Contraction(NamedTuple):
    """What a sum over a trace's discrete latents came to.

    Attributes:
        terms: Parts of the log density, which add up to it.
        tape: The latents in the order in which they were summed out.
        symbols: `{site: the symbol of its dimension}`.
        plates: `{plate: its symbol}`.
        plate_dims: `{plate: its dimension in the model}`, negative.
    """

    terms: list[Term]
    tape: list[Elimination]
    symbols: dict[str, str]
    plates: dict[str, str]
    plate_dims: dict[str, int]

    def total(self) -> Tensor:
        """Return the log density, `()`."""
        return torch.stack([_scaled(term.value.sum(), term.scale) for term in self.terms]).sum()


def contract(trace: poutine.Trace, tilt: dict[str, Tensor] | None = None, scaled: bool = True) -> Contraction:
    """Sum out the discrete latents of a model's trace whose log densities are computed.

    Scales, as of subsampled plates, multiply the logarithm of the sum; masks hide data inside it.

    Args:
        trace: The trace.
        tilt: What to add to the log densities of latents, for each of their values, `{site: (*plates, K)}`.
        scaled: Whether scales count.

    Raises:
        ValueError: If sites that depend on one latent have different scales, or a table is too large.
    """
    sites = {
        name: site for name, site in trace.nodes.items() if is_latent(site) or is_data(site) or is_enumerated(site)
    }
    symbols = _Symbols()
    owners = {}
    for name, site in sites.items():
        if site["infer"].get("_enumerate_dim") is not None:
            owners[name] = symbols.of_latent(site["infer"]["_dim_to_id"][site["infer"]["_enumerate_dim"]])
    sums = set(owners.values())
    factors: list[_Factor] = []
    alone: list[_Factor] = []
    for name, site in sites.items():
        plates = frozenset(symbols.of_plate(frame) for frame in site["cond_indep_stack"] if frame.vectorized)
        row, dims = _packed(site, symbols)
        if tilt is not None and name in tilt:
            row = _tilted(row, dims, tilt[name], site, owners[name], symbols)
        factor = _Factor((name,), row, dims, plates, site["scale"])
        (alone if sums.isdisjoint(dims) else factors).append(factor)
    names = {symbol: name for name, symbol in symbols.plates.items()}
    eliminator = _Eliminator({dim: name for name, dim in owners.items()})
    done = alone + [eliminator.component(component, sums) for component in _components(factors, sums)]
    terms = [
        Term(each.sites, tuple(names[dim] for dim in each.dims), each.row.value(), each.scale if scaled else 1.0)
        for each in done
    ]
    return Contraction(terms, eliminator.tape, owners, symbols.plates, symbols.plate_dims)


class _Factor(NamedTuple):
    """A log density of sites, its dimensions named.

    Attributes:
        sites: Names of the sites.
        row: The tensor.
        dims: Its dimensions' symbols.
        plates: Symbols of the plates that it stands in.
        scale: By how much it counts.
    """

    sites: tuple[str, ...]
    row: Row
    dims: str
    plates: frozenset[str]
    scale: Any


class _Symbols:
    """A letter for each latent and each plate."""

    def __init__(self) -> None:
        self._number = 0
        self._latents: dict[int, str] = {}
        self.plates: dict[str, str] = {}
        self.plate_dims: dict[str, int] = {}

    def of_latent(self, key: int) -> str:
        if key not in self._latents:
            self._latents[key] = self._new()
        return self._latents[key]

    def of_plate(self, frame: Any) -> str:
        if frame.name not in self.plates:
            self.plates[frame.name] = self._new()
            self.plate_dims[frame.name] = frame.dim
        return self.plates[frame.name]

    def _new(self) -> str:
        self._number += 1
        symbol: str = opt_einsum.get_symbol(self._number - 1)
        return symbol


def _packed(site: dict[str, Any], symbols: _Symbols) -> tuple[Row, str]:
    """Return a site's log density, without its scale, and its dimensions' symbols; those of no plate are summed."""
    row = row_of(site["unscaled_log_prob"])
    mask = site["mask"]
    # A latent's own density stays whole: it sums to one where all that depends on it is masked.
    if mask is not None and mask is not True and not is_enumerated(site):
        value = row.value()
        row = row_of(torch.where(torch.as_tensor(mask, device=value.device), value, 0.0))
    frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    ids = site["infer"].get("_dim_to_id", {})
    own = tuple(row.shape)
    rank = max([len(own), *(-dim for dim in frames)])
    shape = (1,) * (rank - len(own)) + own
    sizes = tuple(frames[dim].size if dim in frames else shape[dim] for dim in range(-rank, 0))
    dims, kept = "", []
    for dim, size in zip(range(-rank, 0), sizes, strict=True):
        if dim in frames:
            dims += symbols.of_plate(frames[dim])
            kept.append(dim)
        elif size > 1 and dim in ids:
            dims += symbols.of_latent(ids[dim])
            kept.append(dim)
    others = tuple(dim for dim in range(-rank, 0) if dim not in kept)
    return row.packed(shape, sizes, others), dims


def _tilted(row: Row, dims: str, tilt: Tensor, site: dict[str, Any], own: str, symbols: _Symbols) -> Row:
    """Add to a latent's log density something for each of its values."""
    frames = sorted((frame for frame in site["cond_indep_stack"] if frame.vectorized), key=lambda frame: frame.dim)
    return row_of(row.value() + aligned(tilt, "".join(map(symbols.of_plate, frames)) + own, dims))


def _scaled(term: Tensor, scale: Any) -> Tensor:
    if isinstance(scale, (int, float)) and scale == 1:
        return term
    scaled: Tensor = term * scale
    return scaled


def _check_scale(one: _Factor, other: _Factor) -> None:
    if one.scale is other.scale or bool(torch.as_tensor(one.scale == other.scale).all()):
        return
    raise ValueError(
        f"sites {one.sites[0]!r} and {other.sites[0]!r} depend on one discrete latent and have different scales, so "
        "that its sum has none: put the latent into the subsampled plate, or scale all that depends on it alike"
    )


def _components(factors: Sequence[_Factor], sums: set[str]) -> list[list[_Factor]]:
    """Return the factors that are linked by latents."""
    group: dict[str, str] = {}

    def root(dim: str) -> str:
        while group.setdefault(dim, dim) != dim:
            group[dim] = group[group[dim]]
            dim = group[dim]
        return dim

    for factor in factors:
        first, *others = sums.intersection(factor.dims)
        for dim in others:
            group[root(dim)] = root(first)
    found: dict[str, list[_Factor]] = defaultdict(list)
    for factor in factors:
        found[root(min(sums.intersection(factor.dims)))].append(factor)
    return list(found.values())


class _Eliminator:
    """Sums products of factors over latents, and notes on a tape what it did.

    Attributes:
        tape: The latents in the order in which they were summed out.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names
        self.tape: list[Elimination] = []

    def component(self, factors: Sequence[_Factor], sums: set[str]) -> _Factor:
        """Sum out all latents of factors that are linked by them, from the innermost plates outwards."""
        for factor in factors:
            _check_scale(factors[0], factor)
        tree: dict[frozenset[str], list[_Factor]] = defaultdict(list)
        context: dict[str, frozenset[str]] = {}
        for factor in factors:
            tree[factor.plates].append(factor)
            for dim in sums.intersection(factor.dims):
                context[dim] = context.get(dim, factor.plates) & factor.plates
        root = frozenset.intersection(*tree)
        while True:
            leaf = max(tree, key=lambda plates: (len(plates), sorted(plates)))
            here = tree.pop(leaf)
            if leaf == root and not tree:
                break
            local = {dim for dim, plates in context.items() if plates == leaf}
            for group in _components(here, local) if local else [[factor] for factor in here]:
                summed = self._sum(group, local)
                pending = [context[dim] for dim in sums.intersection(summed.dims)]
                parent = frozenset().union(*pending) if pending else root
                if not parent < leaf:
                    self._refuse_plates(group)
                tree[parent].append(_product(summed, leaf - parent))
        found = self._sum(here, set(context))
        return found._replace(sites=tuple(dict.fromkeys(name for each in factors for name in each.sites)))

    def _refuse_plates(self, group: Sequence[_Factor]) -> None:
        raise ValueError(
            f"site {group[0].sites[0]!r} depends on discrete latents of several plates, neither inside the other, so "
            "that their sum does not factorize: make one of these plates a loop, `for i in pyro.plate(...)`, if it is "
            "short"
        )

    def _sum(self, factors: Sequence[_Factor], dims: set[str]) -> _Factor:
        """Multiply factors of one plate context, and sum out dimensions."""
        left = [(factor.row, factor.dims) for factor in factors]
        pending = dims.intersection("".join(factor.dims for factor in factors))
        while pending:
            left = self._round(left, pending)
        out = "".join(sorted(set("".join(dims for _, dims in left))))
        sizes = {dim: size for row, dims in left for dim, size in zip(dims, row.shape, strict=True)}
        value = functools.reduce(torch.add, [aligned(row.value(), dims, out) for row, dims in left])
        row = row_of(value.expand([sizes[dim] for dim in out]))
        sites = tuple(name for factor in factors for name in factor.sites)
        return _Factor(sites, row, out, factors[0].plates, factors[0].scale)

    def _round(self, terms: list[tuple[Row, str]], pending: set[str]) -> list[tuple[Row, str]]:
        """Eliminate latents that share no factor, the cheapest ones; take them from `pending`."""
        holders: dict[str, list[int]] = {dim: [] for dim in sorted(pending)}
        for number, (_, dims) in enumerate(terms):
            for dim in pending.intersection(dims):
                holders[dim].append(number)
        costs = {dim: self._cost(dim, [terms[i] for i in held]) for dim, held in holders.items()}
        # What is small costs the same as what is smallest: a chain is eliminated from all over, not from its ends.
        limit = max(min(costs.values()), _SMALL_TABLE)
        taken: set[int] = set()
        alike: dict[Any, list[tuple[str, list[int], str]]] = defaultdict(list)
        for dim in sorted(holders, key=lambda dim: costs[dim]):
            held = holders[dim]
            if costs[dim] > limit or not taken.isdisjoint(held):
                continue
            taken.update(held)
            pending.discard(dim)
            held = sorted(held, key=lambda i: (len(terms[i][1]), terms[i][1]))
            order = "".join(dict.fromkeys("".join(terms[i][1] for i in held)))
            order = dim + order.replace(dim, "")
            pattern = tuple((tuple(map(order.index, terms[i][1])), terms[i][0].shape, terms[i][0].dtype) for i in held)
            alike[pattern].append((dim, held, order))
        made: list[tuple[Row, str]] = []
        for members in alike.values():
            made += self._eliminate(members, terms)
        return [term for number, term in enumerate(terms) if number not in taken] + made

    def _cost(self, dim: str, held: list[tuple[Row, str]]) -> int:
        sizes = {d: n for row, dims in held for d, n in zip(dims, row.shape, strict=True)}
        table = math.prod(sizes.values())
        if table > _MAX_TABLE:
            others = sorted({self._names[d] for d in sizes if d in self._names})
            raise ValueError(
                f"the sum over the discrete latents {', '.join(map(repr, others))} needs a table of {table:,} numbers "
                f"a draw; {_MAX_TABLE:,} are the most: write a chain of latents with pyro.markov, put independent ones "
                "into a plate, or take fewer values"
            )
        return table // sizes[dim]

    def _eliminate(
        self, members: list[tuple[str, list[int], str]], terms: list[tuple[Row, str]]
    ) -> list[tuple[Row, str]]:
        """Sum out latents whose factors have the same shapes, as one batched operation."""
        _, first, order = members[0]
        parts = []
        for place, number in enumerate(first):
            positions = [order.index(dim) for dim in terms[number][1]]
            together = rows_together([terms[held[place]][0] for _, held, _ in members])
            shape = [1] * len(order)
            permuted = together.permute(0, *(1 + i for i in sorted(range(len(positions)), key=positions.__getitem__)))
            for position, size in zip(sorted(positions), permuted.shape[1:], strict=True):
                shape[position] = size
            parts.append(permuted.reshape(len(together), *shape))
        tables = functools.reduce(torch.add, parts)
        summed = log_sum_exp(tables, 1)
        result = []
        for number, (dim, _, labels) in enumerate(members):
            row = number if len(tables) > 1 else 0  # one table for all, where all have the same factors
            self.tape.append(Elimination(dim, tables, row, labels))
            result.append((Row(summed, row), labels[1:]))
        return result


def _product(factor: _Factor, plates: frozenset[str]) -> _Factor:
    """Multiply the factors of independent elements of plates."""
    places = [place for place, dim in enumerate(factor.dims) if dim in plates]
    rest = "".join(dim for dim in factor.dims if dim not in plates)
    row = row_of(factor.row.value().sum(places)) if places else factor.row
    return factor._replace(row=row, dims=rest, plates=factor.plates - plates)


def log_sum_exp(values: Tensor, dim: int) -> Tensor:
    """`log sum exp` along a dimension; where all are minus infinity so is the result, and the gradient is zero."""
    shift = values.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(values.dtype).min)
    total = (values - shift).exp().sum(dim)
    result = total.clamp(min=torch.finfo(values.dtype).tiny).log() + shift.squeeze(dim)
    return torch.where(total > 0, result, -math.inf)


def aligned(term: Tensor, dims: str, out: str) -> Tensor:
    """Return a term with its dimensions in the order of `out`, of size 1 where it has none."""
    term = term.permute([dims.index(dim) for dim in out if dim in dims])
    sizes = iter(term.shape)
    return term.reshape([next(sizes) if dim in dims else 1 for dim in out])
