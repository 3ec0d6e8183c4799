"""Files of data sets: in a folder of the user's, or downloaded to pooch's cache."""

import os
from pathlib import Path
from typing import NamedTuple

_VARIABLE = "PYRO_NF_DATA"


class Remote(NamedTuple):
    """A file to download; its SHA-256, or `None` where that of its contents has to do."""

    url: str
    sha256: str | None = None


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

    def get(self, name: str, remote: Remote) -> Path:
        """Return the path of a file, downloaded if it is not there.

        Raises:
            ImportError: If it has to be downloaded and pooch is not installed.
            ConnectionError: If it cannot be downloaded.
            ValueError: If what was downloaded has another checksum.
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
        try:
            return Path(pooch.retrieve(remote.url, known, fname=name, path=cache))
        except OSError as error:
            raise ConnectionError(
                f"{name} cannot be downloaded from {remote.url} ({type(error).__name__}); put it into a folder that "
                f"{_VARIABLE} names"
            ) from error
