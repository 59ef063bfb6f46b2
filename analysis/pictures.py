"""Pictures of single rows for the page of an audit: from a data set of `prepare`, or from the user's own files."""

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from stages.lib import image_folder, storage
from stages.lib.errors import UserError

MAX_SIDE = 96  # pixels of a thumbnail: the page stays small
BLOCK = 8192  # rows of features in memory at a time


class Pictures(Protocol):
    def get(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """(H, W, C) uint8 of each of the rows that can be shown, all of one size, C = 1 or 3."""


class FromDataset:
    """The training images of a data set; `names` are None in one that was not made from a user's files."""

    def __init__(self, path: Path):
        self.path = path
        with storage.open_(path, "dataset") as file:
            self.labels = file["train/labels"][:]
            self.class_names = [str(name) for name in json.loads(file.attrs["class_names"])]
            self.names = _texts(file["train/files"]) if "train/files" in file else None
            self.skipped = _texts(file["skipped"]) if "skipped" in file else []
            others = _texts(file["test/files"]) if "test/files" in file else []
        # Held out of the training images, or from a split of their own: the names tell, train/… and train_images[…].
        from_training = bool({_split(name) for name in others} & {_split(name) for name in self.names or []})
        self.n_held_out = len(others) if from_training else 0

    def get(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        with storage.open_(self.path, "dataset") as file:
            return {int(row): file["train/images"][row] for row in np.sort(rows)}


class FromFolder:
    """The user's files below `root`; one that leads out of it or cannot be read has no picture. `UserError` if none is there."""

    def __init__(self, root: Path, names: list[str]):
        self.root, self.names = root.resolve(), names
        if not any((self.root / name).is_file() for name in names):
            raise UserError(
                f"none of the {len(names):,} files, such as {names[0]}, is in {root}; give the folder that the names are "
                "relative to"
            )

    def get(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        found = {}
        for row in rows.tolist():
            path = self.root / self.names[row]
            try:
                if Path(os.path.realpath(path)).is_relative_to(self.root) and path.is_file():
                    found[row] = image_folder.read_resized(path, MAX_SIDE)[0]
            except (image_folder.Unreadable, OSError):
                continue
        return found


def _split(name: str) -> str:
    return re.split(r"[/\[]", name, maxsplit=1)[0]


def _texts(values) -> list[str]:
    return [value.decode("utf-8") for value in values[:]]


def typical_rows(features, rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the (n,) `rows`: of the half that lies nearest to their mean, evenly spread, nearest first.

    features: (N, D) array or h5py data set, read in slices.
    """
    if not len(rows):
        return rows
    rows = np.sort(rows)
    total = np.zeros(features.shape[1])
    for _, block in _blocks(features, rows):
        total += block.sum(axis=0)
    mean, distances = total / len(rows), []
    for _, block in _blocks(features, rows):
        distances.append(((block - mean) ** 2).sum(axis=1))
    nearest = rows[np.argsort(np.concatenate(distances), kind="stable")][: max(count, len(rows) // 2)]
    return nearest[np.unique(np.linspace(0, len(nearest) - 1, min(count, len(nearest))).round().astype(int))]


def _blocks(features, rows: np.ndarray):
    """(row numbers, features as float64) of the rising `rows`, by slices of the file: picking rows from one is slow."""
    for start in range(0, features.shape[0], BLOCK):
        inside = rows[(rows >= start) & (rows < start + BLOCK)]
        if len(inside):
            yield inside, np.asarray(features[start : start + BLOCK])[inside - start].astype(np.float64)


def averages(suspects: list[np.ndarray], others: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Mean picture of the suspects, of the others, and their absolute difference stretched to 0..255, each uint8.

    Also the largest difference before stretching, in units of full scale: a trigger that all suspects share stands out
    in the difference where it lies.
    """
    first, second = (np.mean([image.astype(np.float64) for image in images], axis=0) for images in (suspects, others))
    difference = np.abs(first - second).mean(axis=2, keepdims=True)
    largest = difference.max()
    stretched = difference * (255 / largest if largest else 0)
    return *(np.round(image).astype(np.uint8) for image in (first, second, stretched)), float(largest / 255)


def data_uri(image: np.ndarray) -> str:
    """(H, W, C) uint8 as the address of an embedded PNG, at most `MAX_SIDE` pixels a side."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if max(picture.size) > MAX_SIDE:
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
