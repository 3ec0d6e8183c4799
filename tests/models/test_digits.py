import sys

import pytest
import torch

from pyro_nf.models import load_digits


def test_sizes_values_and_the_fixed_split():
    digits = load_digits()
    assert (digits.train.shape, digits.test.shape) == ((1397, 64), (400, 64))
    assert set(digits.train.unique().tolist()) == {0.0, 1.0}
    # Ink in the split as it was first made: a change of split would change every published figure.
    assert (int(digits.train.sum()), int(digits.test.sum())) == (28934, 8217)
    assert torch.equal(load_digits().test, digits.test)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-nf\[models\]'"):
        load_digits()
