"""Fits that several processes share: two on this machine, by gloo."""

import contextlib
import io
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as processes

from pyro_nf.flows import Permutation
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.optim import GuardedAdam, State
from pyro_nf.inference.process_group import ProcessGroup
from pyro_nf.inference.schedule import PlateauSchedule
from pyro_nf.inference.steps import GraphError, GraphSteps, read, write
from pyro_nf.programs.program import BoundProgram, Program, Randomness

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods() or not processes.is_available(),
        reason="needs torch.distributed, and processes that start fast",
    ),
]

SEED, PARTICLES, EVERY, RATE = 7, 8, 10, 0.02
X = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -1.0], dtype=torch.float64)
DEADLINE = 90.0  # seconds: far more than needed, so that only a hang takes so long


# What the processes run. Each of these functions is called in a process of its own, by its name.


def regression(x, y, subsample_size=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(X), subsample_size=len(x) if subsample_size is None else subsample_size) as index:
        index = index if len(x) == len(X) else slice(None)  # a minibatch is what it is
        pyro.sample("y", dist.Normal(x[index] @ beta, 1.0), obs=y[index])


def hand_written(*args, **kwargs):
    loc = pyro.param("loc", lambda: torch.zeros(2))
    scale = pyro.param("scale", lambda: torch.ones(2), constraint=dist.constraints.positive)
    pyro.sample("beta", dist.Normal(loc, scale).to_event(1))


def params():
    return [value.detach().clone() for _, value in sorted(pyro.get_param_store().items())]


def make(model=regression, guide=hand_written, **options):
    options = {
        "num_particles": PARTICLES,
        "learning_rate": RATE,
        "max_steps": 5 * EVERY,
        "eval_every": EVERY,
        "eval_particles": 100,
        "seed": SEED,
        "progress": False,
        "compile": False,
    } | options
    return FlowSVI(model, guide, **options)


def fit(rank, how="run", args=(X, Y), subsample_size=None, callbacks=(), **options):
    """Fit; return the result, the parameters at the end, and those that the callbacks saw."""
    seen = []
    svi = make(callbacks=[lambda evaluation: seen.append(params()), *callbacks], **options)
    result = getattr(svi, how)(*args, **({} if subsample_size is None else {"subsample_size": subsample_size}))
    return {"result": result, "params": params(), "seen": seen}


def fit_recorded(rank, fails=None, **options):
    """Fit as recorded, where the compiler would come too; one process fails at one of the stages."""
    GraphSteps.compile = lambda self, num_steps: None
    if rank == 1 and fails is not None:
        plain = getattr(GraphSteps, fails)

        def fail(self, *args):
            plain(self, *args)
            raise GraphError(f"{fails} does not work here")

        setattr(GraphSteps, fails, fail)
    return fit(rank, **{"compile": True} | options)


def fit_batches(rank, sizes, **options):
    """Fit to minibatches of these sizes, other rows on each process."""
    rows = iter(torch.arange(len(X)).roll(-10 * rank).split(list(sizes[rank])))
    return fit_recorded(rank, how="run_batches", args=([(X[index], Y[index]) for index in rows],), **options)


def fit_infinite(rank, broken, batches=3, **options):
    """Fit to minibatches, one of them infinite, or of an infinite gradient, on the second process."""

    def kinked(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)
        pyro.factor("kink", -(x[0] * beta).square().sum().sqrt())
        pyro.factor("flag", torch.where(y[0] > 1e6, -torch.inf, 0.0))

    given = [(X[5 * i : 5 * i + 5].clone(), Y[5 * i : 5 * i + 5].clone()) for i in range(batches)]
    if rank == 1:
        value = given[-1][1] if broken == "ELBO" else given[-1][0]
        value[0] = 1e7 if broken == "ELBO" else 0.0
    return fit(rank, "run_batches", (given,), model=kinked, **options)


def fit_and_stop(rank, how, at=30, on=1, checkpoint=None, **options):
    """Fit; one process stops in some way."""

    def stop(evaluation):
        if evaluation.step != at or rank != on:
            return False
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "hanging":
            time.sleep(2 * DEADLINE)
        elif how == "interrupted":
            raise KeyboardInterrupt
        return True

    start = time.monotonic()
    try:
        return fit(rank, callbacks=[stop], checkpoint=checkpoint, **options)
    except BaseException as error:  # an interruption is no Exception
        return {"error": repr(error), "seconds": time.monotonic() - start, "params": params()}


