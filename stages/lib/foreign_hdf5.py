"""HDF5 data sets that this project did not write: what is refused, and a first reading in a process of its own.

Of 10,240 changes of one byte to a file of 10 kB, 40 made libhdf5 loop for ever and one made it crash. Neither can be
caught from within, so a file from elsewhere is read once by a child that may hang or die.
"""

import math
import subprocess
import sys
from pathlib import Path

import h5py

from stages.lib.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ATTRIBUTES = ("kind", "schema_version", "poison_fraction", "index", "checkpoint")
LEAST_SECONDS, BYTES_PER_SECOND = 60.0, 20e6  # what a slow, busy machine with a slow disk still does
BLOCK = 1 << 24  # bytes
BOMB = 1 << 30  # bytes that a data set may unpack to, whatever it is stored in; beyond, BOMB_RATIO times its own
BOMB_RATIO = 100


def check(path: Path, names: tuple[str, ...]) -> None:
    """Read those of the data sets `names` that the file has, all of them, in a child; UserError if that fails.

    0.4 s, and as long as the file takes to read."""
    limit = LEAST_SECONDS + path.stat().st_size / BYTES_PER_SECOND
    command = [sys.executable, "-m", "stages.lib.foreign_hdf5", str(path.absolute()), *names]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=limit)
        said, status = done.stderr.strip().splitlines(), done.returncode
    except subprocess.TimeoutExpired:
        said, status = [f"still not read after {limit:.0f} s"], 1
    if status:
        reason = said[-1] if said and status > 0 else "libhdf5 crashes"
        raise UserError(
            f"{path}: not a readable HDF5 file, perhaps cut short or damaged ({reason}); make it again (if this project made "
            "it: `dvc repro extract`)"
        )


def data_set(file: h5py.File, name: str) -> h5py.Dataset | None:
    """A data set that lies in this file and is stored in full; None if there is none of that name.

    Raises ValueError for a link or a virtual data set, which can lead to any other file that the user may read, for a
    declared shape that nothing or less was stored for (it would read as zeros), and for an absurd compression.
    """
    parent, _, last = name.rpartition("/")
    if parent:
        if not isinstance(file.get(parent, getlink=True), h5py.HardLink | None):
            raise ValueError(f"{parent} is a link; store it in this file")
        file = file.get(parent)
    if not isinstance(file, h5py.Group):
        return None
    link = file.get(last, getlink=True)
    if link is None:
        return None
    found = file[last] if isinstance(link, h5py.HardLink) else None
    if found is None or (isinstance(found, h5py.Dataset) and (found.external or found.is_virtual)):
        raise ValueError(f"{name} is a link or lies in another file; store it in this one")
    if not isinstance(found, h5py.Dataset):
        return None
    _must_be_stored(name, found)
    return found


def _must_be_stored(name: str, data: h5py.Dataset) -> None:
    if data.shape is None:
        raise ValueError(f"{name} has no shape")
    size, stored = math.prod(data.shape) * data.dtype.itemsize, data.id.get_storage_size()
    if data.chunks is None:
        whole = stored >= size
    else:
        wanted = math.prod(-(-length // chunk) for length, chunk in zip(data.shape, data.chunks, strict=True))
        whole = not size or data.id.get_num_chunks() >= wanted
    if not whole:
        raise ValueError(f"{name} has shape {data.shape}, but not all of it was stored")
    if size > max(BOMB, BOMB_RATIO * stored):
        raise ValueError(f"{name} unpacks from {stored:,} to {size:,} bytes; store it uncompressed")


def read_all(path: Path, names: tuple[str, ...]) -> None:
    """Read the data sets and the attributes, block by block."""
    with h5py.File(path, "r") as file:
        for name in ATTRIBUTES:
            file.attrs.get(name)
        for data in filter(None, (data_set(file, name) for name in names)):
            if not data.ndim:
                data[()]
                continue
            row = max(1, math.prod(data.shape[1:]) * data.dtype.itemsize)
            rows = max(1, BLOCK // row)
            for start in range(0, data.shape[0], rows):
                data[start : start + rows]


if __name__ == "__main__":
    try:
        read_all(Path(sys.argv[1]), tuple(sys.argv[2:]))
    except Exception as error:  # whatever h5py raises for a damaged file: OSError, KeyError, RuntimeError, …
        sys.exit(" ".join(str(error).split()) or type(error).__name__)
