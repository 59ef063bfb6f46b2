"""The HDF5 files between the stages: their kinds, their shapes, and what each was made from.

Every file carries ``kind``, ``schema_version`` and the SHA-256 of the files it was made from, and is byte-stable: the
same content gives the same bytes (h5py tracks no times by default), so that a re-run changes nothing downstream.

dataset        train/images (N, H, W, C) uint8, train/labels (N,) int64, test/images, test/labels; attributes
               class_names, mean and std (per channel, of the training images, in units of [0, 1]), pad_to
poison_index   rows (K,) int64 rising, role (K,) uint8 (1 poison, 2 cover), target (K,) int64, labels_before and
               labels_after (K,) int64, trigger (K,) int64 (which of the T triggers), variant (K,) int64 (0: the trigger
               in full, else the seed of what is random in it), goals (T, C) int64 (what a test image of class c with
               trigger t should be taken for; -1: does not count), pictures (T, H, W, C) uint8; attributes n (rows in
               all), attack, triggers (JSON, the options of each), poison_fraction (NaN: not known), data (digest);
               target is -1 in cover rows
features       features (N, D) float32, logits (N, C) float32, labels (N,) int64 after poisoning; attributes
               poison_fraction, index and checkpoint (digests)
scores         scores (N,) float64, higher = more suspicious; attributes defense, relies_on, poison_fraction, index and
               features (digests); n_suspected and suspected_classes where the defense decides for itself
kept_rows      rows (K,) int64 rising; attributes n, index (digest)
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stages.lib.errors import UserError

SCHEMA_VERSIONS = {"dataset": 1, "poison_index": 2, "features": 1, "scores": 1, "kept_rows": 1}
POISON, COVER = 1, 2
RESERVE = 1 << 20  # bytes; more than HDF5 holds back of our files

# kind -> (stage that makes it, {data set: (dtype, number of dimensions)}, attributes)
SCHEMAS: dict[str, tuple[str, dict[str, tuple[str, int]], tuple[str, ...]]] = {
    "dataset": (
        "prepare",
        {
            "train/images": ("uint8", 4),
            "train/labels": ("int64", 1),
            "test/images": ("uint8", 4),
            "test/labels": ("int64", 1),
        },
        ("class_names", "mean", "std", "pad_to"),
    ),
    "poison_index": (
        "poison",
        {
            "rows": ("int64", 1),
            "role": ("uint8", 1),
            "target": ("int64", 1),
            "labels_before": ("int64", 1),
            "labels_after": ("int64", 1),
            "trigger": ("int64", 1),
            "variant": ("int64", 1),
            "goals": ("int64", 2),
            "pictures": ("uint8", 4),
        },
        ("n", "attack", "triggers", "poison_fraction", "data"),
    ),
    "features": (
        "extract",
        {"features": ("float32", 2), "logits": ("float32", 2), "labels": ("int64", 1)},
        ("poison_fraction",),
    ),
    "scores": ("score", {"scores": ("float64", 1)}, ("defense", "poison_fraction", "index")),
    "kept_rows": ("filter", {"rows": ("int64", 1)}, ("n", "index")),
}
ONE_LENGTH = {  # data sets that hold one value or row per sample
    "dataset": (("train/images", "train/labels"), ("test/images", "test/labels")),
    "poison_index": (
        ("rows", "role", "target", "labels_before", "labels_after", "trigger", "variant"),
        ("goals", "pictures"),
    ),
    "features": (("features", "logits", "labels"),),
    "scores": (),
    "kept_rows": (),
}


def digest(path: Path) -> str:
    """SHA-256 of the file, as hex."""
    with _readable(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_array(array: np.ndarray) -> str:
    """SHA-256 of the values, as hex."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


