"""Discrete latents: densities equal to hand-written marginals, their posterior, and what cannot be summed out."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch.distributions import biject_to

from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.programs.coordinates import coordinates, model_log_density
from pyro_nf.programs.discrete import discrete_probabilities, draw_discrete, with_discrete
from pyro_nf.programs.enumeration import find_discrete
from pyro_nf.programs.program import Program
from pyro_nf.programs.traces import log_prob_sum, run_model

pytestmark = pytest.mark.usefixtures("float64")


def enumerated(model, **values):
    """A run of a model at these values of its continuous latents, its discrete ones with all of theirs."""
    trace = poutine.trace(poutine.condition(model, values)).get_trace()
    for name in values:
        trace.nodes[name]["is_observed"] = False
    enumeration = find_discrete(trace, set(values))
    for name in enumeration.names:
        trace.remove_node(name)
    return run_model(model, trace, enumeration), enumeration, trace


def gradient(model, **values):
    """The model's log density and its gradient over the coordinates, by vmap of three points."""
    _, enumeration, trace = enumerated(model, **values)
    density = model_log_density(model, enumeration=enumeration)
    point = coordinates(trace)
    points = torch.stack([point, point + 0.1, point - 0.1])
    gradients, log_p = torch.func.vmap(torch.func.grad_and_value(density))(points)
    for row, one in zip(log_p, points, strict=True):
        assert torch.isclose(row, density(one))
    numeric = torch.stack([(density(point + h) - density(point - h)) / 2e-5 for h in 1e-5 * torch.eye(len(point))])
    assert torch.allclose(gradients[0], numeric, atol=1e-4, rtol=1e-4)
    return log_p[0]


X = torch.tensor([-2.1, -1.7, 0.3, 1.8, 2.2, 2.5])


def mixture(vindex=False):
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("rows", len(X)):
        z = pyro.sample("z", dist.Categorical(torch.stack([share, 1 - share], -1)))
        pyro.sample("x", dist.Normal(Vindex(loc)[z] if vindex else loc[z], 0.5), obs=X)


@pytest.mark.parametrize(
    "model", [mixture, lambda: mixture(True), config_enumerate(mixture)], ids=["", "Vindex", "Pyro"]
)
def test_a_mixture_is_its_marginal(model):
    loc, share = torch.tensor([-2.0, 1.5]), torch.tensor(0.3)
    trace, _, _ = enumerated(model, loc=loc, share=share)
    logits = torch.tensor([0.3, 0.7]).log()
    rows = (logits + dist.Normal(loc, 0.5).log_prob(X[:, None])).logsumexp(-1).sum()
    wanted = rows + dist.Normal(0.0, 5.0).log_prob(loc).sum() + dist.Beta(2.0, 2.0).log_prob(share)
    assert torch.isclose(log_prob_sum(trace), wanted, rtol=1e-12)
    jacobian = biject_to(dist.Beta(2.0, 2.0).support)
    point = jacobian.inv(share)
    assert torch.isclose(gradient(model, loc=loc, share=share), wanted + jacobian.log_abs_det_jacobian(point, share))


def chain(length, order=1):
    """A hidden Markov model, and its exact log density, by recursion over all states."""
    y = torch.linspace(-1.0, 1.5, length)
    transition = dist.Dirichlet(torch.ones(3)).sample((3,) * order)

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        states = [torch.tensor(0)] * order
        for t in pyro.markov(range(length), history=order):
            state = pyro.sample(f"z{t}", dist.Categorical(transition[tuple(states)]))
            states = [*states[1:], state]
            pyro.sample(f"y{t}", dist.Normal(loc[state], 0.7), obs=y[t])

    def exact(loc):
        alpha = torch.full((3,) * order, -math.inf)
        alpha[(0,) * order] = 0.0
        for t in range(length):
            joint = alpha[..., None] + transition.log()
            alpha = joint.logsumexp(0) + dist.Normal(loc, 0.7).log_prob(y[t])
        return alpha.logsumexp(tuple(range(order))) + dist.Normal(0.0, 1.0).log_prob(loc).sum()

    return model, exact


@pytest.mark.parametrize(("length", "order"), [(1, 1), (7, 1), (60, 1), (12, 2)])
def test_a_chain_is_the_forward_algorithm(length, order):
    model, exact = chain(length, order)
    loc = torch.tensor([-1.0, 0.2, 1.1])
    trace, _, _ = enumerated(model, loc=loc)
    assert torch.isclose(log_prob_sum(trace), exact(loc), rtol=1e-11)
    assert torch.isclose(gradient(model, loc=loc), exact(loc), rtol=1e-11)