def fit_own_file(rank, folder, until=None, **options):
    """Fit, as far as that, with a checkpoint whose name only this process knows."""
    stop = [lambda evaluation: evaluation.step == until]
    return fit(rank, checkpoint=folder / f"{rank}.checkpoint", callbacks=stop, **options)


def fit_without_seed(rank):
    """Fit from equal global states; return the noise of all steps."""
    noise = []

    class Noting(BoundProgram):
        def draw(self, *args):
            draws = super().draw(*args)
            noise.append(draws.noise)
            return draws

    class Noted(Program):
        def bind(self, *args, **kwargs):
            return Noting(self, args, kwargs)

    svi = make(seed=None)
    svi.program = Noted(regression, hand_written)
    torch.manual_seed(0)
    svi.run(X, Y)
    return {"noise": noise[2:], "set-up": noise[0]}  # without the draw that finds the parameters, and the first look


def fit_random_flow(rank):
    """Fit a guide whose structure is random."""

    def wide():
        pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))

    guide = AutoFlow(wide, flow=lambda dim: Permutation(torch.randperm(dim).tolist()))
    make(wide, guide).run()
    return {"order": [b.clone() for name, b in guide.named_buffers() if name.endswith("order")], "params": params()}


def fit_other_guides(rank):
    """Fit guides that have not the same parameters; return what they say."""

    def guide(*args):
        hand_written()
        if rank == 1:
            more = dist.Normal(pyro.param("more", lambda: torch.zeros(3)), 1.0).to_event(1)
            pyro.sample("aux", more, infer={"is_auxiliary": True})

    with pytest.raises(ValueError, match="must be the same on all processes") as raised:
        make(guide=guide).run(X, Y)
    return str(raised.value)


def fit_with_a_bar(rank):
    """Fit; return what appears on the terminal."""
    with contextlib.redirect_stderr(io.StringIO()) as terminal:
        make(progress=True).run(X, Y)
    return terminal.getvalue()


def use_ranks(rank):
    """Call each method."""
    ranks = ProcessGroup()
    tensor = torch.arange(3.0) + rank

    def fail():
        raise FileNotFoundError(f"not on {rank}")

    with pytest.raises(FileNotFoundError, match="not on 0"):
        ranks.from_first(fail)
    with ranks.no_sync():
        alone = ranks.mean(tensor)
    return {
        "place": (ranks.index, ranks.size),
        "mean": ranks.mean(tensor),
        "infinite": ranks.mean(torch.tensor([torch.inf, -torch.inf]) if rank else torch.zeros(2)).isfinite().any(),
        "alone": alone.equal(tensor) and alone is not tensor,
        "any": [ranks.any(False), ranks.any(rank == 1), ranks.any(True)],
        "gather": ranks.gather(f"of {rank}"),
        "broadcast": ranks.broadcast(tensor),
        "from_first": ranks.from_first(lambda: f"of {rank}"),
        "share": ranks.share(5),
    }


