"""Files that others may have made or planted: read within bounds, never run, and never written through.

What is read is a regular file of bounded size, unpacks to a bounded size, and has the checksum that is known of it
before anything looks into it. What is written appears whole, beside links and pipes that others put in its way.
"""

import contextlib
import hashlib
import io
import math
import os
import secrets
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

# The largest file that is read, and what may be unpacked from one: 256 MiB.
MAX_BYTES = 2**28
_MEBIBYTE = 2**20
# Neither waits at a pipe nor changes ends of lines; systems lack one or the other.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def inside(folder: Path, *parts: str) -> Path:
    """Return `folder / part / ...`, which lies in the folder after all links are followed.

    Raises:
        ValueError: If it does not.
    """
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{os.path.join(*parts)!r} leads out of the folder {str(folder)!r}, and is not read: names must stay "
            "inside, links too"
        )
    return path


def read(path: Path, sha256: str | None = None) -> bytes:
    """Return the contents of a file, decompressed where its name ends in `.gz`.

    Args:
        path: A regular file.
        sha256: Checksum of the contents, where it is known.

    Raises:
        ValueError: If it is no regular file, too large, damaged, or of another checksum.
    """
    with open_regular(path, MAX_BYTES) as file:
        content = file.read(MAX_BYTES + 1)
    _check_size(str(path), len(content), MAX_BYTES)
    if path.suffix == ".gz":
        content = _gunzip(str(path), content)
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(
            f"{str(path)!r} is not the file that was published (SHA-256 of its contents {found}, should be {sha256}): "
            "it is damaged, or another one; delete it"
        )
    return content


@contextlib.contextmanager
def open_regular(path: Path, max_bytes: int) -> Iterator[IO[bytes]]:
    """Open a file to read.

    Raises:
        ValueError: If there is none, it is a pipe, a device or a folder, or it is larger than `max_bytes`.
    """
    try:
        _check_regular(path, os.stat(path))  # to open a device may set it going
        file = os.fdopen(os.open(path, _READ), "rb")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    with file:
        status = os.fstat(file.fileno())
        _check_regular(path, status)
        _check_size(str(path), status.st_size, max_bytes)
        yield file


def check_writable(name: str, path: Path) -> None:
    """Raise a `ValueError` unless a regular file may be written at a path, or replaced.

    Args:
        name: The argument that gave the path.
        path: Where the file is to be.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{name} must name a file in a folder that exists; there is no folder {str(path.parent)!r}")
    if path.exists():
        _check_regular(path, os.stat(path))


def replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file that is whole or the old one: to a new file beside it first, which cannot be a link of another's."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with os.fdopen(os.open(partial, _CREATE, 0o666), "wb") as file:
            write(file)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def unzip(name: str, content: bytes) -> tuple[list[str], Callable[[str], bytes]]:
    """Return the names of an archive's members, and what reads one of them.

    Args:
        name: The archive's, for messages.
        content: The archive.

    Raises:
        ValueError: If it is no archive; the function, if there is no such member, or it is damaged or too large.
    """
    with damaged(name):
        archive = zipfile.ZipFile(io.BytesIO(content))

    def member(wanted: str) -> bytes:
        with damaged(name), archive.open(wanted) as file:
            unpacked = file.read(MAX_BYTES + 1)
        _check_size(f"{name}, unpacked,", len(unpacked), MAX_BYTES)
        return unpacked

    return archive.namelist(), member


def arrays(path: Path) -> Callable[[str], npt.NDArray[Any]]:
    """Return what reads an array of a `.npz` file: numbers or text, never pickled objects.

    Raises:
        ValueError: As `read` and `unzip`; the function, if there is no such array, or it holds objects.
    """
    _, member = unzip(str(path), read(path))

    def array(key: str) -> npt.NDArray[Any]:
        stream = io.BytesIO(member(f"{key}.npy"))
        with damaged(str(path)):
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = header(stream)
        values = stream.read()
        # `numpy.load` would make room for any shape that the header claims.
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(values):
            raise ValueError(f"{str(path)!r} must hold numbers or text in {key!r}, as many as their shape {shape}")
        flat = np.frombuffer(values, dtype) if values else np.empty(0, dtype)
        return flat.reshape(shape, order="F" if by_columns else "C").copy()

    return array


@contextlib.contextmanager
def damaged(name: str) -> Iterator[None]:
    """Turn what parsers raise at a file that is damaged, or of another format, into a `ValueError` that names it."""
    try:
        yield
    except Exception as error:  # parsers raise all kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name!r} is damaged, or of another format ({type(error).__name__}: {reason})") from error


def inflate(name: str, content: bytes, window: int = zlib.MAX_WBITS, used: int = 0) -> tuple[bytes, bytes]:
    """Decompress a zlib stream, and return its contents and what follows it.

    Args:
        name: The file's, for messages.
        content: The stream.
        window: zlib's `wbits`, which tells a gzip stream from a plain one.
        used: How many bytes the streams before it held.

    Raises:
        ValueError: If it is damaged or holds more.
    """
    stream = zlib.decompressobj(window)
    with damaged(name):
        unpacked = stream.decompress(content, MAX_BYTES - used + 1)
        if used + len(unpacked) <= MAX_BYTES and not stream.eof:
            raise EOFError("it ends too early")
    _check_size(f"{name}, unpacked,", used + len(unpacked), MAX_BYTES)
    return unpacked, stream.unused_data


def _gunzip(name: str, content: bytes) -> bytes:
    """Decompress a gzip file: one stream, or several one after another."""
    parts: list[bytes] = []
    while content or not parts:
        part, content = inflate(name, content, zlib.MAX_WBITS | 16, sum(map(len, parts)))
        parts.append(part)
        content = content.lstrip(b"\0")  # padding
    return b"".join(parts)


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"{name} is larger than {max_bytes / _MEBIBYTE:g} MiB, the most that is read")


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
        kind = next((kind for test, kind in kinds.items() if test(status.st_mode)), "a device")
        raise ValueError(f"{str(path)!r} must be a regular file; it is {kind}")
