"""The HDF5 files between the stages: their kinds, their shapes, and what each was made from.

Every file carries ``kind``, ``schema_version`` and the SHA-256 of the files it was made from, and is byte-stable: the
same content gives the same bytes (h5py tracks no times by default), so that a re-run changes nothing downstream. It ends
with a seal, the SHA-256 of its content, which is checked before anything is read; features alone may come from elsewhere,
without one and without the attribute ``checkpoint``.

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
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stages.lib import foreign_hdf5, sealed
from stages.lib.errors import UserError

SCHEMA_VERSIONS = {"dataset": 1, "poison_index": 2, "features": 1, "scores": 1, "kept_rows": 1}
POISON, COVER = 1, 2
RESERVE = 1 << 20  # bytes; more than HDF5 holds back of our files


def _text(value) -> bool:
    return isinstance(value, str)


def _texts(value) -> bool:
    found = json.loads(value)
    return isinstance(found, list) and all(isinstance(word, str) for word in found)


def _whole(value) -> bool:
    return isinstance(value, int | np.integer) and value >= 0


def _fraction(value) -> bool:
    return isinstance(value, float) and (np.isnan(value) or 0 < value <= 0.5)


def _vector(value) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf"


# kind -> (stage that makes it, {data set: (dtype, number of dimensions)}, {attribute: check of its value}); an attribute
# whose name ends in `?` may be missing
SCHEMAS: dict[str, tuple[str, dict[str, tuple[str, int]], dict[str, Callable[[Any], bool]]]] = {
    "dataset": (
        "prepare",
        {
            "train/images": ("uint8", 4),
            "train/labels": ("int64", 1),
            "test/images": ("uint8", 4),
            "test/labels": ("int64", 1),
        },
        {"class_names": _texts, "mean": _vector, "std": _vector, "pad_to": _whole},
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
        {"n": _whole, "attack": _text, "triggers": _text, "poison_fraction": _fraction, "data": _text},
    ),
    "features": (
        "extract",
        {"features": ("float32", 2), "logits": ("float32", 2), "labels": ("int64", 1)},
        {"poison_fraction": _fraction, "index?": _text, "checkpoint?": _text},
    ),
    "scores": (
        "score",
        {"scores": ("float64", 1)},
        {
            "defense": _text,
            "poison_fraction": _fraction,
            "index": _text,
            "relies_on?": _text,
            "n_suspected?": _whole,
            "suspected_classes?": _vector,
        },
    ),
    "kept_rows": ("filter", {"rows": ("int64", 1)}, {"n": _whole, "index": _text}),
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
    """SHA-256 of the file's content, without its seal, as hex."""
    with _readable(path):
        return sealed.check(path)[0]


def digest_array(array: np.ndarray) -> str:
    """SHA-256 of the values, as hex."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


@contextlib.contextmanager
def create(path: Path, kind: str, attributes: Mapping[str, Any]) -> Iterator[h5py.File]:
    """A new file of that kind, open for writing; the caller adds the data sets. Sealed at the end.

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
    sealed.seal(path)


def write(path: Path, kind: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    with create(path, kind, attributes) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)