def work(task, rank, size, folder, timeout, options):
    """Run a task as one of several processes, and leave in a file what it returns, and what it warned of."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    meeting = f"file://{folder}/meeting"
    processes.init_process_group("gloo", meeting, timedelta(seconds=timeout), size, rank)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        outcome = globals()[task](rank, **options)
    partial_file = folder / f"{rank}.partial"
    torch.save((outcome, [str(warning.message) for warning in warned]), partial_file)
    partial_file.rename(folder / f"{rank}.outcome")
    processes.destroy_process_group()


# How they are started.


@pytest.fixture
def run(tmp_path):
    """Start a task as two processes; return what each returns, or `None` for one that was not to end."""
    context = multiprocessing.get_context("forkserver")  # imports once; each process starts from there
    context.set_forkserver_preload(["pytest", "torch._dynamo", "pyro_nf.guides", "pyro_nf.inference"])
    started: list[Any] = []
    count = iter(range(100))

    def run(task: Callable[..., Any], *, ends=(0, 1), timeout=60.0, warns: bool = False, **options: Any) -> list[Any]:
        folder = tmp_path / f"run {next(count)}".replace(" ", "-")
        folder.mkdir()
        pair = []
        for rank in range(2):
            given = {"ARGUMENTS": (task.__name__, rank, 2, folder, timeout, options)}
            pair.append(context.Process(target=runpy.run_path, args=(__file__, given, "worker"), daemon=True))
            pair[-1].start()
        started.extend(pair)
        limit = time.monotonic() + DEADLINE
        for rank in ends:
            pair[rank].join(limit - time.monotonic())
            assert pair[rank].exitcode == 0, f"process {rank} ended with {pair[rank].exitcode}; None: it hangs"
        outcomes: list[Any] = [None, None]
        for rank in ends:
            outcomes[rank], warned = torch.load(folder / f"{rank}.outcome", weights_only=False)
            assert warns or not warned
            if warns:
                outcomes[rank]["warned"] = warned
        return outcomes

    yield run
    for process in started:
        process.kill()
        process.join(DEADLINE)


def assert_equal_results(one, other):
    """Equal bit for bit, but for clocks."""
    for name, value in vars(one["result"]).items():
        if not name.endswith("seconds"):
            wanted = vars(other["result"])[name]
            assert torch.equal(value, wanted) if isinstance(value, torch.Tensor) else value == wanted, name
    assert one["params"]
    assert all(map(torch.equal, one["params"], other["params"]))
    assert all(torch.isfinite(param).all() for param in one["params"])


# The fit is right.


def reference(draws: list[list[Randomness]], data: list[list[Any]]) -> torch.Tensor:
    """The steps of two processes in one: `draws[rank][step]`, `data[rank][step]` -> ELBOs, and the parameters set."""
    pyro.clear_param_store()
    hand_written()
    variables = [pyro.param(name).unconstrained() for name in ("loc", "scale")]
    program, objective, adam = Program(regression, hand_written), ELBO(), GuardedAdam(10.0)
    state, elbos = State.start(read(variables)), []
    rates = PlateauSchedule(RATE, 5 * EVERY).rates(0, len(draws[0]), state.params)
    for step, rate in enumerate(rates):
        write(state.params, variables)
        vectors = []
        for rank in range(2):
            elbo, surrogate = objective.estimate(program.bind(*data[rank][step]), draws[rank][step])
            grads = torch.autograd.grad(-surrogate, variables)
            vectors.append(torch.cat([elbo.view(1), *(grad.flatten() for grad in grads)]))
        mean = (vectors[0] + vectors[1]) / 2
        state = adam.update(state, mean[0], mean[1:], rate)
        elbos.append(mean[0])
    write(state.params, variables)
    return torch.stack(elbos)


def stream(rank: int, args: Any, num_looks: int | None, num_drawn: int, block: int) -> list[Randomness]:
    """The draws of one of the two processes: after those of the first evaluation, those of the steps, in blocks."""
    program = Program(regression, hand_written).bind(*args)
    program.draw(1)  # with the first run, which draws too
    torch.manual_seed(SEED + rank)
    program.draw(num_drawn, num_looks)
    blocks = [program.draw(PARTICLES // 2, block) for _ in range(5 * EVERY // block)]
    return [draws.step(i) for draws in blocks for i in range(block)]


def assert_is_reference(outcomes, draws, data):
    assert_equal_results(*outcomes)
    history = reference(draws, data)
    assert torch.equal(outcomes[0]["result"].history, history)
    assert all(map(torch.equal, outcomes[0]["seen"][-1], params()))
    assert not torch.equal(draws[0][0].noise, draws[1][0].noise)
    assert outcomes[0]["result"].steps == 5 * EVERY
    assert outcomes[0]["result"].num_skipped == 0


def test_processes_that_share_the_draws(run):
    draws = [stream(rank, (X, Y), None, 50, EVERY) for rank in range(2)]
    assert_is_reference(run(fit), draws, [[(X, Y)] * len(draws[0])] * 2)


def test_processes_with_minibatches_of_a_plate(run):
    args = (X, Y, 5)
    draws = [stream(rank, args, EVERY, PARTICLES // 2, EVERY) for rank in range(2)]
    assert not torch.equal(draws[0][0].indices["rows"], draws[1][0].indices["rows"])
    assert_is_reference(run(fit, subsample_size=5), draws, [[args] * len(draws[0])] * 2)


def test_processes_with_batches_of_their_own(run):
    batches = [[(X[rows], Y[rows]) for rows in torch.arange(20).roll(-10 * rank).split(5)] for rank in range(2)]
    data = [[batches[rank][step % 4] for step in range(5 * EVERY)] for rank in range(2)]
    draws = [stream(rank, batches[rank][0], EVERY, PARTICLES // 2, 1) for rank in range(2)]
    assert_is_reference(run(fit_batches, sizes=[(5,) * 4] * 2, compile=False), draws, data)


def test_processes_find_one_learning_rate_and_one_end(run):
    one, other = run(fit, learning_rate=None, max_steps=3000, eval_every=50)
    assert_equal_results(one, other)
    assert one["result"].converged
    assert one["result"].steps < 3000


@pytest.mark.parametrize("broken", ["ELBO", "gradient"])
def test_what_is_not_finite_on_one_is_skipped_by_all(run, broken):
    one, other = run(fit_infinite, broken=broken, max_steps=30)
    assert_equal_results(one, other)
    assert one["result"].num_skipped == 10


def test_what_is_never_finite_on_one_ends_all_and_is_named(run):
    one, other = run(fit_infinite, broken="ELBO", batches=1, max_steps=200, eval_every=50)
    assert_equal_results(one, other)
    assert one["result"].stop_reason.startswith("failed")
    assert one["result"].stop_reason.endswith("density: flag")
    assert one["result"].steps == 100


# All processes take the same form.


@pytest.mark.parametrize("subsample_size", [None, 5])
def test_recorded_is_plain(run, subsample_size):
    plain, recorded = (run(task, subsample_size=subsample_size) for task in (fit, fit_recorded))
    assert_equal_results(*recorded)
    assert recorded[0]["result"].execution == "compiled"
    torch.testing.assert_close(recorded[0]["result"].history, plain[0]["result"].history, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(recorded[0]["params"], plain[0]["params"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("fails", "form"), [("__init__", "plain"), ("verify", "plain"), ("compile", "recorded")])
def test_where_one_fails_to_go_on_none_does(run, fails, form):
    one, other = run(fit_recorded, fails=fails, warns=True)
    assert_equal_results(one, other)
    assert one["result"].execution == form
    assert one["result"].execution_reason == f"{fails} does not work here"
    assert [text.partition(":")[0] for text in one["warned"]] == [f"the step runs {form}, not compiled"]
    assert not other["warned"]


def test_batches_of_other_sizes_are_prepared_by_all_at_once(run):
    sizes = [(5, 5, 4, 6), (5, 5, 5, 5)]
    plain, recorded = run(fit_batches, sizes=sizes, compile=False), run(fit_batches, sizes=sizes, warns=True)
    assert_equal_results(*recorded)
    torch.testing.assert_close(recorded[0]["result"].history, plain[0]["result"].history, rtol=1e-8, atol=1e-8)
    assert ["prepared again" in text for text in recorded[0]["warned"]] == [True, True]
    assert not recorded[1]["warned"]


@pytest.fixture
def patience(monkeypatch):
    """Wait for a compiler."""
    monkeypatch.setitem(globals(), "DEADLINE", 600.0)


@pytest.mark.slow
@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("subsample_size", [None, 5])
def test_compiled_is_plain(run, subsample_size):
    plain = run(fit, subsample_size=subsample_size)
    compiled = run(fit, subsample_size=subsample_size, compile=True, timeout=300)
    assert_equal_results(*compiled)
    assert compiled[0]["result"].execution == "compiled"
    torch.testing.assert_close(compiled[0]["result"].history, plain[0]["result"].history, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(compiled[0]["params"], plain[0]["params"], rtol=1e-8, atol=1e-8)


# Processes end together.


def test_a_callback_of_one_stops_all(run):
    one, other = run(fit_and_stop, how="by its callback")
    assert_equal_results(one, other)
    assert one["result"].stop_reason == "stopped by a callback at step 30"
    assert one["result"].steps == 30


@pytest.mark.parametrize("dead", [0, 1])
def test_the_end_of_one_ends_the_other_and_both_can_go_on(run, tmp_path, dead):
    path = tmp_path / "fit.checkpoint"
    alive = run(fit_and_stop, how="killed", on=dead, checkpoint=path, ends=[1 - dead])[1 - dead]
    assert "Connection closed by peer" in alive["error"] or "Connection reset by peer" in alive["error"]
    assert alive["seconds"] < 30
    pyro.clear_param_store()
    hand_written()
    variables = [pyro.param(name).unconstrained() for name in ("loc", "scale")]
    write(torch.load(path, weights_only=True)["best"][0], variables)
    assert all(map(torch.equal, alive["params"], params()))
    assert_equal_results(run(fit, how="resume", checkpoint=path)[0], run(fit)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("patience")
def test_the_end_of_one_ends_the_other_in_compiled_steps(run):
    alive = run(fit_and_stop, how="killed", compile=True, timeout=300.0, ends=[0])[0]
    assert "Connection closed by peer" in alive["error"] or "Connection reset by peer" in alive["error"]
    assert all(torch.isfinite(param).all() for param in alive["params"])


@pytest.mark.parametrize("how", ["hanging", "interrupted"])
def test_one_that_hangs_or_is_interrupted_ends_the_other(run, how):
    ends = [0] if how == "hanging" else [0, 1]
    alive, stopped = run(fit_and_stop, how=how, ends=ends, timeout=5.0)
    assert alive["error"].startswith("RuntimeError")
    assert alive["seconds"] < 30
    if stopped:
        assert stopped["error"] == "KeyboardInterrupt()"


# Checkpoints.


@pytest.mark.parametrize("subsample_size", [None, 5])
def test_a_continued_run_is_the_whole_one_bit_for_bit(run, tmp_path, subsample_size):
    options = {"folder": tmp_path, "subsample_size": subsample_size}
    whole = run(fit_own_file, **options)
    assert_equal_results(*whole)
    assert [path.name for path in tmp_path.glob("*.checkpoint*")] == ["0.checkpoint"]
    assert run(fit_own_file, until=20, **options)[0]["result"].steps == 20
    for outcome in run(fit_own_file, how="resume", **options):
        assert_equal_results(outcome, whole[0])


def test_a_checkpoint_of_two_processes_is_not_for_one(run, tmp_path):
    run(fit_own_file, folder=tmp_path)
    with pytest.raises(ValueError, match="is of 2 processes, each with its random state; there are 1"):
        make(checkpoint=tmp_path / "0.checkpoint").resume(X, Y)


# The rest.


def test_the_script_of_the_documentation(tmp_path):
    code = (Path(__file__).parents[2] / "docs" / "fit.py").read_text()
    assert "seed=0" in code
    (tmp_path / "fit.py").write_text(code.replace("seed=0", "seed=0, learning_rate=0.01, max_steps=20"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "fit.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert re.findall("ELBO .* after 20 steps", done.stdout)
    assert done.stderr.count(" 0/20 ") == 1


def test_noise_differs_from_equal_global_states(run):
    one, other = run(fit_without_seed)
    assert torch.equal(one["set-up"], other["set-up"])
    assert len(one["noise"]) == len(other["noise"]) >= 5
    assert not any(map(torch.equal, one["noise"], other["noise"]))


def test_processes_with_other_parameters_are_told(run):
    for message in run(fit_other_guides):
        assert message.endswith("parameters of shapes [[(2,), (2,)], [(2,), (2,), (3,)]]")


def test_what_is_random_in_a_guide_is_the_same_on_all(run):
    one, other = run(fit_random_flow)
    assert one["order"]
    assert all(map(torch.equal, one["order"], other["order"]))
    assert all(map(torch.equal, one["params"], other["params"]))


def test_only_the_first_shows_a_bar(run):
    one, other = run(fit_with_a_bar)
    assert "50/50" in one
    assert "ELBO" in one
    assert not other


def test_what_processes_tell_each_other(run):
    one, other = run(use_ranks)
    assert (one.pop("place"), other.pop("place")) == ((0, 2), (1, 2))
    for outcome in (one, other):
        assert torch.equal(outcome["mean"], torch.arange(3.0) + 0.5)
        assert torch.equal(outcome["broadcast"], torch.arange(3.0))
        assert not outcome["infinite"]
        assert outcome["alone"]
        assert outcome["any"] == [False, True, True]
        assert outcome["gather"] == ["of 0", "of 1"]
        assert outcome["from_first"] == "of 0"
        assert outcome["share"] == 3


def test_one_process_tells_itself():
    ranks, tensor = ProcessGroup(), torch.ones(2)
    assert (ranks.index, ranks.size) == (0, 1)
    assert ranks.mean(tensor) is tensor
    assert ranks.broadcast(tensor) is tensor
    assert [ranks.any(False), ranks.any(True)] == [False, True]
    assert ranks.gather(3) == [3]
    assert ranks.from_first(lambda: 4) == 4
    assert ranks.share(5) == 5


if __name__ == "worker":
    work(*ARGUMENTS)  # type: ignore[name-defined]  # noqa: F821 - of runpy, in `run`
