"""Reads .npz files of strangers: no pickles, and no more memory than what the file really holds."""

import math
import os
import zipfile
from pathlib import Path

import numpy as np

_RATIO = 1032  # no deflated byte becomes more
_SLACK = 1 << 16
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises:
      ValueError: in one line without the path: if the file cannot be read, is damaged, holds objects, or says that an array is larger than
        what follows.
    """
    try:
        with open(path, "rb") as stream:
            _check(stream)
            with np.load(stream, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
    except Exception as error:  # a damaged archive can raise almost anything
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(text.split()).split("This file contains")[0] or type(error).__name__
        raise ValueError(reason[:200]) from None


def _check(stream):
    """Compares what each array says of its size with what the archive has, before anything of that size is made."""
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        most = _RATIO * os.fstat(stream.fileno()).st_size + _SLACK
        if sum(entry.file_size for entry in entries) > most:
            raise ValueError("it says to hold more than a file of its size can")
        for entry in entries:
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                if version not in _HEADERS:
                    raise ValueError(f"{entry.filename} has the unknown version {version}")
                shape, _, dtype = _HEADERS[version](member)
                if dtype.hasobject:
                    raise ValueError(f"{entry.filename} holds objects, which are refused")
                size = math.prod(shape) * dtype.itemsize
                if min(shape, default=0) < 0 or size != entry.file_size - member.tell():
                    raise ValueError(f"{entry.filename} says {dtype}{list(shape)}, and {entry.file_size - member.tell()} bytes follow")
    stream.seek(0)
