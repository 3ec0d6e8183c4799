from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.diagnostics import (
    calibrate,
    plot_coverage,
    plot_elbo,
    plot_flow,
    plot_pairs,
    plot_weights,
    to_arviz,
)
from pyro_nf.flows import stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, torch.ones(2)).to_event(1), obs=torch.zeros(2))
    pyro.sample("z", dist.Normal(x**2, 0.5))


@pytest.fixture(scope="module")
def fitted():
    pyro.set_rng_seed(0)
    guide = AutoFlow(banana, partial(stacks.make, "realnvp", depth=2))
    options = {"num_particles": 16, "learning_rate": 0.03, "max_steps": 200, "eval_every": 20, "eval_particles": 100}
    result = FlowSVI(banana, guide, **options, compile=False, seed=0, progress=False).run()
    return guide, result


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def drawn(axis):
    """Render the figure, which is where wrong text and wrong limits fail."""
    axis.figure.canvas.draw()
    return axis


def test_plot_elbo(fitted):
    _, result = fitted
    axis = drawn(plot_elbo(result))
    assert axis.get_xlim() == (0, result.steps)
    low, high = axis.get_ylim()
    assert low < result.elbo < high
    assert f"best, step {result.best_step}" in labels(axis)
    assert any("plateau" in label for label in labels(axis)) == (result.plateau_step is not None)


def test_plot_weights(fitted):
    data = to_arviz(banana, fitted[0], num_samples=2000)
    axis = drawn(plot_weights(data))
    assert f"{data['sample_stats'].attrs['khat']:.2f}" in labels(axis)[1]
    weights = axis.lines[0].get_ydata()
    assert np.mean(weights) == pytest.approx(1.0)
    heavy = plot_weights(0.9 * np.random.default_rng(0).exponential(size=4000))
    assert "NOT below 0.70" in labels(heavy)[1]
    points, tail = heavy.lines[0].get_xydata(), heavy.lines[1].get_xydata()
    assert len(tail) == pytest.approx(3 * 4000**0.5, abs=2)
    assert np.median(np.abs(np.log(points[: len(tail), 1] / tail[:, 1]))) < 0.1
    flat = drawn(plot_weights(torch.zeros(1000)))
    assert len(labels(flat)) == 1


def test_plot_pairs(fitted):
    data = to_arviz(banana, fitted[0], num_samples=500)
    draws = {"flow": data, "reference": fitted[0].sample_posterior(500)}
    axes = plot_pairs(draws)
    drawn(axes[0, 0])
    assert axes.shape == (2, 2)
    assert axes[1, 0].get_ylabel() == "z"
    assert [text.get_text() for text in axes[0, 0].figure.legends[0].get_texts()] == ["flow", "reference"]
    several = {"a": {"theta": torch.randn(200, 3), "mu": torch.randn(200)}}
    axes = plot_pairs(several, var_names=["theta[1]", "mu"])
    assert axes[-1, 0].get_xlabel() == "theta[1]"
    with pytest.raises(ValueError, match=r"var_names must be sites or entries of 'a', theta, mu; got 'theta\[3\]'"):
        plot_pairs(several, var_names=["theta[3]"])
    with pytest.raises(ValueError, match="draws must hold at least one posterior"):
        plot_pairs({})


def test_plot_flow(fitted):
    guide, _ = fitted
    axes = plot_flow(guide)
    drawn(axes[0])
    assert axes[0].get_title() == "base"
    assert axes[-1].get_title().endswith("WhitenedAffine")
    last = np.concatenate([each.get_offsets() for each in axes[-1].collections])
    assert np.allclose(last.mean(0), guide.get_posterior().sample((5000,)).mean(0), atol=0.2)

    def one():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoFlow(one)
    guide()
    with pytest.raises(ValueError, match=r"guide must be over two coordinates; got one over \(1,\)"):
        plot_flow(guide)


def test_plot_coverage():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

    def fit(simulated):
        return lambda: pyro.sample("mu", dist.Normal(torch.zeros(10), 0.5).to_event(1))

    axis = drawn(plot_coverage(calibrate(model, fit, torch.zeros(10), num_simulations=40, num_samples=100, seed=0)))
    assert "NOT calibrated" in axis.get_title()
    assert labels(axis)[-1] == "2 more"
    assert labels(axis)[1] == "mu[0]"


def test_no_draws_get_a_sentence():
    with pytest.raises(ValueError, match="data must hold at least one draw; got none"):
        plot_weights(np.zeros(0))
    with pytest.raises(ValueError, match="draws must hold at least one draw; 'guide' has none of 'mu'"):
        plot_pairs({"guide": {"mu": torch.zeros(0)}})
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1; got 0"):
        plot_flow(None, num_samples=0)
