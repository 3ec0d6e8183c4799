"""Files of data sets: in a folder of the user's, or downloaded to pooch's cache."""

import os
from pathlib import Path
from typing import IO, Any, NamedTuple

from pyro_nf.interface import untrusted

_VARIABLE = "PYRO_NF_DATA"


class Remote(NamedTuple):
    """A file to download.

    Attributes:
        url: Where it is.
        sha256: Its SHA-256; `None` where it is not known.
        contents: That of its decompressed contents, for a `.gz`, which others may compress in another way.
    """

    url: str
    sha256: str | None = None
    contents: str | None = None


class Files:
    """Where the files of a data set are.

    Args:
        subfolder: The data set's own, in the folder and in the cache.
        folder: Where files may be, or in the subfolder there; `None` for what the environment variable `PYRO_NF_DATA`
            names, if anything.

    Raises:
        ValueError: If there is no such folder.
    """

    def __init__(self, subfolder: str, folder: str | os.PathLike[str] | None = None) -> None:
        given = os.environ.get(_VARIABLE) if folder is None else folder
        if given and not Path(given).is_dir():
            origin = f"the environment variable {_VARIABLE}" if folder is None else "folder"
            raise ValueError(f"{origin} must name a folder of data; there is no folder {str(given)!r}")
        self._subfolder = subfolder
        self._places = [Path(given) / subfolder, Path(given)] if given else []

    def local(self, name: str) -> Path | None:
        """Return the path of a file, `None` if it is not there."""
        return next((place / name for place in self._places if (place / name).is_file()), None)

    def read(self, name: str, remote: Remote) -> bytes:
        """Return the contents of a file, downloaded if it is not there, decompressed if it is a `.gz`.

        Checksums that are known are compared before anything is made of the contents.

        Raises:
            ImportError: If it has to be downloaded and pooch is not installed.
            ConnectionError: If it cannot be downloaded.
            ValueError: If it has another checksum, or is larger than 256 MiB, as it is or decompressed.
        """
        return untrusted.read(self.get(name, remote), sha256=remote.contents or remote.sha256)

    def get(self, name: str, remote: Remote) -> Path:
        """Return the path of a file, downloaded if it is not there, for `untrusted.read`.

        Raises:
            ImportError: If it has to be downloaded and pooch is not installed.
            ConnectionError: If it cannot be downloaded.
            ValueError: If what was downloaded has another checksum, or is larger than 256 MiB.
        """
        if (local := self.local(name)) is not None:
            return local
        try:
            import pooch
        except ImportError as error:
            raise ImportError(
                f"downloading {name} needs pooch: pip install 'pyro-nf[models]'; or put it into a folder that "
                f"{_VARIABLE} names"
            ) from error
        known = None if remote.sha256 is None else f"sha256:{remote.sha256}"
        cache = pooch.os_cache("pyro-nf") / self._subfolder

        def download(url: str, path: str, pup: Any) -> None:
            # Into a file that pooch has just made, of a name that nobody could foresee.
            with open(path, "wb") as file:
                pooch.core.choose_downloader(url)(url, _Limited(file, url), pup)

        try:
            return Path(pooch.retrieve(remote.url, known, fname=name, path=cache, downloader=download))
        except OSError as error:
            raise ConnectionError(
                f"{name} cannot be downloaded from {remote.url} ({type(error).__name__}); put it into a folder that "
                f"{_VARIABLE} names"
            ) from error


class _Limited:
    """A file to write to, up to the size that is read: a server may never end."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file, self._url, self._room = file, url, untrusted.MAX_BYTES

    def write(self, chunk: bytes) -> int:
        self._room -= len(chunk)
        if self._room < 0:
            raise ValueError(f"{self._url} is larger than {untrusted.MAX_BYTES // 2**20} MiB, the most that is read")
        return self._file.write(chunk)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
