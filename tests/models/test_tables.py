import gzip
import hashlib
import math
import os
import sys
import types

import pytest
import torch

from pyro_nf.models import tables
from pyro_nf.models.tables import Column

NAN = math.nan
TYPES = "type,dim,nclass\nreal,1,\npos,1,\ncount,1,\ncat,3,3\nordinal,4,4\n"
DATA = "-1.5,0,3,2,1\n2.5,10.25,0,1,4\n0.5,1e2,7,3,NaN\n,3,2,1,2\n"


@pytest.fixture
def files(tmp_path):
    """Write a table's files and return their paths; keyword arguments replace their text."""

    def write(data=DATA, types=TYPES, missing="1,2\n4,5\n"):
        paths = []
        for name, text in {"data.csv": data, "types.csv": types, "missing.csv": missing}.items():
            (tmp_path / name).write_bytes(text.encode())
            paths.append(tmp_path / name)
        return paths

    return write


def test_a_table_is_read_with_its_classes_counted_from_zero(files):
    table = tables.read(*files())
    assert [column.kind for column in table.columns] == ["real", "pos", "count", "cat", "ordinal"]
    assert [column.num_classes for column in table.columns] == [0, 0, 0, 3, 4]
    expected = torch.tensor(
        [[-1.5, 0, 3, 1, 0], [2.5, 10.25, 0, 0, 3], [0.5, 100, 7, 2, NAN], [NAN, 3, 2, 0, 1]],
    )
    assert torch.equal(table.values.nan_to_num(-9.0), expected.nan_to_num(-9.0))


def test_positions_of_missing_entries_count_from_one(files):
    table = tables.read(*files())
    assert table.held_out.nonzero().tolist() == [[0, 1], [3, 4]]
    # What is not known is neither observed nor held out.
    assert not table.observed[2, 4]
    assert not table.held_out[2, 4]
    assert tables.read(*files()[:2]).observed.sum() == 18


