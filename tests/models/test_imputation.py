import math

import pytest
import torch

from pyro_nf.guides import AmortizedFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import HIVAE, TableEncoder, imputation
from pyro_nf.models.tables import Column, make

COLUMNS = [Column("a", "real"), Column("b", "cat", 3), Column("c", "ordinal", 5), Column("d", "count")]
VALUES = torch.tensor(
    [[0.0, 0, 4, 1], [2.0, 2, 4, 2], [4.0, 2, 0, 9], [10.0, 1, 2, math.nan]],
)
OBSERVED = torch.tensor(
    [[True, True, True, True], [True, True, True, True], [True, True, False, False], [False, False, True, False]]
)
TABLE = make(COLUMNS, VALUES, OBSERVED)


def test_the_baseline_takes_means_and_most_frequent_classes_of_observed_entries():
    filled = imputation.impute_by_column(TABLE)
    assert filled[3, 0] == 2.0
    assert filled[3, 1] == 2.0
    assert filled[2, 2] == 4.0
    assert filled[2:, 3].tolist() == [1.5, 1.5]
    assert torch.equal(filled[OBSERVED], VALUES[OBSERVED])
    damaged = TABLE._replace(values=torch.where(OBSERVED, VALUES, 77.0))
    assert torch.equal(imputation.impute_by_column(damaged), filled)


def test_errors_are_those_of_the_paper():
    filled = imputation.impute_by_column(TABLE)
    errors = imputation.errors(TABLE, filled)
    # |10 - 2| over the range of all known values; a wrong class; 4 classes off of 5; |9 - 1.5| over 8: what is not
    # known (row 4 of d) does not count.
    assert errors == pytest.approx({"a": 0.8, "b": 1.0, "c": 0.8, "d": 7.5 / 8})
    assert imputation.error_by_kind(COLUMNS, errors) == pytest.approx(
        {"all": (0.8 + 1.0 + 0.8 + 7.5 / 8) / 4, "real": 0.8, "cat": 1.0, "ordinal": 0.8, "count": 7.5 / 8}
    )
    assert imputation.errors(TABLE, VALUES) == {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}


def test_a_column_with_nothing_held_out_has_no_error():
    table = TABLE._replace(observed=~VALUES.isnan())
    assert imputation.errors(table, VALUES) == {}


@pytest.fixture
def dependent():
    """A table whose columns say almost the same."""
    z = torch.randn(300, generator=torch.Generator().manual_seed(0))
    levels = torch.bucketize(z, torch.tensor([-1.0, 0.0, 1.0])).float()
    noise = 0.1 * torch.randn(300, generator=torch.Generator().manual_seed(1))
    values = torch.stack([z, (z > 0).float(), levels, (z + noise).exp()], -1)
    columns = [Column("z", "real"), Column("sign", "cat", 2), Column("level", "ordinal", 4), Column("exp", "pos")]
    observed = torch.rand(300, 4, generator=torch.Generator().manual_seed(2)) > 0.2
    return make(columns, values, observed)


@pytest.mark.slow
def test_a_fitted_model_fills_in_better_than_the_baseline(dependent):
    model = HIVAE(dependent, latent_dim=2, num_components=3)
    guide = AmortizedFlow(model, TableEncoder(dependent, (32,), 16), "iaf")
    svi = FlowSVI(model, guide, num_particles=4, learning_rate=0.01, max_steps=600, seed=0, progress=False)
    svi.run(dependent.values, dependent.observed)
    found = imputation.impute(model, guide, dependent)
    baseline = imputation.errors(dependent, imputation.impute_by_column(dependent))
    for filled in (found.mean, found.mode):
        assert torch.equal(filled[dependent.observed], dependent.values[dependent.observed])
        for column, error in imputation.errors(dependent, filled).items():
            assert error < 0.6 * baseline[column]


def test_imputation_covers_every_row_whatever_the_batches(dependent):
    model = HIVAE(dependent, latent_dim=2, num_components=3)
    guide = AmortizedFlow(model, TableEncoder(dependent, (8,), 4))
    found = imputation.impute(model, guide, dependent, num_samples=3, batch_size=128)
    assert found.mean.isfinite().all()
    assert torch.equal(~found.log_prob.isnan(), dependent.held_out)


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: imputation.errors(TABLE, VALUES[:2]), r"imputed must have the table's shape \(4, 4\); got \(2, 4\)"),
        (
            lambda: imputation.impute(HIVAE(TABLE), lambda: None, TABLE, num_samples=0),
            r"num_samples must be a whole number of at least 1; got 0",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make_one, message):
    with pytest.raises(ValueError, match=message):
        make_one()
