"""A function that is called many times is recorded, and stays the function that it was."""

import itertools

import pyro
import pytest
import torch

from pyro_nf.compiler.recording import Repeated, one_output, record


def test_later_calls_go_without_python_and_give_the_same():
    calls = []

    def function(x):
        calls.append(len(x))
        return {"y": x.sin(), "z": x.sum(-1)}

    run = Repeated(function)
    x = torch.randn(4, 3)
    for _ in range(10):
        found = run(x)
    num_calls = len(calls)
    found = run(2 * x)
    assert len(calls) == num_calls
    assert torch.equal(found["y"], (2 * x).sin())
    assert run(x[:2])["z"].shape == (2,)  # another shape: plain
    assert len(calls) == num_calls + 1


def test_draws_are_drawn_anew():
    run = Repeated(lambda x: {"y": x + torch.rand_like(x)})
    x = torch.zeros(5)
    results = [run(x)["y"] for _ in range(9)]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(results))


@pytest.mark.parametrize("function", [lambda x: {"y": x * float(x.sum())}, lambda x: {"y": x * next(COUNT)}])
def test_what_a_recording_would_hold_fast_stays_plain(function):
    run = Repeated(function)
    for i in range(1, 10):
        x = torch.full((2,), float(i))
        assert run(x)["y"].isfinite().all()
    assert run._graph is None


COUNT = iter(range(1, 1000))


def test_one_output_computes_no_other():
    graph = record(lambda x: (x.sin(), x.cos().sum()), torch.randn(3))
    alone = one_output(graph, 1)
    x = torch.randn(3)
    assert torch.equal(alone(x), x.cos().sum())
    assert not any("sin" in str(node.target) for node in alone.graph.nodes)


def test_nodes_that_draw_are_kept():
    graph = record(lambda x: (torch.rand_like(x), x + 1)[1], torch.zeros(2))
    pyro.set_rng_seed(0)
    graph(torch.zeros(2))
    after = torch.rand(1)
    pyro.set_rng_seed(0)
    torch.rand(2)
    assert torch.equal(after, torch.rand(1))
