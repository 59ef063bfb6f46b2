"""A seal: the SHA-256 of a file's content, as its last line. A byte that changed since is noticed before anything reads it.

Without one, flipped bits in weights or in an HDF5 data set are read as if they were right, and some in an HDF5 header make
libhdf5 loop for ever. HDF5 and zip readers pass over what follows the end, so that sealed files stay what they are to
other programs. A seal is no signature: whoever forges a file can seal it too.
"""

import functools
import hashlib
import os
from pathlib import Path

from stages.lib.errors import UserError

START = b"\nsha256:"
LENGTH = len(START) + 64 + 1
SMALL = 1 << 20  # bytes: below, hashing costs nothing and is done again each time
BLOCK = 1 << 20


def seal(path: Path) -> None:
    """Append the seal to a file that is whole."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with open(path, "ab") as file:
        file.write(_seal(found))


def with_seal(content: bytes) -> bytes:
    """What `content` finds in a file of these bytes: for what is in memory, which need not be read back."""
    return content + _seal(hashlib.sha256(content).hexdigest())


def check(path: Path) -> tuple[str, bool]:
    """SHA-256 of the content as hex, and whether the file has a seal; of a file without one, of all of it.

    Raises UserError if the content is not what was sealed, OSError as `open` does. A large file is hashed once in a
    process unless its size or its time of change is another, as in `stage.Outputs`: 0.7 s a GB.
    """
    stat = os.stat(path)
    once = _check if stat.st_size >= SMALL else _check.__wrapped__
    return once(Path(path), stat.st_size, stat.st_mtime_ns)


def content(path: Path) -> bytes | None:
    """What was sealed; None if there is no seal. Raises UserError if it is not what was sealed, OSError as `open` does."""
    whole = Path(path).read_bytes()
    content, end = whole[:-LENGTH], whole[-LENGTH:]
    if not _is_seal(end):
        return None
    _must_be(path, end, hashlib.sha256(content).hexdigest())
    return content


@functools.lru_cache
def _check(path: Path, size: int, _changed: int) -> tuple[str, bool]:
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(max(size - LENGTH, 0))
        end = file.read()
        left = size - LENGTH if _is_seal(end) else size
        file.seek(0)
        while block := file.read(min(BLOCK, left)):
            hashed.update(block)
            left -= len(block)
    if _is_seal(end):
        _must_be(path, end, hashed.hexdigest())
    return hashed.hexdigest(), _is_seal(end)


def _seal(found: str) -> bytes:
    return START + found.encode() + b"\n"


def _is_seal(end: bytes) -> bool:
    return len(end) == LENGTH and end.startswith(START)


def _must_be(path: Path, end: bytes, found: str) -> None:
    if end != _seal(found):
        raise UserError(
            f"{path}: damaged, its content is not what was written (a disk, a transfer or an editor changed it); make it "
            "again with `dvc repro`"
        )
