import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_nf.interface.arguments import (
    Count,
    Positive,
    Size,
    check_choice,
    check_flag,
    check_number,
    check_real_tensor,
    check_whole_number,
    checked,
)


def test_what_is_right_comes_back():
    assert check_whole_number("n", np.int64(3)) == 3
    assert check_number("x", np.float32(0.5), above=0) == 0.5
    assert check_number("x", 0, least=0) == 0.0
    assert check_choice("method", "psis", ("psis", "imh")) == "psis"
    assert check_flag("progress", True)


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "3", None, math.nan, torch.tensor(3), [1]])
def test_whole_numbers(value):
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1; got"):
        check_whole_number("num_samples", value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "a", None, True, torch.tensor(1.0)])
def test_numbers(value):
    with pytest.raises(ValueError, match="rate must be a finite number greater than 0; got"):
        check_number("rate", value, above=0)


def test_sentences():
    with pytest.raises(ValueError, match="n must be a whole number from 1 to 5; got 6"):
        check_whole_number("n", 6, most=5)
    with pytest.raises(ValueError, match="method must be 'resample', 'psis' or 'imh'; got 'psi'; did you mean 'psis'"):
        check_choice("method", "psi", ("resample", "psis", "imh"))
    with pytest.raises(ValueError, match=r"compile must be True, False or 'auto'; got 1"):
        check_choice("compile", 1, (True, False, "auto"))
    with pytest.raises(ValueError, match=r"seed must .* got \[0, 0.*\.\.\. \(a list\)"):
        check_whole_number("seed", [0] * 100)
    with pytest.raises(ValueError, match="progress must be True or False; got 'yes'"):
        check_flag("progress", "yes")


@checked
def function(
    dim: Size,
    widths: Sequence[Size] | None = None,
    context_dim: Count = 0,
    rate: Positive = 0.1,
    shift: float = 0.0,
    kind: Literal["a", "b"] = "a",
    flag: bool = True,
    data: Tensor | float | None = None,
    layer: nn.Module | None = None,
    make: Callable[[], Any] = list,
    anything: Any = None,
    *rest: int,
    name: str = "x",
    **options: Any,
) -> int:
    """What it is for."""
    return dim


def test_a_checked_function_takes_what_is_annotated():
    assert function.__doc__ == "What it is for."
    assert function(2) == 2
    assert function(2, [3, 4], 0, 0.5, -1, "b", False, torch.zeros(2), nn.Linear(1, 1), dict, 0, 1, name="y", z=None)
    assert function(2, range(1, 3), data=1.5)
    with pytest.raises(TypeError, match="missing"):
        function()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dim": 0}, "dim must be a whole number of at least 1; got 0"),
        ({"dim": 2.0}, "dim must be a whole number of at least 1; got 2.0"),
        ({"widths": 3}, "widths must be a list or a tuple; got 3"),
        ({"widths": "32"}, "widths must be a list or a tuple; got '32'"),
        ({"widths": [8, 0]}, r"widths\[1\] must be a whole number of at least 1; got 0"),
        ({"context_dim": -1}, "context_dim must be a whole number of at least 0; got -1"),
        ({"rate": 0}, "rate must be a finite number greater than 0; got 0"),
        ({"shift": math.nan}, "shift must be a finite number; got nan"),
        ({"kind": "c"}, "kind must be 'a' or 'b'; got 'c'"),
        ({"flag": 1}, "flag must be True or False; got 1"),
        ({"data": "x"}, "data must be a Tensor or a finite number; got 'x'"),
        ({"layer": 3}, "layer must be a Module; got 3"),
        ({"make": 3}, "make must be callable; got 3"),
        ({"name": 3}, "name must be a str; got 3"),
    ],
)
def test_a_checked_function_names_what_is_wrong(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        function(**{"dim": 1, **arguments})


def test_positional_rests_are_checked_one_by_one():
    with pytest.raises(ValueError, match="rest must be a whole number; got 'a'"):
        function(1, None, 0, 0.1, 0.0, "a", True, None, None, list, None, 1, "a")


@pytest.mark.parametrize(
    "value",
    [[1.0], torch.tensor([1, 2]), torch.zeros(0, 2), torch.zeros(2, device="meta"), torch.zeros(3), torch.zeros(())],
)
def test_tensors(value):
    sentence = r"data must be a tensor of real numbers, at least one, of shape \(\*batch, 2\); got"
    assert check_real_tensor("data", torch.zeros(5, 2), (2,)).shape == (5, 2)
    with pytest.raises(ValueError, match=sentence):
        check_real_tensor("data", value, (2,))
    with pytest.raises(ValueError, match="data must be finite; 1 of its 2 numbers are NaN or infinite"):
        check_real_tensor("data", torch.tensor([1.0, math.nan]), (2,))
    with pytest.raises(ValueError, match=r"of shape \(any\); got"):
        check_real_tensor("data", torch.zeros(5, 2), (None,), batch=False)
