"""Likelihood of the rows of a table whose columns are of several kinds, some of their entries missing."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.models.tables import Column, Table

# Smallest variance of a number, in units of its column's: a constant column would else have an infinite density.
_MIN_VARIANCE = 1e-3
# Smallest distance of two thresholds of an ordinal, whose logarithm is taken.
_MIN_GAP = 1e-4
# Smallest rate of a count, whose logarithm is taken, in units of its column's mean.
_MIN_RATE = 1e-6


class Group(NamedTuple):
    """Columns of one kind and number of classes, which are worked on together.

    Attributes:
        kind: As `Column.kind`.
        num_classes: As `Column.num_classes`.
        columns: Their indices in the table.
    """

    kind: str
    num_classes: int
    columns: tuple[int, ...]

    @property
    def num_local(self) -> int:
        """Parameters of each column's likelihood that depend on the row and on the component."""
        return self.num_classes - 1 if self.kind == "cat" else 1

    @property
    def num_shared(self) -> int:
        """Parameters of each column's likelihood that depend on the component alone."""
        if self.kind == "ordinal":
            return self.num_classes - 1
        return 1 if self.kind in ("real", "pos") else 0


class Layout(nn.Module):
    """The columns of a table sorted into groups, and each column's location and scale, from observed entries alone.

    Real: mean and standard deviation. Positive: those of `log(1 + x)`. Count: 0 and the mean. Classes: 0 and 1.

    Attributes:
        groups: The groups, in the order in which `IncompleteRows` takes its parameters.
        by_group: Index of the column at each place of that order, `(columns,)`.
        places: Place of each column in it, `(columns,)`.
        loc: Location at each place, `(columns,)`.
        scale: Scale at each place, positive, `(columns,)`.
    """

    by_group: Tensor
    places: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, table: Table) -> None:
        super().__init__()
        members: dict[tuple[str, int], list[int]] = {}
        for d, column in enumerate(table.columns):
            members.setdefault((column.kind, column.num_classes), []).append(d)
        self.groups = tuple(Group(*key, tuple(columns)) for key, columns in members.items())
        by_group = torch.tensor([d for group in self.groups for d in group.columns], device=table.values.device)
        moments = [_moments(column, table.values[table.observed[:, d], d]) for d, column in enumerate(table.columns)]
        loc, scale = torch.stack(moments)[by_group].unbind(-1)
        self.register_buffer("by_group", by_group)
        self.register_buffer("places", by_group.argsort())
        self.register_buffer("loc", loc)
        self.register_buffer("scale", torch.where(scale > 0, scale, 1.0))

    def split(self, tensor: Tensor, width: Callable[[Group], int] = lambda group: 1) -> tuple[Tensor, ...]:
        """Cut the last dimension, in the groups' order, into groups; each column has `width` entries."""
        parts: tuple[Tensor, ...] = tensor.split([len(group.columns) * width(group) for group in self.groups], -1)
        return parts

    def column_of(self, width: Callable[[Group], int]) -> Tensor:
        """Return the column of each entry of such a dimension."""
        widths = [width(group) for group in self.groups for _ in group.columns]
        return self.by_group.repeat_interleave(torch.tensor(widths, device=self.by_group.device))