@contextlib.contextmanager
def create(path: Path, kind: str, attributes: Mapping[str, Any]) -> Iterator[h5py.File]:
    """A new file of that kind, open for writing; the caller adds the data sets.

    Where HDF5 cannot write what it has held back, it ends the process with a segmentation fault (h5py 3.16, HDF5 2.0). So
    nothing of the data is held back (no sieve buffer), and space is held for the rest, given free for closing the file.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_EARLIEST, h5py.h5f.LIBVER_LATEST)  # h5py's default
    access.set_sieve_buf_size(1)
    opened = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, fapl=access)
    with h5py.File(opened) as file, tempfile.TemporaryFile(dir=Path(path).parent) as reserve:
        reserve.write(bytes(RESERVE))
        reserve.flush()
        file.attrs["kind"] = kind
        file.attrs["schema_version"] = SCHEMA_VERSIONS[kind]
        for name, value in attributes.items():
            file.attrs[name] = value
        yield file


def write(path: Path, kind: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    with create(path, kind, attributes) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)


def open_(path: Path, kind: str) -> h5py.File:
    """Open for reading and check kind, version, data sets, types and shapes; the caller closes it.

    Raises `UserError` with one line that names the file and the stage that makes it.
    """
    stage, data_sets, attributes = SCHEMAS[kind]
    again = (
        f"make it again with `dvc repro {stage}`"
        if stage != "extract"
        else "make it again with `dvc repro extract`, or see the schema in stages/lib/storage.py"
    )
    with _readable(path):
        try:
            file = h5py.File(path, "r")
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise
        except OSError as error:
            raise UserError(f"{path}: not a readable HDF5 file, perhaps cut short ({error}); {again}") from error
    try:
        found = file.attrs.get("kind", "none")
        if not isinstance(found, str) or found != kind:
            raise UserError(f"{path}: holds kind {found!r}, expected {kind!r}; give the right file, or {again}")
        version, expected = file.attrs.get("schema_version"), SCHEMA_VERSIONS[kind]
        if np.ndim(version) or version != expected:
            raise UserError(f"{path}: schema version {version}, expected {expected}; {again}")
        for name in attributes:
            if name not in file.attrs:
                raise UserError(f"{path}: attribute {name!r} is missing; {again}")
        for name, (dtype, ndim) in data_sets.items():
            data = file.get(name)
            if not isinstance(data, h5py.Dataset):
                raise UserError(f"{path}: data set {name!r} is missing; {again}")
            if data.ndim != ndim or not _is(data.dtype, dtype):
                raise UserError(
                    f"{path}: {name} is {data.dtype} with {data.ndim} dimensions, expected {dtype} with {ndim}; {again}"
                )
        for group in ONE_LENGTH[kind]:
            lengths = {name: file[name].shape[0] for name in group}
            if len(set(lengths.values())) > 1:
                raise UserError(
                    f"{path}: {', '.join(f'{n} has {k}' for n, k in lengths.items())} rows, expected one number; {again}"
                )
    except BaseException:
        file.close()
        raise
    return file


def must_match(what: str, path: Path, recorded: str, other: Path) -> None:
    """Refuse two files that do not belong together: `recorded` is the digest of `other` that `path` carries."""
    if recorded != digest(other):
        raise UserError(
            f"{path} was made from another {what} than {other}; make it again (`dvc repro`), or give the file it came from"
        )


def optional_fraction(value: float) -> float | None:
    """A stored poison fraction: NaN stands for not known."""
    return None if np.isnan(value) else float(value)


def _is(dtype: np.dtype, expected: str) -> bool:
    if expected == "float32":  # features from elsewhere may be half as wide
        return dtype in (np.float32, np.float16)
    return dtype == np.dtype(expected)


class _readable:
    """Turns a missing or forbidden file into one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        if Path(self.path).is_dir():
            raise UserError(f"{self.path} is a folder; expected a file")

    def __exit__(self, kind, error, traceback):
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(f"{self.path} is not there; make it with `dvc repro`, or give its path") from error
        if isinstance(error, PermissionError):
            raise UserError(f"{self.path} cannot be read: permission denied") from error