def test_states_have_their_exact_probabilities_and_joint_draws():
    model, _ = chain(5)
    loc = torch.tensor([-1.0, 0.2, 1.1])
    trace, enumeration, latents = enumerated(model, loc=loc)
    joint = {}
    for states in itertools.product(range(3), repeat=5):
        values = {f"z{t}": torch.tensor(state) for t, state in enumerate(states)}
        joint[states] = float(run_model(model, with_discrete(latents, values)).log_prob_sum())
    weights = torch.tensor(list(joint.values())).softmax(0)
    found = discrete_probabilities(trace)
    for t in range(5):
        wanted = torch.stack([weights[[s[t] == k for s in joint]].sum() for k in range(3)])
        assert torch.allclose(found[f"z{t}"], wanted, atol=1e-12)
    draws = torch.func.vmap(lambda _: draw_discrete(trace), randomness="different")(torch.zeros(20_000))
    drawn = torch.stack([draws[f"z{t}"] for t in range(5)], -1)
    for states, weight in zip(joint, weights, strict=True):
        share = (drawn == torch.tensor(states)).all(-1).double().mean()
        assert abs(share - weight) < 4 * (weight / 20_000).sqrt() + 1e-3
    assert set(enumeration.names) == {f"z{t}" for t in range(5)}


def test_a_topic_model_sums_inside_its_plates():
    words, documents, topics, size = 4, 3, 2, 5
    data = torch.randint(size, (words, documents))
    table = dist.Dirichlet(torch.ones(size)).sample((topics,))

    def model():
        with pyro.plate("documents", documents, dim=-1):
            shares = pyro.sample("shares", dist.Dirichlet(torch.ones(topics)))
            rare = pyro.sample("rare", dist.Bernoulli(0.4))
            with pyro.plate("words", words, dim=-2):
                topic = pyro.sample("topic", dist.Categorical(shares))
                rows = table[topic] + rare[..., None] * torch.arange(size)
                pyro.sample("word", dist.Categorical(rows), obs=data)

    shares = dist.Dirichlet(torch.ones(topics)).sample((documents,))
    trace, _, _ = enumerated(model, shares=shares)
    wanted = dist.Dirichlet(torch.ones(topics)).log_prob(shares).sum()
    for d in range(documents):
        of_kind = []
        for rare in (0, 1):
            rows = table + rare * torch.arange(size)
            rows = rows / rows.sum(-1, keepdim=True)
            of_kind.append(math.log(0.4 if rare else 0.6) + (shares[d] @ rows[:, data[:, d]]).log().sum())
        wanted = wanted + torch.stack(of_kind).logsumexp(0)
    assert torch.isclose(log_prob_sum(trace), wanted, rtol=1e-12)
    probabilities = discrete_probabilities(trace)
    assert probabilities["topic"].shape == (words, documents, topics)
    assert torch.allclose(probabilities["rare"].sum(-1), torch.ones(documents))


def test_masked_steps_and_subsampled_rows_count_as_in_pyro():
    y = torch.randn(6, 4)
    lengths = torch.tensor([4, 2, 3, 1, 4, 2])

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("sequences", 12, subsample=torch.arange(6), dim=-1):
            state = 0
            for t in pyro.markov(range(4)):
                with poutine.mask(mask=t < lengths):
                    probs = torch.tensor([[0.7, 0.3], [0.2, 0.8]])[state]
                    state = pyro.sample(f"z{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                    pyro.sample(f"y{t}", dist.Normal(loc[state], 1.0), obs=y[:, t])

    loc = torch.tensor([-0.5, 1.0])
    trace, _, _ = enumerated(model, loc=loc)

    def guide():
        pyro.sample("loc", dist.Delta(loc, event_dim=1))

    pyro_elbo = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide)
    assert torch.isclose(log_prob_sum(trace), torch.tensor(pyro_elbo), rtol=1e-10)


def test_sequential_sites_take_one_value_a_run():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
        if kind.item() > 0:  # which no parallel value allows
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
        else:
            pyro.sample("y", dist.Normal(-x, 2.0), obs=torch.tensor(1.0))

    x = torch.tensor(0.4)
    trace, _, _ = enumerated(model, x=x)
    one = torch.tensor(1.0)
    terms = torch.stack(
        [dist.Normal(-x, 2.0).log_prob(one) + math.log(0.7), dist.Normal(x, 1.0).log_prob(one) + math.log(0.3)]
    )
    assert torch.isclose(log_prob_sum(trace), dist.Normal(0.0, 1.0).log_prob(x) + terms.logsumexp(0))
    assert torch.allclose(discrete_probabilities(trace)["kind"], terms.softmax(0))
    gradient(model, x=x)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_random_nestings_are_sums_over_all_values(data):
    """A tree of discrete latents in random plates against the sum over every combination of their values."""
    torch.set_default_dtype(torch.float64)
    sizes = data.draw(st.lists(st.integers(1, 2), min_size=2, max_size=2))
    places = data.draw(st.lists(st.integers(0, 2), min_size=2, max_size=4))
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(len(places))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    tables = [torch.rand(2, 2, generator=generator) + 0.1 for _ in places]
    y = torch.randn(2, 2, generator=generator)
    # A child stands in its parent's plates, or in one more.
    for i, parent in enumerate(parents):
        places[i] = places[i] if parent < 0 else max(places[i], places[parent])

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        plates = [pyro.plate("a", sizes[0], dim=-1), pyro.plate("b", sizes[1], dim=-2)]
        values = {}
        for i, (place, parent) in enumerate(zip(places, parents, strict=True)):
            with pyro.poutine.block(hide_fn=lambda _: False):
                stack = plates[:place]
                for plate in stack:
                    plate.__enter__()
                probs = tables[i][values[parent]] if parent >= 0 else tables[i][0]
                values[i] = pyro.sample(f"z{i}", dist.Categorical(probs))
                shape = [(), (sizes[0],), (sizes[1], sizes[0])][place]
                obs = y[: sizes[1], : sizes[0]].reshape(-1)[: math.prod(shape)].reshape(shape)
                pyro.sample(f"x{i}", dist.Normal(loc[values[i]], 1.0), obs=obs)
                for plate in reversed(stack):
                    plate.__exit__(None, None, None)

    loc = torch.randn(2, generator=generator)
    trace, _, latents = enumerated(model, loc=loc)
    shapes = [[(), (sizes[0],), (sizes[1], sizes[0])][place] for place in places]
    totals = []
    for values in itertools.product(*(itertools.product(range(2), repeat=math.prod(shape)) for shape in shapes)):
        fixed = {
            f"z{i}": torch.tensor(v).reshape(shape) for i, (v, shape) in enumerate(zip(values, shapes, strict=True))
        }
        totals.append(run_model(model, with_discrete(latents, fixed)).log_prob_sum())
    assert torch.isclose(log_prob_sum(trace), torch.stack(totals).logsumexp(0), rtol=1e-10)


