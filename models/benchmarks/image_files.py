"""Readers of the files in which images come: amat, idx, MATLAB's, archives of drawings, pickles."""

import io
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pyro_nf.interface import untrusted

Pixels = npt.NDArray[np.uint8]


def read_amat(content: bytes) -> Pixels:
    """Read lines of 784 zeros and ones with spaces between."""
    text = np.frombuffer(content, np.uint8)
    digits = text[(text == ord("0")) | (text == ord("1"))]
    bits: Pixels = digits - ord("0")
    return bits.reshape(-1, 28 * 28)


def read_idx(content: bytes) -> Pixels:
    """Read images in MNIST's own format: four big-endian whole numbers, the last three the shape, then bytes."""
    size, height, width = np.frombuffer(content, ">i4", 3, 4).tolist()
    return np.frombuffer(content, np.uint8, offset=16).reshape(size, height * width)


def read_mat(name: str, content: bytes, variable: str) -> npt.NDArray[Any]:
    """Read an array of a file in MATLAB's format.

    The format is a header of 128 bytes and elements: their type and size, two whole numbers, and their data. Elements
    of type 15 are compressed, and are decompressed here, within bounds.

    References:
        The MathWorks, "MAT-file format", version 5.
    """
    from scipy.io import loadmat

    plain, rest = [content[:128]], content[128:]
    order: Literal["little", "big"] = "big" if content[126:128] == b"MI" else "little"
    while len(rest) >= 8:
        kind, size = (int.from_bytes(rest[start : start + 4], order) for start in (0, 4))
        element, rest = rest[: 8 + size], rest[8 + size :]
        plain.append(untrusted.inflate(name, element[8:])[0] if kind == 15 else element)
    with untrusted.damaged(name):
        found: npt.NDArray[Any] = loadmat(io.BytesIO(b"".join(plain)), variable_names=[variable])[variable]
    return found


def read_drawings(archives: dict[str, bytes]) -> Pixels:
    """Read the PNGs of archives, in the order of their names, as 28 x 28 pixels of ink."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading Omniglot's archives needs Pillow: pip install 'pyro-nf[models]'") from error
    drawings = {}
    for archive, content in archives.items():
        names, member = untrusted.unzip(archive, content)
        for name in names:
            if name.endswith(".png"):
                # Alphabet, character, file: some alphabets are in both archives.
                key = "/".join(Path(name).parts[-3:])
                with Image.open(io.BytesIO(member(name))) as image:
                    ink = ImageOps.invert(image.convert("L"))
                drawings[key] = np.asarray(ink.resize((28, 28), Image.Resampling.BOX)).ravel()
    return np.stack([drawings[key] for key in sorted(drawings)])


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and nothing else: a pickle could otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle names, if arrays are made of it."""
        known = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0]}
        if not module.startswith("numpy") or name not in known:
            raise ValueError(f"the pickle must hold NumPy arrays alone; got a {module}.{name}")
        return known[name]
