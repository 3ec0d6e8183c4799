import math

import numpy as np
import pytest
import torch

from pyro_nf.arguments import check_choice, check_flag, check_number, check_whole_number


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
