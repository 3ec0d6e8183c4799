"""A continued run is the run it continues."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from pyro_nf.inference import FlowSVI
from pyro_nf.inference.checkpoint import Progress
from pyro_nf.inference.graph import GraphSteps
from pyro_nf.inference.optim import State
from pyro_nf.inference.result import Evaluation
from pyro_nf.inference.schedule import PlateauSchedule

X = torch.linspace(-1, 1, 20)
Y = 0.5 + 2.0 * X


def regression(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x), subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(a + b * x[rows], 1.0), obs=y[rows])


def svi(path, guide=AutoNormal, **options):
    pyro.clear_param_store()
    options = {"max_steps": 300, "eval_every": 20, "num_particles": 8, "compile": False} | options
    return FlowSVI(regression, guide(regression), checkpoint=path, seed=3, progress=False, **options)


def assert_same(one, other):
    assert (one.elbo, one.elbo_mcse, one.steps, one.best_step) == (
        other.elbo,
        other.elbo_mcse,
        other.steps,
        other.best_step,
    )
    assert one.stop_reason == other.stop_reason
    assert one.evaluations == other.evaluations
    assert one.history.equal(other.history)


@pytest.mark.parametrize("form", ["plain", "recorded"])
@pytest.mark.parametrize("learning_rate", [None, 0.02])
def test_a_continued_run_is_the_whole_one_bit_for_bit(tmp_path, monkeypatch, form, learning_rate):
    monkeypatch.setattr(GraphSteps, "compile", lambda self, num_steps: None)
    options = {"compile": form == "recorded", "learning_rate": learning_rate}
    whole = svi(tmp_path / "whole", **options)
    expected, params = whole.run(X, Y), [p.clone() for p in whole.program.guide.parameters()]

    cut = svi(tmp_path / "cut", callbacks=[lambda evaluation: evaluation.step == 140], **options)
    assert cut.run(X, Y).stop_reason == "stopped by a callback at step 140"
    torch.manual_seed(99)
    continued = svi(tmp_path / "cut", **options)
    assert_same(continued.resume(X, Y), expected)
    assert all(p.equal(q) for p, q in zip(continued.program.guide.parameters(), params, strict=True))


def test_the_file_is_whole_and_holds_nothing_but_data(tmp_path):
    svi(tmp_path / "fit.pt").run(X, Y)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.pt"]
    content = torch.load(tmp_path / "fit.pt", weights_only=True)
    assert content["state"]["params"].shape == (4,)


def test_a_finished_run_continues_to_the_same_result(tmp_path):
    expected = svi(tmp_path / "fit.pt").run(X, Y)
    assert_same(svi(tmp_path / "fit.pt").resume(X, Y), expected)


def test_what_is_no_checkpoint_of_this_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint must name a file that a run has written; got '.*fit.pt'"):
        svi(tmp_path / "fit.pt").resume(X, Y)
    with pytest.raises(ValueError, match="checkpoint must name a file that a run has written; got None"):
        svi(None).resume(X, Y)
    svi(tmp_path / "fit.pt").run(X, Y)

    def smaller(x, y):
        pyro.sample("a", dist.Normal(0.0, 2.0))

    other = FlowSVI(smaller, AutoDiagonalNormal(smaller), checkpoint=tmp_path / "fit.pt", progress=False)
    with pytest.raises(ValueError, match="holds 4 parameters; model and guide have 2"):
        other.resume(X, Y)


@pytest.mark.parametrize(
    ("elbos", "best"),
    [
        ([(-10.0, 1.0), (-5.0, 0.1), (-4.9, 0.1), (-5.0, 0.1)], 3),  # as good as the best, by chance a little lower
        ([(-10.0, 1.0), (-5.0, 0.1), (-6.0, 0.1)], 1),  # worse
        ([(-10.0, 1.0), (-5.0, 0.1), (-50.0, 500.0)], 1),  # exploding, with an error to match
        ([(-10.0, 1.0), (-2.0, 9.0), (-5.0, 0.1)], 2),  # the highest one was a fluke
        ([(-10.0, 1.0), (-float("inf"), float("inf"))], 0),
    ],
)
def test_the_latest_block_that_is_not_worse_is_kept(elbos, best):
    fit = Progress(State.start(torch.zeros(1)), PlateauSchedule(0.1, 100))
    for step, (elbo, mcse) in enumerate(elbos):
        fit.observe(Evaluation(step, elbo, mcse), torch.full((2, 1), float(step)))
    assert fit.best_evaluation.step == best
    assert fit.best[0] == best
