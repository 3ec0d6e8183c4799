"""A continued run is the run it continues."""

import os
import zipfile

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import pyro_nf
from pyro_nf.flows import ElementwiseAffine, Planar
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.checkpoint import Progress
from pyro_nf.inference.elbo import ELBO, KLAnnealedELBO
from pyro_nf.inference.optim import State
from pyro_nf.inference.result import Evaluation
from pyro_nf.inference.schedule import PlateauSchedule
from pyro_nf.inference.steps import GraphSteps

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


@pytest.mark.parametrize(("form", "learning_rate"), [("plain", 0.02), ("recorded", 0.02), ("recorded", None)])
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


DATA = torch.tensor([1.0, 2.0, 3.0, 2.5, 0.5])


def normal(y, sd=5.0, likelihood=dist.Normal):
    mu = pyro.sample("mu", dist.Normal(0.0, sd))
    with pyro.plate("d", len(y)):
        pyro.sample("y", likelihood(mu, torch.ones(())), obs=y)


def fit(path, model=normal, guide=AutoNormal, **options):
    pyro.clear_param_store()
    options = {"max_steps": 20, "eval_every": 10, "num_particles": 4, "learning_rate": 0.05, "seed": 1} | options
    return FlowSVI(model, guide(model), checkpoint=path, compile=False, eval_particles=10, progress=False, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "fit.pt"
    fit(path).run(DATA)
    return path


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((DATA + 50,), {}, r"the argument 1 was float32 of shape \(5,\) and mean 1.8 .* and is .* and mean 51.8"),
        ((DATA[:4],), {}, r"the argument 1 was float32 of shape \(5,\) .* and is float32 of shape \(4,\)"),
        ((DATA.double(),), {}, r"the argument 1 was float32 .* and is float64"),
        ((DATA.flip(0),), {}, r"the argument 1 was"),
        ((DATA, 5.0), {}, r"the argument 2 was missing and is 5"),
        ((DATA,), {"sd": 5.0}, r"the argument 'sd' was missing and is 5"),
        ((DATA,), {"likelihood": dist.Laplace}, r"the argument 'likelihood' was missing"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(checkpoint, args, kwargs, message):
    with pytest.raises(ValueError, match=rf"checkpoint '.*fit.pt' is of another fit: {message}.* run the fit anew"):
        fit(checkpoint).resume(*args, **kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2}, "the option seed was 1 and is 2"),
        ({"seed": None}, "the option seed was 1 and is None"),
        ({"learning_rate": 0.04}, r"the option learning_rate was 0.05 and is 0.04"),
        ({"num_particles": 8, "clip_norm": 3.0}, "num_particles was 4 and is 8; the option clip_norm was 10 and is 3"),
        ({"objective": ELBO(annealing_steps=5)}, r"the option objective.annealing_steps was 0 and is 5"),
        ({"objective": KLAnnealedELBO()}, "the option objective was ELBO and is KLAnnealedELBO"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(checkpoint, options, message):
    with pytest.raises(ValueError, match=f"is of another fit: .*{message}"):
        fit(checkpoint, **options).resume(DATA)


def test_a_checkpoint_of_another_model_or_guide_is_refused(checkpoint, tmp_path):
    def wider(y):
        normal(y, 6.0)

    def renamed(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("d", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"the log density, at a fixed draw, of site 'mu' was .* and is"):
        fit(checkpoint, wider).resume(DATA)
    with pytest.raises(ValueError, match=r"the log density, at a fixed draw, of site 'mu' was .* and is missing"):
        fit(checkpoint, renamed).resume(DATA)
    with pytest.raises(ValueError, match=r"the log density, at a fixed draw, of the guide was .* and is"):
        fit(checkpoint, guide=lambda model: Scaled()).resume(DATA)

    def held(y=DATA):
        normal(y.clone())

    held.__defaults__ = (DATA,)
    fit(tmp_path / "held.pt", held).run()
    held.__defaults__ = (DATA + 1,)
    with pytest.raises(ValueError, match=r"the data of site 'y' was .* and mean 1.8 .* and is .* and mean 2.8"):
        fit(tmp_path / "held.pt", held).resume()


class Scaled:
    """A guide with as many parameters as AutoNormal, and others."""

    def __call__(self, y):
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample(
            "mu", dist.Normal(loc, 2 * pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive))
        )


def test_a_checkpoint_of_another_version_is_refused(checkpoint, tmp_path, monkeypatch):
    content = torch.load(checkpoint, weights_only=True)
    del content["fingerprint"]
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"old.pt' was written by a version of pyro-nf that did not note"):
        fit(tmp_path / "old.pt").resume(DATA)
    monkeypatch.setattr(pyro_nf, "__version__", "9.0")
    with pytest.raises(ValueError, match=r"the version of pyro-nf was 0.1.0 and is 9.0"):
        fit(checkpoint).resume(DATA)


def test_minibatches_cannot_be_resumed(tmp_path):
    fit(tmp_path / "fit.pt").run_batches([DATA])
    with pytest.raises(ValueError, match="the argument was minibatches and is missing"):
        fit(tmp_path / "fit.pt").resume(DATA)


def test_data_that_a_callback_changes_are_no_other_data(tmp_path):
    def draw_anew(evaluation):
        data.add_(0.1)
        return evaluation.step == 20

    data = DATA.clone()
    fit(tmp_path / "fit.pt", callbacks=[draw_anew], max_steps=40).run(data)
    assert fit(tmp_path / "fit.pt", max_steps=40).resume(DATA + 1).steps == 40
    with pytest.raises(ValueError, match="the option seed"):
        fit(tmp_path / "fit.pt", max_steps=40, seed=5).resume(DATA + 1)


def test_what_is_random_at_the_start_is_no_other_fit(tmp_path):
    def guide(model):
        return AutoFlow(model, Planar)

    torch.manual_seed(1)
    first = fit(tmp_path / "fit.pt", guide=guide, seed=None, callbacks=[lambda evaluation: True]).run(DATA)
    torch.manual_seed(2)
    assert fit(tmp_path / "fit.pt", guide=guide, seed=None).resume(DATA).evaluations[0] == first.evaluations[0]


def test_what_a_warm_start_found_is_kept(tmp_path):
    options = {"guide": lambda model: AutoFlow(model, lambda dim: ElementwiseAffine(dim)), "num_starts": 2}
    whole = fit(tmp_path / "whole.pt", **options).run(DATA)
    fit(tmp_path / "cut.pt", callbacks=[lambda evaluation: True], **options).run(DATA)
    assert_same(fit(tmp_path / "cut.pt", **options).resume(DATA), whole)


@pytest.mark.parametrize("max_steps", [60, 160])
def test_a_larger_bound_is_honoured(tmp_path, max_steps):
    short = fit(tmp_path / "fit.pt", max_steps=40).run(DATA + 20)
    assert short.stop_reason.endswith("max_steps=40")
    longer = fit(tmp_path / "fit.pt", max_steps=max_steps).resume(DATA + 20)
    assert longer.steps == max_steps
    assert longer.stop_reason.endswith(f"max_steps={max_steps}")
    assert longer.elbo > short.elbo
    assert torch.equal(longer.history[:40], short.history)


def test_a_smaller_bound_ends_earlier_but_not_in_the_past(tmp_path):
    fit(tmp_path / "fit.pt", max_steps=300, callbacks=[lambda evaluation: evaluation.step == 50]).run(DATA + 20)
    result = fit(tmp_path / "fit.pt", max_steps=70).resume(DATA + 20)
    assert (result.steps, result.converged) == (70, False)
    with pytest.raises(ValueError, match="max_steps must be at least the 70 steps that the checkpoint holds; got 60"):
        fit(tmp_path / "fit.pt", max_steps=60).resume(DATA + 20)


def test_a_run_that_reached_its_plateau_stays_ended(tmp_path):
    first = fit(tmp_path / "fit.pt", max_steps=1000).run(DATA)
    assert first.converged
    again = fit(tmp_path / "fit.pt", max_steps=5000).resume(DATA)
    assert (again.steps, again.converged, again.plateau_step) == (first.steps, True, first.plateau_step)


def damaged_files(path):
    """Write what is no checkpoint, and yield its name and what is said of it."""
    path.joinpath("text").write_text("no checkpoint")
    path.joinpath("empty").touch()
    torch.save([1, 2], path / "list")
    torch.save({"fingerprint": {}, "state": 1}, path / "parts")
    with zipfile.ZipFile(path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    yield from dict.fromkeys(["text", "empty", "list", "parts", "bomb"], "is damaged, or of another format").items()
    yield "nothing", "checkpoint must name a file that a run has written"


@pytest.mark.parametrize("number", range(6))
def test_what_is_no_checkpoint_gets_a_sentence(tmp_path, number):
    name, message = list(damaged_files(tmp_path))[number]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / name).resume(DATA)


class Runs:
    """A pickle that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_runs_nothing(tmp_path):
    torch.save({"fingerprint": Runs(tmp_path / "made")}, tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="is damaged, or of another format"):
        fit(tmp_path / "fit.pt").resume(DATA)
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_or_a_device_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("zero", "a device")):
        for verb in ("run", "resume"):
            with pytest.raises(ValueError, match=f"must be a regular file; it is {kind}"):
                getattr(fit(tmp_path / name), verb)(DATA)
    with pytest.raises(ValueError, match="checkpoint must be a file's path; got the folder"):
        fit(tmp_path)
    with pytest.raises(ValueError, match="checkpoint must be a path in a folder that exists"):
        fit(tmp_path / "nowhere" / "fit.pt")


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("fit.pt", "fit.pt.partial"):
        (tmp_path / name).symlink_to(victim)
    fit(tmp_path / "fit.pt").run(DATA)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "fit.pt").is_symlink()


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
