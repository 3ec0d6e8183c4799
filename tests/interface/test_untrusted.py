"""Files that others made or planted: pipes, links, archives that unpack to gigabytes, arrays that claim to be large."""

import gzip
import hashlib
import json
import os
import pickle
import zipfile
import zlib

import numpy as np
import pytest

from pyro_nf.interface import untrusted
from pyro_nf.models import tables
from pyro_nf.models.benchmarks import posteriordb

NAME = "eight_schools-eight_schools_noncentered"
DATA = {"y": [1.0, 2.0], "sigma": [1.0, 1.0], "J": 2}


@pytest.fixture
def small(monkeypatch):
    """Read no more than a mebibyte."""
    monkeypatch.setattr(untrusted, "MAX_BYTES", 2**20)


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def indexed(folder, data="d", reference="r", content=None):
    for part in ("data", "reference"):
        (folder / part).mkdir(exist_ok=True)
    (folder / "index.json").write_text(json.dumps([{"name": NAME, "data": data, "reference": reference}]))
    (folder / "data" / "d.json.gz").write_bytes(
        gzip.compress(json.dumps(DATA).encode()) if content is None else content
    )
    return folder


def original(folder, data="d", reference="r"):
    base = folder / "posterior_database"
    for part in ("posteriors", "data/data", "reference_posteriors/draws/draws"):
        (base / part).mkdir(parents=True)
    entry = {"name": NAME, "data_name": data, "reference_posterior_name": reference}
    (base / "posteriors" / f"{NAME}.json").write_text(json.dumps(entry))
    with zipfile.ZipFile(base / "data" / "data" / "d.json.zip", "w") as archive:
        archive.writestr("d.json", json.dumps(DATA))
    return base


@pytest.mark.parametrize("layout", [indexed, original])
@pytest.mark.parametrize("part", ["data", "reference"])
@pytest.mark.parametrize("name", ["{outside}/secret", "../../../../../../../../../..{outside}/secret", "\0"])
def test_names_stay_inside_their_folder(layout, part, name, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir(), folder.mkdir()
    (outside / "secret.json.gz").write_bytes(gzip.compress(json.dumps(DATA).encode()))
    layout(folder, **{part: name.format(outside=outside)})
    with pytest.raises(ValueError, match=r"leads out of the folder|null"):
        posteriordb.load(NAME, folder)


def test_links_lead_nowhere_else(tmp_path):
    outside, folder = tmp_path / "secret.json.gz", tmp_path / "folder"
    folder.mkdir()
    outside.write_bytes(gzip.compress(json.dumps(DATA).encode()))
    indexed(folder)
    assert posteriordb.load(NAME, folder).args[0].tolist() == [1.0, 1.0]
    (folder / "data" / "d.json.gz").unlink()
    (folder / "data" / "d.json.gz").symlink_to(outside)
    with pytest.raises(ValueError, match=r"'data/d.json.gz' leads out of the folder"):
        posteriordb.load(NAME, folder)
    # A link to the folder itself is the user's own.
    (tmp_path / "link").symlink_to(folder)
    (folder / "data" / "d.json.gz").unlink()
    indexed(folder)
    assert posteriordb.load(NAME, tmp_path / "link").args[0].tolist() == [1.0, 1.0]


def test_what_unpacks_to_gigabytes_is_refused(small, tmp_path):
    bomb = gzip.compress(bytes(2**22))
    assert len(bomb) < 2**13
    twice = gzip.compress(bytes(2**20 - 10)) + gzip.compress(bytes(11))
    for content in (bomb, twice):
        with pytest.raises(ValueError, match="unpacked, is larger than 1 MiB, the most that is read"):
            posteriordb.load(NAME, indexed(tmp_path, content=content))
        (tmp_path / "data.csv.gz").write_bytes(content)
        with pytest.raises(ValueError, match="unpacked, is larger than 1 MiB"):
            tables.read(tmp_path / "data.csv.gz", tmp_path / "data.csv.gz")
    base = original(tmp_path)
    with zipfile.ZipFile(base / "data" / "data" / "d.json.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d.json", bytes(2**22))
    with pytest.raises(ValueError, match="unpacked, is larger than 1 MiB"):
        posteriordb.load(NAME, base)
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(2**20))
    with pytest.raises(ValueError, match="unpacked, is larger than 1 MiB"):
        untrusted.arrays(tmp_path / "a.npz")("x")
    (tmp_path / "large").write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match="large is larger than 1 MiB"):
        untrusted.read(tmp_path / "large")


