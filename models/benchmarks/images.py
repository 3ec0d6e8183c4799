"""Images to model: MNIST, Omniglot, Caltech silhouettes, Frey faces.

Each loader looks in a folder first (an argument, or the environment variable `PYRO_NF_DATA`), there or in the subfolder
of the data set, and else downloads to pooch's cache. Whatever file the pixels come from, they are the same: their
checksum is compared, and that of a file where it is known, before anything else reads it. Nothing larger than 256 MiB
is read or unpacked.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_nf.interface import untrusted
from pyro_nf.interface.arguments import checked
from pyro_nf.models.benchmarks import image_files
from pyro_nf.models.benchmarks.image_files import Pixels
from pyro_nf.models.files import Files, Remote


class Images(NamedTuple):
    """Images as vectors, pixels row by row, in three parts.

    Attributes:
        train: `(size, height * width)`: 0 and 1 where the images are binary, else whole grey levels, 0 to 255.
        validation: The same.
        test: The same.
        shape: `(channels, height, width)`, as `ImageEncoder` takes it.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    shape: tuple[int, int, int]


# The files' checksums are those of TensorFlow Datasets 4.9.10.
_TORONTO = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
_LAKE = "https://github.com/brendenlake/omniglot/raw/master/python"
_GOOGLE = "https://storage.googleapis.com/cvdf-datasets/mnist"
_REMOTES = {
    "binarized_mnist_train.amat": Remote(
        f"{_TORONTO}/binarized_mnist_train.amat", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"
    ),
    "binarized_mnist_valid.amat": Remote(
        f"{_TORONTO}/binarized_mnist_valid.amat", "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"
    ),
    "binarized_mnist_test.amat": Remote(
        f"{_TORONTO}/binarized_mnist_test.amat", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"
    ),
    "train-images-idx3-ubyte.gz": Remote(
        f"{_GOOGLE}/train-images-idx3-ubyte.gz",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "t10k-images-idx3-ubyte.gz": Remote(
        f"{_GOOGLE}/t10k-images-idx3-ubyte.gz",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "images_background_small1.zip": Remote(
        f"{_LAKE}/images_background_small1.zip", "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"
    ),
    "images_background_small2.zip": Remote(
        f"{_LAKE}/images_background_small2.zip", "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"
    ),
    "caltech101_silhouettes_28.mat": Remote("https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28.mat"),
    "frey_rawface.mat": Remote("https://cs.nyu.edu/~roweis/data/frey_rawface.mat"),
}
# The only pickle that is read: any other could run code, or ask for all of the memory.
_FREY_PICKLE = "3b69410c6a5fd6e03f09012905168be3712373a094a776f7e58fcd0670d2138a"
# SHA-256 of all pixels of a data set, as bytes, in the order of its publication.
_CHECKSUMS = {
    "static MNIST": "07ad6da6ba6894a550cb68ae290ff3deb006a01f6b6ce1b3123edec502f1fce8",
    "MNIST": "5b92582eb909c82a9bfefcd44acbe9233be3eb5b419a44cf211022ad2bf4bf96",
    "Omniglot": "1dd824643cb3ea9e6850f8b04e095741dc764c5ab06889af048a051caf1fa7ae",
    "Caltech silhouettes": "73e2da987a8ced736230ffcbf2b23048e12e6406f40ea90271dbb2c156ba1ed6",
    "Frey faces": "2438ba4f0d2a6bd8bac43de756141eaa33c8d248dd613d464bdb1210d9b7af78",
}
# The last images of MNIST's training set are for validation.
_NUM_VALIDATION = 10_000
# Images for validation and for test, where a permutation makes the parts.
_HELD_OUT = {"Omniglot": (500, 1000), "Caltech silhouettes": (2264, 2307), "Frey faces": (200, 200)}


@checked
def load_static_mnist(
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Images:
    """Return MNIST as Larochelle binarised it once and for all: 50,000 / 10,000 / 10,000 binary images of 28 x 28.

    From `binarized_mnist_{train,valid,test}.amat`, or `mnist_static_packbits.npz` with the same bits.

    Args:
        folder: Where files may be; `None` for `PYRO_NF_DATA`. What is not there is downloaded.
        dtype: Of the images; `None` for torch's default.
        device: Where they are to live: minibatches are then gathered there.

    Raises:
        ValueError: If there is no such folder, or a file's pixels are not those that were published.
        ConnectionError: If a file is neither in the folder nor can be downloaded.
        ImportError: If it has to be downloaded and pooch is not installed.

    References:
        Larochelle, Murray (2011), "The neural autoregressive distribution estimator"; Salakhutdinov, Murray (2008),
        "On the quantitative analysis of deep belief networks".
    """
    files = Files("mnist_static_larochelle", folder)
    parts = ("train", "valid", "test")
    packed = files.local("mnist_static_packbits.npz")
    if packed is not None:
        array = untrusted.arrays(packed)
        pixels = [np.unpackbits(array(part), axis=1)[:, : 28 * 28] for part in parts]
    else:
        pixels = [image_files.read_amat(_get(files, f"binarized_mnist_{part}.amat")) for part in parts]
    _check("static MNIST", pixels)
    return _images(pixels, (1, 28, 28), dtype, device)


@checked
def load_mnist(
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Images:
    """Return MNIST in 256 grey levels: 50,000 / 10,000 / 10,000 images of 28 x 28, the last 10,000 for validation.

    From `train-images-idx3-ubyte.gz` and `t10k-images-idx3-ubyte.gz`. For binary images drawn anew in each epoch see
    `pyro_nf.models.Resampled` and `binarize`, for continuous ones `dequantize`.

    Args:
        folder: As in `load_static_mnist`.
        dtype: As in `load_static_mnist`.
        device: As in `load_static_mnist`.

    Raises:
        ValueError: As `load_static_mnist`.
        ConnectionError: As `load_static_mnist`.
        ImportError: As `load_static_mnist`.

    References:
        LeCun, Bottou, Bengio, Haffner (1998), "Gradient-based learning applied to document recognition".
    """
    files = Files("mnist_full", folder)
    train, test = (image_files.read_idx(_get(files, f"{part}-images-idx3-ubyte.gz")) for part in ("train", "t10k"))
    _check("MNIST", [train, test])
    return _images([train[:-_NUM_VALIDATION], train[-_NUM_VALIDATION:], test], (1, 28, 28), dtype, device)


@checked
def load_omniglot(
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Images:
    """Return 4,840 characters of Omniglot in 256 grey levels, ink 255: 3,340 / 500 / 1,000 images of 28 x 28.

    The eight alphabets of the two small background sets, 242 characters by 20 drawers, reduced from 105 x 105 by
    averages over boxes, and split by the permutation of `numpy.random.RandomState(0)`. This is *not* the `chardata.mat`
    of the literature (24,345 and 8,070 images of all alphabets): figures are not comparable.

    From `images_background_small1.zip` and `images_background_small2.zip`, which take Pillow to read, or
    `omniglot_small_28x28.npz`.

    Args:
        folder: As in `load_static_mnist`.
        dtype: As in `load_static_mnist`.
        device: As in `load_static_mnist`.

    Raises:
        ValueError: As `load_static_mnist`.
        ConnectionError: As `load_static_mnist`.
        ImportError: As `load_static_mnist`, and if archives have to be read and Pillow is not installed.

    References:
        Lake, Salakhutdinov, Tenenbaum (2015), "Human-level concept learning through probabilistic program induction".
    """
    files = Files("omniglot_small", folder)
    small = files.local("omniglot_small_28x28.npz")
    if small is not None:
        pixels = untrusted.arrays(small)("x").reshape(-1, 28 * 28)
    else:
        archives = [f"images_background_small{number}.zip" for number in (1, 2)]
        pixels = image_files.read_drawings({archive: _get(files, archive) for archive in archives})
    _check("Omniglot", [pixels])
    return _images(_shuffled_parts(pixels, "Omniglot"), (1, 28, 28), dtype, device)


@checked
def load_caltech_silhouettes(
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Images:
    """Return the outlines of Caltech 101's objects, filled: 4,100 / 2,264 / 2,307 binary images of 28 x 28.

    From `caltech101_silhouettes_28.mat`; the object is 1. The parts have the sizes of the published "split1", but the
    permutation of `numpy.random.RandomState(0)` makes them: figures are near those of the literature, not comparable
    to the digit.

    Args:
        folder: As in `load_static_mnist`.
        dtype: As in `load_static_mnist`.
        device: As in `load_static_mnist`.

    Raises:
        ValueError: As `load_static_mnist`.
        ConnectionError: As `load_static_mnist`.
        ImportError: As `load_static_mnist`.

    References:
        Marlin, Swersky, Chen, de Freitas (2010), "Inductive principles for restricted Boltzmann machine learning".
    """
    name = "caltech101_silhouettes_28.mat"
    x = image_files.read_mat(name, _get(Files("caltech_silhouettes", folder), name), "X")
    # Stored with the background 1, column by column.
    pixels = (1 - x.astype(np.uint8)).reshape(-1, 28, 28).swapaxes(1, 2).reshape(-1, 28 * 28)
    _check("Caltech silhouettes", [pixels])
    return _images(_shuffled_parts(pixels, "Caltech silhouettes"), (1, 28, 28), dtype, device)


@checked
def load_frey_faces(
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Images:
    """Return the frames of Brendan Frey's face in 256 grey levels: 1,565 / 200 / 200 images of 28 x 20.

    From `frey_rawface.mat`, or the `freyfaces.pkl` that autoencoders are often trained on: that very file, of a known
    checksum, for any other pickle could run code. Frames that follow one
    another are nearly equal: the permutation of `numpy.random.RandomState(0)` splits them.

    Args:
        folder: As in `load_static_mnist`.
        dtype: As in `load_static_mnist`.
        device: As in `load_static_mnist`.

    Raises:
        ValueError: As `load_static_mnist`.
        ConnectionError: As `load_static_mnist`.
        ImportError: As `load_static_mnist`.

    References:
        Roweis, Saul, Hinton (2002), "Global coordination of local linear models".
    """
    files = Files("freyfaces", folder)
    pickled = files.local("freyfaces.pkl")
    if pickled is not None:
        content = untrusted.read(pickled, sha256=_FREY_PICKLE)
        (pixels,) = image_files.ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    else:
        name = "frey_rawface.mat"
        pixels = np.ascontiguousarray(image_files.read_mat(name, _get(files, name), "ff").T)
    _check("Frey faces", [pixels])
    return _images(_shuffled_parts(pixels, "Frey faces"), (1, 28, 20), dtype, device)


def _get(files: Files, name: str) -> bytes:
    return files.read(name, _REMOTES[name])


def _check(name: str, parts: Sequence[Pixels]) -> None:
    """Raise a `ValueError` unless these are the pixels that were published."""
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part.tobytes())
    if checksum.hexdigest() != _CHECKSUMS[name]:
        raise ValueError(
            f"the pixels of {name} are not those that were published (SHA-256 {checksum.hexdigest()}, should be "
            f"{_CHECKSUMS[name]}): a file is damaged, or another one; delete it"
        )


def _images(
    parts: Sequence[Pixels], shape: tuple[int, int, int], dtype: torch.dtype | None, device: torch.device | str | None
) -> Images:
    kind = torch.get_default_dtype() if dtype is None else dtype
    # As bytes to the device, where they are made floats.
    train, validation, test = (torch.tensor(part, device=device).to(kind) for part in parts)
    return Images(train, validation, test, shape)


def _shuffled_parts(pixels: Pixels, name: str) -> list[Pixels]:
    """Cut a fixed permutation into training, validation and test images."""
    validation, test = _HELD_OUT[name]
    # RandomState is frozen: the same permutation in every version of NumPy.
    shuffled = pixels[np.random.RandomState(0).permutation(len(pixels))]
    train = len(pixels) - validation - test
    return [shuffled[:train], shuffled[train : train + validation], shuffled[train + validation :]]
