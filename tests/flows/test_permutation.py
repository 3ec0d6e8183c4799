"""Permutation: order, and what it refuses."""

import pytest
import torch

from pyro_nf.flows import Permutation


def test_takes_coordinates_in_the_given_order() -> None:
    y, log_det = Permutation([2, 0, 1]).forward_and_log_det(torch.tensor([[10.0, 11.0, 12.0]]))
    assert y.tolist() == [[12.0, 10.0, 11.0]]
    assert log_det.tolist() == [0.0]


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2, 1, 4]])
def test_order_must_be_a_permutation(order: list[int]) -> None:
    with pytest.raises(ValueError, match=r"order must hold each of the numbers 0, 1, 2, ... once; got"):
        Permutation(order)