class IncompleteRows(TorchDistribution):
    r"""Mixture over s of rows with independent columns, on the entries that are observed.

    `p(x) = sum_s w_s prod_d p_d(x_d; a_sd, b_sd)`, d over the observed columns, a the local and b the shared raw
    parameters; with the column's location m and scale c:

    - real: `N(m + c a, c^2 v)`, `v = 0.001 + softplus(b)`;
    - pos: `log(1 + x) ~ N(m + c a, c^2 v)`, `v = 0.001 + sigmoid(b)`: at most about the column's own variance, for the
      mean of x grows exponentially with it;
    - count: Poisson with the rate `c softplus(a) / log 2`;
    - cat: `softmax(0, a_1, ..., a_{C-1})`;
    - ordinal: `P(x <= r) = sigmoid(t_r - a)`, `t_r = sum_{k <= r} softplus(b_k)`, r from 1 to C - 1.

    Args:
        layout: Groups, locations and scales.
        logits: Unnormalised `log w`, `(*batch, S)` or `(S,)`.
        local: Local parameters, in the groups' order, column by column, `(*batch, S, num_local)`.
        shared: Shared ones, in the same order, `(S, num_shared)`.
        observed: True where an entry counts, `(*batch, columns)`, or what broadcasts to it.

    Shapes:
        `batch_shape` is local's less its last two dimensions, `event_shape` is `(columns,)`.

    References:
        Nazabal, Olmos, Ghahramani, Valera (2020), "Handling incomplete heterogeneous data using VAEs",
        arXiv:1807.03653, section 3.1; the bound on v of positive numbers is their code's.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, layout: Layout, logits: Tensor, local: Tensor, shared: Tensor, observed: Tensor) -> None:
        self.layout, self.logits, self.local, self.shared, self.observed = layout, logits, local, shared, observed
        super().__init__(local.shape[:-2], layout.places.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "IncompleteRows":
        """Return the same distribution with a larger batch shape."""
        local = self.local.expand(*batch_shape, *self.local.shape[-2:])
        return IncompleteRows(self.layout, self.logits, local, self.shared, self.observed)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of the observed entries of `value: (*batch, columns)`; the others may be anything."""
        return self._joint(value).logsumexp(-1)

    def given(self, value: Tensor) -> "IncompleteRows":
        """Return the distribution with the weights that the observed entries give the components."""
        return IncompleteRows(self.layout, self._joint(value), self.local, self.shared, self.observed)

    def pooled(self) -> "IncompleteRows":
        """Return the equal mixture over the first batch dimension, `(draws, *batch)` -> `(*batch,)`."""
        logits = self.logits.log_softmax(-1).expand(self.local.shape[:-1]).movedim(0, -2).flatten(-2)
        local = self.local.movedim(0, -3).flatten(-3, -2)
        return IncompleteRows(self.layout, logits, local, self.shared.repeat(len(self.local), 1), self.observed)

    def entry_log_prob(self, value: Tensor, where: Tensor) -> Tensor:
        """Return the log density of each entry alone, `(*batch, columns)`.

        Args:
            value: `(*batch, columns)`.
            where: The entries that are asked for, `(*batch, columns)`; the others' result is finite and void.
        """
        log_weights = self.logits.log_softmax(-1)[..., None]
        return self._by_column((log_weights + self._entries(value, where)).logsumexp(-2))

    @property
    def mean(self) -> Tensor:
        """Mean of each number and count, most probable class of the others, `(*batch, columns)`."""
        return self._typical(_mean)

    @property
    def mode(self) -> Tensor:
        """Mean over the components of the modes of numbers and counts; most probable class, `(*batch, columns)`."""
        return self._typical(_mode)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return rows with all their columns drawn, observed or not, `(*sample_shape, *batch, columns)`."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            which = dist.Categorical(logits=self.logits.expand(*shape, self.logits.shape[-1])).sample()[..., None, None]
            draws = []
            for likelihood in self._likelihoods():
                size = likelihood.batch_shape[-1]
                drawn = likelihood.expand((*shape, self.local.shape[-2], size)).sample().to(self.local)
                draws.append(drawn.gather(-2, which.expand(*shape, 1, size))[..., 0, :])
            return self._by_column(torch.cat(draws, -1))

    def _joint(self, value: Tensor) -> Tensor:
        """Log density of each component and the observed entries, `(*batch, S)`."""
        entries = self._entries(value, self.observed)
        seen = self.observed.index_select(-1, self.layout.by_group)[..., None, :]
        joint: Tensor = self.logits.log_softmax(-1) + torch.where(seen, entries, 0.0).sum(-1)
        return joint

    def _entries(self, value: Tensor, where: Tensor) -> Tensor:
        """Log density of each entry in each component, in the groups' order, `(*batch, S, columns)`."""
        # 0 is of every kind: no density of a missing entry is NaN, and no gradient.
        value = torch.where(where, value, 0.0).index_select(-1, self.layout.by_group)[..., None, :]
        pairs = zip(self._likelihoods(), self.layout.split(value), strict=True)
        return torch.cat([likelihood.log_prob(part) for likelihood, part in pairs], -1)

    def _typical(self, of_number: Callable[[Any], Tensor]) -> Tensor:
        weights = self.logits.softmax(-1)[..., None]
        values = []
        for likelihood in self._likelihoods():
            if isinstance(likelihood, dist.Categorical):
                probs = (weights[..., None] * likelihood.probs).sum(-3)
                values.append(probs.argmax(-1).to(self.local))
            else:
                values.append((weights * of_number(likelihood)).sum(-2))
        return self._by_column(torch.cat(values, -1))

    def _by_column(self, tensor: Tensor) -> Tensor:
        """Bring the last dimension from the groups' order to the table's."""
        return tensor.index_select(-1, self.layout.places)

    def _likelihoods(self) -> list[Any]:
        """The columns' distributions, group by group, batch shape `(*batch, S, columns of the group)`."""
        split = self.layout.split
        parts = zip(
            self.layout.groups,
            split(self.layout.loc),
            split(self.layout.scale),
            split(self.local, lambda group: group.num_local),
            split(self.shared, lambda group: group.num_shared),
            strict=True,
        )
        return [_likelihood(*part) for part in parts]


