"""Likelihoods of incomplete rows, each against a formula in SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, log_softmax, logsumexp

from pyro_nf.models.rows import IncompleteRows, Layout
from pyro_nf.models.tables import Column, make

# Kinds are mixed up, so that the groups' order is not the table's.
COLUMNS = [
    Column("count", "count"),
    Column("cat", "cat", 3),
    Column("real", "real"),
    Column("ordinal", "ordinal", 4),
    Column("pos", "pos"),
    Column("another", "cat", 3),
    Column("binary", "ordinal", 2),
    Column("real 2", "real"),
]
NAN = math.nan
VALUES = torch.tensor(
    [
        [3.0, 0.0, -1.0, 3.0, 0.5, 1.0, 0.0, 10.0],
        [0.0, 2.0, 0.5, 0.0, 20.0, 2.0, 1.0, 30.0],
        [8.0, 1.0, 2.0, 2.0, 0.0, 0.0, 1.0, 20.0],
    ],
    dtype=torch.float64,
)
OBSERVED = torch.tensor(
    [
        [True] * 8,
        [True, False, True, True, False, True, True, True],
        [True, True, False, True, True, False, True, True],
    ]
)
TABLE = make(COLUMNS, VALUES, OBSERVED)
S = 4


def softplus(x):
    return np.logaddexp(0.0, x)


def by_hand(column, seen, x, a, b):
    """Log density of a column's entry in one component, from its parameters and the column's observed entries."""
    if column.kind == "real":
        m, c = seen.mean(), seen.std()
        return stats.norm.logpdf(x, m + c * a[0], c * np.sqrt(1e-3 + softplus(b[0])))
    if column.kind == "pos":
        logs = np.log1p(seen)
        m, c = logs.mean(), logs.std()
        sd = c * np.sqrt(1e-3 + expit(b[0]))
        return stats.lognorm.logpdf(1 + x, sd, scale=np.exp(m + c * a[0]))
    if column.kind == "count":
        return stats.poisson.logpmf(x, seen.mean() * (softplus(a[0]) / np.log(2) + 1e-6))
    if column.kind == "cat":
        return log_softmax(np.concatenate([[0.0], a]))[int(x)]
    thresholds = np.cumsum(softplus(b) + 1e-4)
    below = np.concatenate([[0.0], expit(thresholds - a[0]), [1.0]])
    return np.log(below[int(x) + 1] - below[int(x)])


@pytest.fixture
def rows(float64):
    layout = Layout(TABLE)
    num_local = len(layout.column_of(lambda group: group.num_local))
    num_shared = len(layout.column_of(lambda group: group.num_shared))
    return IncompleteRows(layout, torch.randn(S), torch.randn(3, S, num_local), torch.randn(S, num_shared), OBSERVED)


def entries(rows):
    """Log density of each entry in each component, by hand, `(rows, S, columns)`."""
    local_of = rows.layout.column_of(lambda group: group.num_local)
    shared_of = rows.layout.column_of(lambda group: group.num_shared)
    result = np.zeros((3, S, len(COLUMNS)))
    for n in range(3):
        for s in range(S):
            for d, column in enumerate(COLUMNS):
                seen = VALUES[OBSERVED[:, d], d].numpy()
                a, b = rows.local[n, s, local_of == d].numpy(), rows.shared[s, shared_of == d].numpy()
                result[n, s, d] = by_hand(column, seen, float(VALUES[n, d]), a, b)
    return result


def test_each_likelihood_is_the_formula(rows):
    weights = log_softmax(rows.logits.numpy())
    expected = logsumexp(weights[:, None] + entries(rows), axis=1)
    found = rows.entry_log_prob(VALUES, torch.ones_like(OBSERVED))
    assert np.allclose(found.numpy(), expected, rtol=1e-10)


def test_a_rows_density_sums_the_components_over_the_observed_entries(rows):
    joint = log_softmax(rows.logits.numpy()) + (entries(rows) * OBSERVED.numpy()[:, None]).sum(-1)
    assert np.allclose(rows.log_prob(VALUES).numpy(), logsumexp(joint, axis=-1), rtol=1e-10)
    assert np.allclose(rows.given(VALUES).logits.softmax(-1).numpy(), np.exp(log_softmax(joint, axis=-1)), rtol=1e-8)


@pytest.mark.parametrize("junk", [NAN, math.inf, -5.0, 1e30])
def test_what_stands_under_the_mask_changes_neither_densities_nor_gradients(rows, junk):
    rows.local.requires_grad_()
    damaged = torch.where(OBSERVED, VALUES, junk)
    (gradient,) = torch.autograd.grad(rows.log_prob(VALUES).sum(), rows.local)
    (found,) = torch.autograd.grad(rows.log_prob(damaged).sum(), rows.local)
    assert torch.equal(rows.log_prob(damaged), rows.log_prob(VALUES))
    assert torch.equal(found, gradient)
    assert torch.equal(rows.given(damaged).mean, rows.given(VALUES).mean)


def test_classes_have_probabilities_that_sum_to_one(rows):
    for d, column in enumerate(COLUMNS):
        if column.num_classes:
            total = torch.zeros(3)
            for k in range(column.num_classes):
                total += rows.entry_log_prob(torch.full_like(VALUES, float(k)), torch.ones_like(OBSERVED))[:, d].exp()
            assert torch.allclose(total, torch.ones(3))


def test_ordinals_stay_finite_far_out_and_where_thresholds_meet(rows):
    far = IncompleteRows(rows.layout, rows.logits, 1e3 * rows.local, -1e3 * rows.shared.abs(), OBSERVED)
    log_prob = far.log_prob(VALUES)
    assert log_prob.isfinite().all()


def test_means_modes_and_densities_are_those_of_draws(rows):
    draws = rows.sample((40_000,))
    for d, column in enumerate(COLUMNS):
        if column.num_classes:
            shares = torch.stack([(draws[..., d] == k).double().mean(0) for k in range(column.num_classes)], -1)
            assert torch.equal(rows.mean[:, d], shares.argmax(-1).double())
        else:
            error = draws[..., d].std(0) / len(draws) ** 0.5
            assert ((rows.mean[:, d] - draws[..., d].mean(0)).abs() < 5 * error + 0.02).all()
    # A count's probability of zero, from draws.
    zero = torch.zeros_like(VALUES)
    expected = rows.entry_log_prob(zero, torch.ones_like(OBSERVED))[:, 0].exp()
    assert torch.allclose((draws[..., 0] == 0).double().mean(0), expected, atol=0.012)


def test_the_mode_is_that_of_the_likelihood(rows):
    one = IncompleteRows(rows.layout, rows.logits[:1], rows.local[:, :1], rows.shared[:1], OBSERVED)
    grid = torch.linspace(0, 200, 200_001)
    for d, column in enumerate(COLUMNS):
        if column.kind == "pos":
            for n in range(3):
                values = torch.zeros(len(grid), len(COLUMNS))
                values[:, d] = grid
                row = IncompleteRows(one.layout, one.logits, one.local[n], one.shared, OBSERVED[n])
                density = row.entry_log_prob(values, torch.ones_like(values, dtype=torch.bool))[:, d]
                assert abs(float(grid[density.argmax()] - one.mode[n, d])) < 2e-3
        elif column.kind == "count":
            assert torch.equal(one.mode[:, d], one.mean[:, d].floor())
        else:
            assert torch.equal(one.mode[:, d], one.mean[:, d])


def test_pooled_draws_are_one_mixture(rows):
    local = torch.randn(5, *rows.local.shape)
    logits = torch.randn(5, 3, S)
    pooled = IncompleteRows(rows.layout, logits, local, rows.shared, OBSERVED).pooled()
    assert pooled.batch_shape == (3,)
    each = [IncompleteRows(rows.layout, logits[k], local[k], rows.shared, OBSERVED).log_prob(VALUES) for k in range(5)]
    assert torch.allclose(pooled.log_prob(VALUES), torch.stack(each).logsumexp(0) - math.log(5))


def test_a_constant_column_has_a_scale_of_one(float64):
    table = make([Column("a", "real"), Column("b", "count")], torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
    assert Layout(table).scale.tolist() == [1.0, 1.0]
