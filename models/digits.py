"""Small real images that come with scikit-learn."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Half of the largest grey value, 16: a pixel is ink or paper.
_THRESHOLD = 8
_NUM_TRAIN = 1397


class Digits(NamedTuple):
    """Binary images of handwritten digits, `(size, 64)`, 8 x 8 pixels row by row, values 0 and 1.

    Attributes:
        train: 1,397 images.
        test: 400 images.
    """

    train: Tensor
    test: Tensor


def load_digits() -> Digits:
    """Return scikit-learn's 1,797 digits, binarised at half the grey scale, in a fixed split.

    The split is the permutation of `numpy.random.RandomState(0)`: its first 1,397 entries train.

    Raises:
        ImportError: If scikit-learn is not installed.

    References:
        Alpaydin, Kaynak (1998), "Optical recognition of handwritten digits", UCI machine learning repository.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("load_digits needs scikit-learn: pip install 'pyro-nf[models]'") from error
    images = torch.as_tensor(load().data >= _THRESHOLD, dtype=torch.get_default_dtype())
    # RandomState is frozen: the same permutation in every version of NumPy.
    order = torch.as_tensor(np.random.RandomState(0).permutation(len(images)))
    return Digits(images[order[:_NUM_TRAIN]], images[order[_NUM_TRAIN:]])