def open_(path: Path, kind: str) -> h5py.File:
    """Open for reading and check seal, kind, version, data sets, types, shapes and values; the caller closes it.

    Raises `UserError` with one line that names the file and the stage that makes it.
    """
    stage, data_sets, attributes = SCHEMAS[kind]
    again = (
        f"make it again with `dvc repro {stage}`"
        if stage != "extract"
        else "make it again with `dvc repro extract`, or see the schema in stages/lib/storage.py"
    )
    with _readable(path):
        is_sealed = sealed.check(path)[1]
        if not is_sealed and kind != "features":
            raise UserError(f"{path}: not a readable HDF5 file, perhaps cut short (its seal is missing); {again}")
        if not is_sealed:
            foreign_hdf5.check(path, tuple(data_sets))
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise UserError(f"{path}: not a readable HDF5 file, perhaps cut short ({error}); {again}") from error
    try:
        found = file.attrs.get("kind", "none")
        if not isinstance(found, str) or found != kind:
            raise UserError(f"{path}: holds kind {found!r}, expected {kind!r}; give the right file, or {again}")
        version, expected = file.attrs.get("schema_version"), SCHEMA_VERSIONS[kind]
        if np.ndim(version) or version != expected:
            raise UserError(f"{path}: schema version {version}, expected {expected}; {again}")
        if not is_sealed and "checkpoint" in file.attrs:
            raise UserError(f"{path}: cut short or changed since it was written (its seal is missing); {again}")
        for name, good in attributes.items():
            value = file.attrs.get(name.removesuffix("?"))
            if value is None and not name.endswith("?"):
                raise UserError(f"{path}: attribute {name!r} is missing; {again}")
            if value is not None and not good(value):
                raise UserError(f"{path}: attribute {name.removesuffix('?')!r} is {value!r:.100}; {again}")
        for name, (dtype, ndim) in data_sets.items():
            data = foreign_hdf5.data_set(file, name)
            if data is None:
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
        if kind in CHECKS:
            CHECKS[kind](file)
    except Exception as error:
        file.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {error}; {again}") from error  # h5py's, or of CHECKS
    except BaseException:
        file.close()
        raise
    return file


def _expect(good, words: str) -> None:
    if not good:
        raise ValueError(words)


def _check_dataset(file: h5py.File) -> None:
    shape = file["train/images"].shape[1:]
    _expect(shape == file["test/images"].shape[1:], "training and test images differ in shape")
    _expect(shape[2] in (1, 3) and min(shape) > 0, f"images have shape {shape}, expected (H, W, 1 or 3)")
    _expect(file.attrs["pad_to"] >= max(shape[:2]), f"pad_to is {file.attrs['pad_to']}, less than the images' size")
    mean, std = file.attrs["mean"], file.attrs["std"]
    _expect(len(mean) == len(std) == shape[2], f"mean and std are not of {shape[2]} channels")
    _expect(np.isfinite([*mean, *std]).all() and (std > 0).all(), "mean or std is no number")
    n_classes = len(json.loads(file.attrs["class_names"]))
    for name in ("train/labels", "test/labels"):
        labels = file[name][:]
        _expect(((labels >= 0) & (labels < n_classes)).all(), f"{name} are not all 0 to {n_classes - 1}")


def _check_index(file: h5py.File) -> None:
    n, (n_triggers, n_classes) = file.attrs["n"], file["goals"].shape
    limits = {
        "rows": (0, n),
        "role": (POISON, COVER + 1),
        "target": (-1, n_classes),
        "labels_before": (0, n_classes),
        "labels_after": (0, n_classes),
        "trigger": (0, n_triggers),
        "variant": (0, np.inf),
        "goals": (-1, n_classes),
    }
    for name, (low, high) in limits.items():
        values = file[name][:]
        what = "triggers" if name == "trigger" else name
        _expect(((values >= low) & (values < high)).all(), f"{what} outside {low} to {high - 1}")
    _expect((np.diff(file["rows"][:]) > 0).all(), "rows do not rise")
    options = json.loads(file.attrs["triggers"])
    _expect(isinstance(options, list) and len(options) == n_triggers, f"not {n_triggers} triggers")
    for name, value in (item for option in options for item in option.items()):
        good = isinstance(value, str) or 0 < value < np.inf or (name == "cover_ratio" and value == 0)
        _expect(good, f"the trigger's {name} is {value!r:.100}")


def _check_scores(file: h5py.File) -> None:
    _expect(np.isfinite(file["scores"][:]).all(), "holds NaN or infinite scores")
    suspected = file.attrs.get("suspected_classes", np.zeros(0, np.int64))
    _expect(suspected.dtype.kind in "iu" and (suspected >= 0).all(), "suspected_classes are no class numbers")


def _check_rows(file: h5py.File) -> None:
    rows, n = file["rows"][:], file.attrs["n"]
    _expect(((rows >= 0) & (rows < n)).all(), f"rows outside 0 to {n - 1}")
    _expect((np.diff(rows) > 0).all(), "rows do not rise")


CHECKS = {  # of values; those of features are `defenses.score`'s
    "dataset": _check_dataset,
    "poison_index": _check_index,
    "scores": _check_scores,
    "kept_rows": _check_rows,
}


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