@pytest.mark.parametrize("end", ["\r\n", "\r"], ids=["dos", "old mac"])
def test_line_ends_of_other_systems_and_compressed_files_are_read(files, tmp_path, end):
    plain = tables.read(*files())
    data, types, missing = files(*(text.replace("\n", end) for text in (DATA, TYPES, "1,2\n4,5\n")))
    packed = tmp_path / "data.csv.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    table = tables.read(packed, types, missing)
    assert table.columns == plain.columns
    assert torch.equal(table.observed, plain.observed)
    assert torch.equal(table.values.nan_to_num(), plain.values.nan_to_num())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DATA.replace("10.25", "ten")}, r"column '2' \(pos\) must hold numbers, or NaN; got 'ten' in row 2"),
        (
            {"data": DATA.replace("10.25", "-1")},
            r"column '2' \(pos\) must hold finite numbers that are not negative; got -1 in row 2",
        ),
        (
            {"data": DATA.replace("7,3", "7.5,3")},
            r"column '3' \(count\) must hold whole numbers that are not negative; got 7.5 in row 3",
        ),
        (
            {"data": DATA.replace("7,3", "7,4")},
            r"column '4' \(cat\) must hold classes, whole numbers in a range of 3; got 3, counted from its lowest, in",
        ),
        ({"data": DATA.replace("-1.5", "inf")}, r"column '1' \(real\) must hold finite numbers; got inf in row 1"),
        ({"data": DATA.replace(",NaN", "")}, r"data.csv: row 3 has 4 entries; the types are of 5"),
        ({"types": TYPES.replace("pos", "positive")}, r"column '2' must be one of real, pos, .*; got 'positive'"),
        ({"types": TYPES.replace("cat,3,3", "cat,3,")}, r"types.csv: column 4 \(cat\) must have its number of classes"),
        ({"types": TYPES.replace("cat,3,3", "cat,1,1")}, r"column '4' \(cat\) must have at least two classes; got 1"),
        ({"types": TYPES[16:]}, r"types.csv must begin with the line type,dim,nclass; got 'real,1,'"),
        ({"missing": "0,1\n"}, r"missing.csv must hold rows of 1 .. 4 and columns of 1 .. 5; got row 0, column 1"),
        ({"missing": "1,6\n"}, r"got row 1, column 6"),
        ({"missing": "1,2,3\n"}, r"missing.csv must hold lines row,column; got '1,2,3'"),
        ({"missing": "1,2\n2,2\n3,2\n4,2\n"}, r"column '2' \(pos\) has no observed entry"),
    ],
)
def test_a_damaged_or_mistyped_table_gets_a_sentence_that_names_the_column(files, change, message):
    with pytest.raises(ValueError, match=message):
        tables.read(*files(**change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tables.load("Vine", 10),
            r"name must be one of Adult, .*; got 'Vine'; did you mean 'Wine'\?",
        ),
        (lambda: tables.load("Wine", 15), r"percent_missing must be one of 10, 20, 30, 40, 50; got 15"),
        (lambda: tables.read("nowhere.csv", "nowhere_types.csv"), r"'nowhere.csv' cannot be read: No such file"),
        (
            lambda: tables.make([Column("a", "real")], torch.zeros(3, 2)),
            r"values must be floating-point numbers of shape \(rows, 1\), .* got torch.float32 of shape \(3, 2\)",
        ),
        (
            lambda: tables.make([Column("a", "real")], torch.zeros(3, 1), torch.ones(3, 1)),
            r"observed must be True or False for each entry of values, of shape \(3, 1\); got torch.float32",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_file_is_downloaded_with_its_checksum(files, monkeypatch, tmp_path):
    data, columns, missing = files()
    found = {"data": data, "data_types": columns, "Missing20_1": missing}
    asked = []

    def retrieve(url, known_hash, fname, path, downloader):
        asked.append((url, known_hash, fname))
        return str(found[url.split("/")[-1].removesuffix(".csv")])

    fake = types.SimpleNamespace(retrieve=retrieve, os_cache=lambda name: tmp_path / name)
    monkeypatch.setitem(sys.modules, "pooch", fake)
    monkeypatch.setenv("PYRO_NF_DATA", str(tmp_path))
    (tmp_path / "hivae").mkdir()
    (tmp_path / "hivae" / "Wine_Missing20_1.csv.gz").write_bytes(gzip.compress(b"2,3\n"))
    with pytest.raises(ValueError, match="is not the file that was published"):
        tables.load("Wine", 20)
    contents = {"data": data.read_bytes(), "data_types": columns.read_bytes(), "Missing20_1": b"2,3\n"}
    checksums = {part: hashlib.sha256(content).hexdigest() for part, content in contents.items()}
    monkeypatch.setattr(tables, "_FILES", {"Wine": checksums})
    asked.clear()
    table = tables.load("Wine", 20)
    # The folder comes first: its mask was taken, and the other two files were fetched.
    assert table.held_out.nonzero().tolist() == [[1, 2]]
    assert [name for _, _, name in asked] == ["Wine_data.csv", "Wine_data_types.csv"]
    assert all(url.endswith(f"HI-VAE/master/Wine/{part}.csv") for (url, _, _), part in zip(asked, found, strict=False))
    assert all(len(known) == len("sha256:") + 64 for _, known, _ in asked)


def test_without_pooch_it_says_what_to_install(monkeypatch):
    monkeypatch.delenv("PYRO_NF_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-nf\[models\]'"):
        tables.load("Wine", 20)


@pytest.mark.skipif("PYRO_NF_DATA" not in os.environ, reason="needs HI-VAE's tables: PYRO_NF_DATA=FOLDER")
@pytest.mark.parametrize(
    ("name", "shape", "unknown"), [("Wine", (6497, 13), 0), ("Breast", (699, 10), 16), ("Adult", (32561, 12), 3686)]
)
def test_the_tables_of_the_paper(name, shape, unknown):
    for percent in (10, 50):
        table = tables.load(name, percent)
        assert table.values.shape == shape
        assert int(table.values.isnan().sum()) == unknown
        hidden = 1 - float(table.observed[~table.values.isnan()].float().mean())
        assert abs(hidden - percent / 100) < 0.01
    # The folder's files are those whose checksums a download is held to.
    folder = os.path.join(os.environ["PYRO_NF_DATA"], "hivae")
    for part, known in tables._FILES[name].items():
        with gzip.open(os.path.join(folder, f"{name}_{part}.csv.gz")) as file:
            assert hashlib.sha256(file.read()).hexdigest() == known