BROKEN = [b"{", b"[" * 100_000, b"[]", b'{"y": [1]}', b'{"y": [[1], [1, 2]], "sigma": 1}', b"\xff"]


DAMAGED = [b"", b"no gzip", gzip.compress(b"{")[:-1], *map(gzip.compress, BROKEN)]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_get_a_sentence(content, tmp_path):
    with pytest.raises(ValueError, match="is damaged, or of another format"):
        posteriordb.load(NAME, indexed(tmp_path, content=content))


@pytest.mark.parametrize("index", ["{", "[1]", '[{"name": 1}]', "{}", f'[{{"name": "{NAME}"}}]', '"text"'])
def test_a_damaged_index_gets_a_sentence(index, tmp_path):
    indexed(tmp_path)
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"is damaged, or of another format|has no posterior"):
        posteriordb.load(NAME, tmp_path)


def test_arrays_are_read_as_they_were_written(tmp_path):
    content = {
        "numbers": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array(["a", "beta[1]"]),
        "empty": np.zeros((0, 3), np.uint8),
        "one": np.array(3),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **content)
        array = untrusted.arrays(tmp_path / "a.npz")
        for key, expected in content.items():
            found = array(key)
            assert found.dtype == expected.dtype
            assert found.flags.writeable
            np.testing.assert_array_equal(found, expected)


class Runs:
    """A pickle that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_objects_and_false_shapes_are_no_arrays(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([Runs(tmp_path / "made")], dtype=object))
    with pytest.raises(ValueError, match=r"objects.npz' must hold numbers or text in 'x'"):
        untrusted.arrays(tmp_path / "objects.npz")("x")
    assert not (tmp_path / "made").exists()
    claims = ["{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"]
    claims += ["{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n", "__import__('os').mkdir('made')\n", ""]
    for header in claims:
        with zipfile.ZipFile(tmp_path / "false.npz", "w") as archive:
            archive.writestr("x.npy", npy(header) + bytes(16))
        with pytest.raises(ValueError, match=r"must hold numbers or text|is damaged, or of another format"):
            untrusted.arrays(tmp_path / "false.npz")("x")
        with pytest.raises(ValueError, match=r"is damaged, or of another format .KeyError: .There is no item named"):
            untrusted.arrays(tmp_path / "false.npz")("y")
    (tmp_path / "no.npz").write_bytes(pickle.dumps([Runs(tmp_path / "made")]))
    with pytest.raises(ValueError, match="is damaged, or of another format"):
        untrusted.arrays(tmp_path / "no.npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_devices_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    kinds = {tmp_path / "pipe": "a pipe", tmp_path / "link": "a pipe", tmp_path: "a folder"}
    kinds[tmp_path.__class__("/dev/zero")] = "a device"
    for path, kind in kinds.items():
        with pytest.raises(ValueError, match=f"must be a regular file; it is {kind}"):
            untrusted.read(path)
        with pytest.raises(ValueError, match=f"must be a regular file; it is {kind}"):
            untrusted.check_writable("checkpoint", path)
    with pytest.raises(ValueError, match="nowhere' cannot be read: No such file"):
        untrusted.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="checkpoint must name a file in a folder that exists; there is no folder"):
        untrusted.check_writable("checkpoint", tmp_path / "nowhere" / "fit.pt")


def test_a_checksum_is_of_the_contents(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a") + gzip.compress(b"b") + bytes(3))
    assert untrusted.read(tmp_path / "a.gz", hashlib.sha256(b"ab").hexdigest()) == b"ab"
    with pytest.raises(ValueError, match="is not the file that was published"):
        untrusted.read(tmp_path / "a.gz", 64 * "0")


def test_what_is_written_follows_no_link_and_leaves_nothing_else(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "fit.pt"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    (tmp_path / "fit.pt.partial").symlink_to(victim)
    untrusted.replace(path, lambda file: file.write(b"new"))
    assert (victim.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"precious", b"new", False)

    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        untrusted.replace(path, fails)
    assert path.read_bytes() == b"new"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fit.pt", "fit.pt.partial", "victim"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_follows_a_stream_is_returned():
    assert untrusted.inflate("a", zlib.compress(b"abc") + b"rest") == (b"abc", b"rest")
    with pytest.raises(ValueError, match="'a' is damaged"):
        untrusted.inflate("a", b"x" * 9)
