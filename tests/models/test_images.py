import functools
import gzip
import hashlib
import http.server
import pickle
import struct
import sys
import threading
import zipfile

import numpy as np
import pooch
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from pyro_nf.interface import untrusted
from pyro_nf.models import files
from pyro_nf.models.benchmarks import image_files, images
from pyro_nf.models.benchmarks.images import (
    load_caltech_silhouettes,
    load_frey_faces,
    load_mnist,
    load_omniglot,
    load_static_mnist,
)

RANDOM = np.random.RandomState(1)
BITS = {part: RANDOM.randint(0, 2, (size, 784), np.uint8) for part, size in (("train", 5), ("valid", 3), ("test", 4))}
LEVELS = RANDOM.randint(0, 256, (9, 784)).astype(np.uint8)
FACES = RANDOM.randint(0, 256, (9, 560)).astype(np.uint8)
SILHOUETTES = RANDOM.randint(0, 2, (9, 28, 28)).astype(np.uint8)
DRAWINGS = [RANDOM.randint(0, 2, (105, 105)).astype(bool) for _ in range(6)]


@pytest.fixture
def published(monkeypatch):
    """Declare that these pixels are those of a data set, and its parts small."""

    def declare(name, *parts):
        checksum = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
        monkeypatch.setitem(images._CHECKSUMS, name, checksum)
        monkeypatch.setitem(images._HELD_OUT, name, (2, 3))
        monkeypatch.setattr(images, "_NUM_VALIDATION", 2)
        for file, remote in images._REMOTES.items():
            monkeypatch.setitem(images._REMOTES, file, remote._replace(sha256=None, contents=None))
        monkeypatch.setattr(images, "_FREY_PICKLE", hashlib.sha256(pickle.dumps([FACES], protocol=4)).hexdigest())

    return declare


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a folder in the place of the net, and cache in another."""
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        for name in list(images._REMOTES):
            url = f"http://127.0.0.1:{running.server_port}/{name}"
            monkeypatch.setitem(images._REMOTES, name, files.Remote(url))
        monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
        monkeypatch.delenv("PYRO_NF_DATA", raising=False)
        monkeypatch.setattr(pooch.get_logger(), "disabled", True)
        yield served
        running.shutdown()


def write_packed(folder):
    np.savez(folder / "mnist_static_packbits.npz", **{k: np.packbits(v, axis=1) for k, v in BITS.items()}, d=784)


def write_amat(folder):
    for part, bits in BITS.items():
        (folder / f"binarized_mnist_{part}.amat").write_text("".join(" ".join(map(str, row)) + "\n" for row in bits))


def write_idx(folder):
    for part, pixels in (("train", LEVELS[:6]), ("t10k", LEVELS[6:])):
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">4i", 2051, len(pixels), 28, 28) + pixels.tobytes())


def write_zips(folder):
    """Two archives that share a drawing; ink is False."""
    for number, drawings in ((1, DRAWINGS[:4]), (2, DRAWINGS[3:])):
        with zipfile.ZipFile(folder / f"images_background_small{number}.zip", "w") as archive:
            for k, drawing in enumerate(drawings, start=3 * (number - 1)):
                with archive.open(f"images_background_small{number}/Greek/character0{k % 2}/{k}.png", "w") as file:
                    Image.fromarray(~drawing).save(file, "png")


def write_small(folder, pixels):
    np.savez(folder / "omniglot_small_28x28.npz", x=pixels.reshape(-1, 28, 28))


def write_silhouettes(folder):
    savemat(folder / "caltech101_silhouettes_28.mat", {"X": 1 - SILHOUETTES.swapaxes(1, 2).reshape(-1, 784)})


def write_pickle(folder):
    with (folder / "freyfaces.pkl").open("wb") as file:
        pickle.dump([FACES], file, protocol=4)


def write_mat(folder):
    savemat(folder / "frey_rawface.mat", {"ff": FACES.T})


def check_split(found, pixels):
    shuffled = torch.tensor(pixels[np.random.RandomState(0).permutation(len(pixels))])
    for part, expected in zip(found[:3], shuffled.split([len(pixels) - 5, 2, 3]), strict=True):
        assert torch.equal(part, expected.to(part))


@pytest.mark.parametrize("write", [write_packed, write_amat])
def test_static_mnist_from_either_file(tmp_path, published, write):
    published("static MNIST", *BITS.values())
    write(tmp_path)
    found = load_static_mnist(tmp_path, dtype=torch.float64)
    for part, bits in zip(found[:3], BITS.values(), strict=True):
        assert torch.equal(part, torch.tensor(bits).double())
    assert found.shape == (1, 28, 28)


def test_mnist_holds_out_the_last_training_images(tmp_path, published):
    published("MNIST", LEVELS)
    write_idx(tmp_path)
    found = load_mnist(tmp_path)
    for part, levels in zip(found[:3], (LEVELS[:4], LEVELS[4:6], LEVELS[6:]), strict=True):
        assert torch.equal(part, torch.tensor(levels).float())


def test_drawings_are_averages_of_ink_over_boxes(tmp_path, published):
    write_zips(tmp_path)
    pixels = image_files.read_drawings({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert pixels.shape == (6, 784)  # the shared one once
    # Row and column 14 are averages of three pixels from the 53rd on, whose centres lie within 14 to 15 times 3.75.
    ordered = [DRAWINGS[k] for k in (0, 2, 4, 1, 3, 5)]
    for row, drawing in zip(pixels, ordered, strict=True):
        assert abs(int(row.reshape(28, 28)[14, 14]) - 255 * drawing[53:56, 53:56].mean()) <= 1
    published("Omniglot", pixels)
    check_split(load_omniglot(tmp_path), pixels)
    (tmp_path / "small").mkdir()
    write_small(tmp_path / "small", pixels)
    check_split(load_omniglot(tmp_path / "small"), pixels)


def test_silhouettes_stand_upright_and_are_1(tmp_path, published):
    pixels = SILHOUETTES.reshape(-1, 784)
    published("Caltech silhouettes", pixels)
    write_silhouettes(tmp_path)
    check_split(load_caltech_silhouettes(tmp_path), pixels)


@pytest.mark.parametrize("write", [write_pickle, write_mat])
def test_faces_from_either_file(tmp_path, published, write):
    published("Frey faces", FACES)
    write(tmp_path)
    check_split(load_frey_faces(tmp_path), FACES)


def test_the_folder_of_the_environment_and_its_subfolder(tmp_path, published, monkeypatch):
    published("Frey faces", FACES)
    (tmp_path / "freyfaces").mkdir()
    write_mat(tmp_path / "freyfaces")
    monkeypatch.setenv("PYRO_NF_DATA", str(tmp_path))
    check_split(load_frey_faces(), FACES)
    monkeypatch.setenv("PYRO_NF_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"the environment variable PYRO_NF_DATA must name a folder .*nowhere"):
        load_frey_faces()
    with pytest.raises(ValueError, match=r"folder must name a folder of data; there is no folder 'elsewhere'"):
        load_frey_faces("elsewhere")


def test_other_pixels_than_the_published_ones_are_refused(tmp_path):
    write_mat(tmp_path)
    with pytest.raises(ValueError, match=r"the pixels of Frey faces are not those that were published .SHA-256 \w{64}"):
        load_frey_faces(tmp_path)


def test_a_pickle_other_than_the_known_one_is_not_run(tmp_path, monkeypatch):
    other = pickle.dumps([print])
    (tmp_path / "freyfaces.pkl").write_bytes(other)
    with pytest.raises(ValueError, match=r"freyfaces.pkl' is not the file that was published"):
        load_frey_faces(tmp_path)
    monkeypatch.setattr(images, "_FREY_PICKLE", hashlib.sha256(other).hexdigest())
    with pytest.raises(ValueError, match=r"the pickle must hold NumPy arrays alone; got a builtins\.print"):
        load_frey_faces(tmp_path)


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_mnist, "train-images-idx3-ubyte.gz"),
        (load_omniglot, "images_background_small1.zip"),
        (load_static_mnist, "binarized_mnist_train.amat"),
    ],
)
def test_checksums_are_compared_before_anything_is_parsed(load, name, tmp_path, monkeypatch):
    for parser in ("read_amat", "read_idx", "read_drawings"):
        monkeypatch.setattr(image_files, parser, lambda content: pytest.fail("parsed"))
    (tmp_path / name).write_bytes(gzip.compress(b"another file"))
    with pytest.raises(ValueError, match="is not the file that was published"):
        load(tmp_path)


def test_a_matrix_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    savemat(tmp_path / "frey_rawface.mat", {"ff": np.zeros((1000, 1000))}, do_compression=True)
    monkeypatch.setattr(untrusted, "MAX_BYTES", 2**20)
    assert (tmp_path / "frey_rawface.mat").stat().st_size < 2**14
    with pytest.raises(ValueError, match=r"frey_rawface.mat, unpacked, is larger than 1 MiB"):
        load_frey_faces(tmp_path)


def test_a_matrix_that_is_none_gets_a_sentence(tmp_path):
    for content in (b"", b"MATLAB 5.0", bytes(200), b"x" * 4000):
        (tmp_path / "frey_rawface.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"'frey_rawface.mat' is damaged, or of another format"):
            load_frey_faces(tmp_path)


def test_a_download_that_does_not_end_is_cut(server, monkeypatch, tmp_path):
    (server / "frey_rawface.mat").write_bytes(bytes(3000))
    monkeypatch.setattr(untrusted, "MAX_BYTES", 2000)
    with pytest.raises(ValueError, match=r"frey_rawface.mat is larger than"):
        load_frey_faces()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_what_is_in_no_folder_is_downloaded_once(server, published, tmp_path):
    published("static MNIST", *BITS.values())
    write_amat(server)
    first = load_static_mnist()
    for file in server.iterdir():
        file.unlink()
    assert torch.equal(load_static_mnist().train, first.train)
    assert len(list((tmp_path / "cache").glob("*/*"))) == 3


def test_a_download_of_another_checksum_is_refused(server, monkeypatch):
    write_idx(server)
    name = "train-images-idx3-ubyte.gz"
    monkeypatch.setitem(images._REMOTES, name, images._REMOTES[name]._replace(sha256=64 * "0"))
    with pytest.raises(ValueError, match="does not match the known hash"):
        load_mnist()


def test_a_failing_download_says_where_to_put_the_file(server):
    with pytest.raises(ConnectionError, match=r"frey_rawface.mat cannot be downloaded from http://127.* PYRO_NF_DATA"):
        load_frey_faces()


def test_without_pooch_it_says_what_to_install(monkeypatch):
    monkeypatch.delenv("PYRO_NF_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-nf\[models\]'"):
        load_mnist()
