"""Features, logits and labels from anywhere: this project's `features.h5`, or an HDF5 or .npz file made elsewhere.

features   (N, D) float16 or float32, finite: the penultimate activations, without augmentation
logits     (N, C) float16 or float32, finite
labels     (N,) integers in [0, C): what the model was trained on
files      optional, (N,) text: the name of each row's file
classes    optional, (C,) text: the name of each class

HDF5 data sets are read in slices; an .npz file is read whole. Nothing is ever unpickled.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

from stages.lib import foreign_hdf5, sealed
from stages.lib.errors import UserError
from stages.lib.npz_images import Archive

REQUIRED, OPTIONAL = ("features", "logits", "labels"), ("files", "classes")
SCHEMA = "expected features (N, D), logits (N, C), whole-numbered labels (N,), and if known files (N,) and classes (C,)"
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


@dataclass
class Dump:
    """An open dump; use as a context manager. features, logits: arrays or h5py data sets. labels: (N,) int64.

    `poison_fraction`, None where it is not known, and `index`, a digest or "", are stored by `extract` alone.
    """

    path: Path
    features: np.ndarray | h5py.Dataset
    logits: np.ndarray | h5py.Dataset
    labels: np.ndarray
    files: list[str] | None
    classes: list[str] | None
    poison_fraction: float | None = None
    index: str = ""
    handle: h5py.File | None = None

    def __enter__(self) -> "Dump":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.handle is not None:
            self.handle.close()


def open_dump(path: Path) -> Dump:
    """Open and check; raises UserError with one line that names the file."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; {SCHEMA}, as HDF5 or .npz") from error
    except IsADirectoryError as error:
        raise UserError(
            f"{path} is a folder; expected an HDF5 or .npz file with features, logits and labels"
        ) from error
    if start == HDF5_MAGIC:
        return _from_hdf5(path)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _from_npz(path)
    raise UserError(f"{path} is neither HDF5 nor .npz; {SCHEMA}")


def _from_hdf5(path: Path) -> Dump:
    if not sealed.check(path)[1]:
        foreign_hdf5.check(path, (*REQUIRED, *OPTIONAL))
    file = None
    try:
        file = h5py.File(path, "r")
        found = {name: foreign_hdf5.data_set(file, name) for name in (*REQUIRED, *OPTIONAL)}
        fraction = float(file.attrs.get("poison_fraction", np.nan))
        index = file.attrs.get("index", "")
        if "checkpoint" in file.attrs and not sealed.check(path)[1]:
            raise ValueError("cut short or changed since `extract` wrote it: its seal is missing")
        dump = _checked(path, {name: data for name, data in found.items() if data is not None})
        dump.handle, dump.index = file, index if isinstance(index, str) else ""
        dump.poison_fraction = None if np.isnan(fraction) else fraction
        return dump
    except Exception as error:
        if file is not None:
            file.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {error}; {SCHEMA}") from error  # h5py raises all sorts


def _from_npz(path: Path) -> Dump:
    with Archive(path, SCHEMA) as archive:
        return _checked(path, {name: archive.array(name) for name in (*REQUIRED, *OPTIONAL) if name in archive.names})


def _checked(path: Path, found: dict) -> Dump:
    for name in REQUIRED:
        if name not in found:
            raise UserError(f"{path} holds no {name}; {SCHEMA}")
    features, logits = found["features"], found["logits"]
    for name, ndim, kinds in (("features", 2, "f"), ("logits", 2, "f"), ("labels", 1, "iu")):
        shape, dtype = found[name].shape, found[name].dtype
        if len(shape) != ndim or 0 in shape or dtype.kind not in kinds:
            raise UserError(f"{path}: {name} has shape {shape} and dtype {dtype}; {SCHEMA}")
    rows = {name: found[name].shape[0] for name in (*REQUIRED, "files") if name in found}
    if len(set(rows.values())) > 1:
        text = ", ".join(f"{name} has {count:,}" for name, count in rows.items())
        raise UserError(f"{path}: {text} rows; expected one number")
    labels = np.asarray(found["labels"][:]).astype(np.int64)
    n_classes = logits.shape[1]
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(outside):
        raise UserError(
            f"{path}: labels[{outside[0]}] is {labels[outside[0]]}, but the logits have {n_classes:,} columns; expected 0 "
            f"to {n_classes - 1:,}"
        )
    files = _texts(path, "files", found.get("files"), len(labels))
    name, times = Counter(files).most_common(1)[0] if files else ("", 0)
    if times > 1:
        raise UserError(f"{path}: files names {name!r} {times} times; expected a name of its own for each row")
    return Dump(path, features, logits, labels, files, _texts(path, "classes", found.get("classes"), n_classes))


def _texts(path: Path, name: str, values, length: int) -> list[str] | None:
    if values is None:
        return None
    values = values[:]
    if values.shape != (length,):
        raise UserError(f"{path}: {name} has shape {values.shape}; expected ({length},)")
    try:
        texts = [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values.tolist()]
    except UnicodeDecodeError as error:  # a name that is changed would match no file
        raise UserError(f"{path}: {name} holds {error.object!r}, which is not UTF-8; store texts") from error
    except ValueError as error:  # of numbers that are no letters
        raise UserError(f"{path}: {name} is no text ({error})") from error
    for row, text in enumerate(texts):
        if any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in text):
            raise UserError(f"{path}: {name}[{row}], {text!r}, holds control characters; it cannot stand in a list")
    return texts
