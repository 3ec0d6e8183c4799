import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_nf.flows import ElementwiseAffine, stacks
from pyro_nf.guides import AmortizedFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.models import HIVAE, TableEncoder
from pyro_nf.models.tables import Column, make

COLUMNS = [
    Column("income", "pos"),
    Column("height", "real"),
    Column("visits", "count"),
    Column("colour", "cat", 3),
    Column("grade", "ordinal", 4),
]


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(1)
    n = 40
    values = torch.stack(
        [
            torch.randn(n, generator=generator).exp(),
            torch.randn(n, generator=generator) * 3 + 10,
            torch.randint(0, 9, (n,), generator=generator),
            torch.randint(0, 3, (n,), generator=generator),
            torch.randint(0, 4, (n,), generator=generator),
        ],
        -1,
    )
    return make(COLUMNS, values, torch.rand(n, 5, generator=generator) > 0.3)


def wake(model):
    """Leave no parameter at zero."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_the_model_is_the_mixture_of_its_equations(table, float64):
    table = table._replace(values=table.values.double())
    model = wake(HIVAE(table, latent_dim=2, num_components=3, y_dim=2))
    xi = torch.randn(40, 2)
    trace = poutine.trace(poutine.condition(model, data={"xi": xi})).get_trace(*table[1:])
    densities = []
    for s in range(3):
        y = model.decoder(model.locs[s] + xi).unflatten(-1, (5, 2))
        # The heads one by one: of_local says which rows of the matrix are a column's.
        of_local = model.layout.column_of(lambda group: group.num_local)
        weight = model.heads.weight.unflatten(-1, (5, 2))
        local = torch.stack(
            [(y[:, d] @ weight[k, d]) + model.heads.bias[k] for k, d in enumerate(of_local.tolist())], -1
        )
        rows = model.likelihood(xi, *table[1:])
        alone = type(rows)(
            model.layout, torch.zeros(1), (local + model.shifts[s])[:, None], model.shared[s : s + 1], table.observed
        )
        densities.append(alone.log_prob(table.values))
    expected = torch.stack(densities).logsumexp(0) - math.log(3)
    expected = expected.sum() + dist.Normal(0.0, 1.0).log_prob(xi).sum()
    assert torch.allclose(trace.log_prob_sum(), expected)


@pytest.mark.parametrize("neighbours", [False, True])
def test_values_under_the_mask_never_change_a_result(table, neighbours):
    results = []
    for junk in (0.0, math.nan, -7.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        damaged = table._replace(values=torch.where(table.observed, table.values, junk))
        model = HIVAE(damaged, latent_dim=2, num_components=3, neighbours=neighbours)
        guide = AmortizedFlow(model, TableEncoder(damaged, (8,), 4), partial(stacks.make, "iaf", depth=1))
        svi = FlowSVI(
            model,
            guide,
            num_particles=2,
            learning_rate=0.01,
            max_steps=4,
            eval_every=2,
            seed=0,
            compile=False,
            progress=False,
        )
        result = svi.run(damaged.values, damaged.observed)
        pyro.set_rng_seed(1)
        draws = guide.sample_posterior(3, damaged.values, damaged.observed)["xi"]
        filled = model.likelihood(draws, damaged.values, damaged.observed).given(damaged.values).mean
        results.append((result.elbo, draws, filled))
    for elbo, draws, filled in results[1:]:
        assert elbo == results[0][0]
        assert torch.equal(draws, results[0][1])
        assert torch.equal(filled, results[0][2])


def test_with_neighbours_a_column_depends_on_observed_columns_before_it_alone(table):
    model = wake(HIVAE(table, latent_dim=2, num_components=3, neighbours=True))
    observed = torch.ones_like(table.observed)
    observed[:, 2] = False
    xi = torch.zeros(40, 2)

    def local_of(values):
        return model.likelihood(xi, values, observed).local.detach()

    of_local = model.layout.column_of(lambda group: group.num_local)
    before = local_of(table.values)
    for d in range(5):
        values = table.values.clone()
        values[:, d] = (values[:, d] + 1) % 3
        changed = (local_of(values) != before).flatten(0, 1).any(0)
        depending = set(of_local[changed].tolist())
        assert depending == (set() if d == 2 else set(range(d + 1, 5)))


def test_with_neighbours_the_density_of_discrete_rows_sums_to_one(float64):
    columns = [Column("a", "cat", 2), Column("b", "ordinal", 3), Column("c", "cat", 2)]
    every = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0), torch.arange(2.0))
    table = make(columns, every)
    model = wake(HIVAE(table, latent_dim=1, num_components=2, neighbours=True))
    xi = torch.randn(1, 1).expand(len(every), 1)
    assert torch.allclose(model.likelihood(xi, *table[1:]).log_prob(every).exp().sum(), torch.tensor(1.0))
    # And so for the columns that are left where one is missing.
    seen = torch.ones_like(table.observed)
    seen[:, 0] = False
    half = model.likelihood(xi, every, seen).log_prob(every).exp().sum()
    assert torch.allclose(half, torch.tensor(2.0))


def test_features_are_zero_where_nothing_is_observed_and_indicators_else(table):
    encoder = TableEncoder(table, (8,), 4)
    features = encoder.features(table.values, table.observed)
    assert features.shape == (40, 3 + 3 + 4 + 5)
    column_of = encoder.features.column_of
    for d in range(5):
        assert not features[~table.observed[:, d]][:, column_of == d].any()
    seen = table.observed[:, 1]
    height = features[seen, 1]
    assert torch.allclose(torch.stack([height.mean(), height.std(correction=0)]), torch.tensor([0.0, 1.0]), atol=1e-5)
    row = int(table.observed[:, 3].nonzero()[0])
    assert features[row, 3:6].tolist() == [float(k == table.values[row, 3]) for k in range(3)]
    row = int(table.observed[:, 4].nonzero()[0])
    assert features[row, 6:10].tolist() == [float(k <= table.values[row, 4]) for k in range(4)]
    assert torch.equal(features[:, 10:], table.observed.float())


def test_a_minibatch_is_scaled_up_and_holds_no_nan(table):
    table = table._replace(values=torch.where(table.observed, table.values, math.nan))
    trace = poutine.trace(HIVAE(table, latent_dim=2)).get_trace(table.values, table.observed, batch_size=8)
    assert trace.nodes["x"]["scale"] == 5.0
    assert trace.nodes["x"]["value"].shape == (8, 5)
    assert trace.nodes["x"]["value"].isfinite().all()


def test_pyros_svi_trains_it(table):
    model, encoder = HIVAE(table, latent_dim=2, num_components=3), TableEncoder(table, (16,), 8)
    guide = AmortizedFlow(model, encoder, ElementwiseAffine)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(table.values, table.observed) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.slow
def test_a_recorded_step_is_the_plain_one(table):
    model = HIVAE(table, latent_dim=2, num_components=3, neighbours=True)
    guide = AmortizedFlow(model, TableEncoder(table, (8,), 4), partial(stacks.make, "iaf", depth=1))
    svi = FlowSVI(
        model,
        guide,
        objective=ELBO(sticking_the_landing=False),
        num_particles=2,
        learning_rate=0.01,
        max_steps=300,
        seed=0,
        progress=False,
    )
    result = svi.run(table.values, table.observed, batch_size=8)
    assert result.execution != "plain"
    assert result.elbo > result.evaluations[0].elbo


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda table: HIVAE(table, latent_dim=0), r"latent_dim must be a whole number of at least 1; got 0"),
        (lambda table: HIVAE(table, y_dim=-1), r"y_dim must be a whole number of at least 1; got -1"),
        (
            lambda table: HIVAE(table)(table.values[:, :4], table.observed[:, :4]),
            r"x and observed must have shape \(rows, 5\), .* got \(40, 4\) and \(40, 4\)",
        ),
    ],
)
def test_bad_input_gets_a_sentence(table, make_one, message):
    with pytest.raises(ValueError, match=message):
        make_one(table)