def normal_guide():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def poisson():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("count", dist.Poisson(x.exp()))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))


def batch_without_a_plate():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(3)))
    pyro.sample("y", dist.Normal(x + z.sum(-1), 1.0), obs=torch.tensor(0.0))


def too_many():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    values = [pyro.sample(f"z{i}", dist.Categorical(torch.ones(50))) for i in range(5)]
    pyro.sample("y", dist.Normal(x + sum(values), 1.0), obs=torch.tensor(0.0))


def large_table():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    values = [pyro.sample(f"z{i}", dist.Categorical(torch.ones(50))) for i in range(4)]
    pyro.sample("y", dist.Normal(x + sum(values), 1.0), obs=torch.tensor(0.0))


def two_scales():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(0.5))
    with poutine.scale(scale=2.0):
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.tensor(0.0))


def two_plates():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    a, b = pyro.plate("a", 2, dim=-1), pyro.plate("b", 2, dim=-2)
    with a:
        z = pyro.sample("z", dist.Bernoulli(0.5))
    with b:
        w = pyro.sample("w", dist.Bernoulli(0.5))
    with a, b:
        pyro.sample("y", dist.Normal(x + z + w, 1.0), obs=torch.zeros(2, 2))


def many_sequential():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    for i in range(12):
        pyro.sample(f"z{i}", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))


def hidden():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with poutine.block():
        z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.tensor(0.0))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (poisson, "site 'count' is discrete, and Poisson has no finite support to sum over"),
        (batch_without_a_plate, r"site 'z' is discrete and has the batch shape \(3,\), which no plate declares"),
        (too_many, "together make a tensor of 312,500,000 numbers: write a chain"),
        (large_table, "needs a table of .* numbers a draw; .* are the most"),
        (two_scales, "'z' and 'y' depend on one discrete latent and have different scales"),
        (two_plates, "depends on discrete latents of several plates, neither inside the other"),
        (many_sequential, "make .* runs of the model; 1024 are the most"),
        (hidden, "draws a discrete variable anew in every run, at a site that poutine.block hides"),
    ],
)
def test_what_cannot_be_summed_gets_a_sentence(model, sentence):
    with pytest.raises(ValueError, match=sentence):
        Program(model, normal_guide).bind().spec  # noqa: B018
    with pytest.raises(ValueError, match=sentence):
        FlowSVI(model, AutoFlow(model), progress=False, max_steps=10).run()


def test_discrete_latents_alone_are_no_work_for_a_guide():
    with pytest.raises(ValueError, match="discrete latents alone, which are summed out"):
        AutoFlow(lambda: pyro.sample("z", dist.Bernoulli(0.5)))()


def test_a_guide_gives_the_discrete_latents_back():
    guide = AutoFlow(mixture)
    guide()
    draws = guide.sample_posterior(50, discrete=True)
    assert draws["z"].shape == (50, len(X))
    assert set(guide.sample_posterior(5)) == {"loc", "share"}
    probabilities = guide.discrete_probabilities(50)["z"]
    assert probabilities.shape == (len(X), 2)
    assert torch.allclose(probabilities.sum(-1), torch.ones(len(X)))


def test_a_mixture_is_fitted_to_the_posterior_of_its_marginal():
    def marginal():
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        logits = torch.stack([share, 1 - share], -1).log()
        with pyro.plate("rows", len(X)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, 0.5)), obs=X)

    found = []
    for model in (mixture, marginal):
        guide = AutoFlow(model)
        FlowSVI(model, guide, seed=0, progress=False).run()
        found.append(diagnose(model, guide, num_samples=5000, num_sets=1, progress=False))
    one, other = found
    error = math.hypot(one.log_evidence_se, other.log_evidence_se)
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=4 * error)
    assert error < 0.005