class _LogNormal(dist.Normal):
    """The law of x where `log(1 + x)` is normal. What would be negative counts as 0 in draws."""

    def log_prob(self, value: Tensor) -> Tensor:
        logs = value.log1p()
        log_prob: Tensor = super().log_prob(logs) - logs
        return log_prob

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn: Tensor = super().sample(sample_shape)
        return drawn.expm1().clamp_min(0.0)


class _Classes(dist.Categorical):
    """Classes, whose density is a product and no gather: draws and components batch parameters, and not the value."""

    def log_prob(self, value: Tensor) -> Tensor:
        classes = torch.arange(self.logits.shape[-1], device=value.device)
        log_prob: Tensor = (self.logits * (value[..., None] == classes)).sum(-1)
        return log_prob


def _likelihood(group: Group, loc: Tensor, scale: Tensor, local: Tensor, shared: Tensor) -> Any:
    """Return the distribution of a group's columns, `(*batch, S, columns of the group)`."""
    if group.kind == "real":
        return dist.Normal(loc + scale * local, scale * (_MIN_VARIANCE + nn.functional.softplus(shared)).sqrt())
    if group.kind == "pos":
        return _LogNormal(loc + scale * local, scale * (_MIN_VARIANCE + shared.sigmoid()).sqrt())
    if group.kind == "count":
        return dist.Poisson(scale * (nn.functional.softplus(local) / math.log(2.0) + _MIN_RATE))
    local = local.unflatten(-1, (-1, group.num_local))
    zero = torch.zeros_like(local[..., :1])
    if group.kind == "cat":
        return _Classes(logits=torch.cat([zero, local], -1))
    gaps = nn.functional.softplus(shared.unflatten(-1, (-1, group.num_shared))) + _MIN_GAP
    # With t = t_r - a and u = t_{r-1} - a: s(t) - s(u) = s(t) s(-u) (1 - exp(u - t)), s the sigmoid; no difference of
    # near numbers is taken. t is infinite for the last class, -u for the first.
    height = gaps.cumsum(-1) - local
    below = torch.cat([nn.functional.logsigmoid(height), zero], -1)
    above = torch.cat([zero, nn.functional.logsigmoid(-height)], -1)
    between = (-torch.expm1(-gaps[..., 1:])).log()  # the gaps are positive
    return _Classes(logits=below + above + nn.functional.pad(between, (1, 1)))


def _moments(column: Column, values: Tensor) -> Tensor:
    """Location and scale of a column's observed entries, `(2,)`."""
    if column.kind in ("real", "pos"):
        values = values.log1p() if column.kind == "pos" else values
        return torch.stack([values.mean(), values.std(correction=0)])
    scale = values.mean() if column.kind == "count" else torch.ones_like(values[0])
    return torch.stack([torch.zeros_like(scale), scale])


def _mean(likelihood: Any) -> Tensor:
    mean: Tensor = likelihood.mean
    if isinstance(likelihood, _LogNormal):
        mean = (mean + likelihood.scale.square() / 2).expm1().clamp_min(0.0)
    return mean


def _mode(likelihood: Any) -> Tensor:
    mode: Tensor = likelihood.mean
    if isinstance(likelihood, _LogNormal):
        mode = (mode - likelihood.scale.square()).expm1().clamp_min(0.0)
    elif isinstance(likelihood, dist.Poisson):
        mode = mode.floor()
    return mode
