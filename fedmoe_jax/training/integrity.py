"""Sizes and CRC-32 of the files of a checkpoint, by which damage is told."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

ABOUT = "checkpoint.json"
"""The file that tells what a checkpoint is."""


def write_about(folder: Path, content: dict[str, Any]) -> None:
    """checkpoint.json: the content, and a CRC-32 of it beside."""
    with open(folder / ABOUT, "w", encoding="utf-8") as file:
        json.dump({"crc32": text_crc(content), "content": content}, file)
        file.flush()
        os.fsync(file.fileno())


def read_about(folder: Path) -> dict[str, Any]:
    """The content.

    Raises:
      ValueError: if it is not what was written.
    """
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if about["crc32"] != text_crc(about["content"]):
        raise ValueError("not what was written")
    return about["content"]


def files(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of a checkpoint but checkpoint.json, which by then are on the disk."""
    return {
        path.relative_to(folder).as_posix(): _size_and_crc(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / ABOUT
    }


def changed(written: dict[str, list[int]], found: dict[str, list[int]]) -> str | None:
    """What differs between the files of a checkpoint as written and as found, or None."""
    missing = [f"{name} is missing" for name in written if name not in found]
    others = [f"{name} is not what was written" for name in found if written.get(name) != found[name]]
    return next(iter(missing + others), None)


def text_crc(content: dict[str, Any]) -> int:
    """The CRC-32 of a content."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _size_and_crc(path):
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
        os.fsync(file.fileno())
    return [size, crc]
