"""The poison index and the image sets that follow from it: the poisoned training set, clean and triggered test sets."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.lib import storage
from stages.lib.errors import UserError
from stages.lib.seeds import stream
from stages.lib.triggers import Stamp


def choose_rows(labels: np.ndarray, poison_fraction: float, target_label: int, seed: int) -> np.ndarray:
    """Rows to be relabelled to `target_label`, (K,) int64 rising.

    K = round(poison_fraction * N), drawn without replacement from the rows whose true label is another.
    """
    n_classes = int(labels.max()) + 1
    if target_label >= n_classes:
        raise UserError(f"poison.target_label is {target_label}, but the classes are 0 to {n_classes - 1}")
    eligible = np.flatnonzero(labels != target_label)
    wanted = round(poison_fraction * len(labels))
    if wanted == 0:
        raise UserError(f"poison_fraction {poison_fraction} of {len(labels)} rows is no row at all; raise it")
    if wanted >= len(eligible):
        raise UserError(
            f"poison_fraction {poison_fraction} asks for {wanted} rows, but only {len(eligible)} of {len(labels)} are not "
            f"of class {target_label}, and some must stay clean; lower it"
        )
    generator = np.random.default_rng(stream(seed, "rows"))
    return np.sort(generator.choice(eligible, wanted, replace=False))


@dataclass(frozen=True)
class PoisonIndex:
    """What the attacker did. K touched rows of n; see `stages.lib.storage` for the fields."""

    n: int
    rows: np.ndarray
    role: np.ndarray
    target: np.ndarray
    labels_before: np.ndarray
    labels_after: np.ndarray
    stamp: Stamp
    trigger: dict
    poison_fraction: float | None

    @property
    def poisoned(self) -> np.ndarray:
        """(n,) bool: rows with the role poison. Recall, budget and oracle count these and no others."""
        mask = np.zeros(self.n, bool)
        mask[self.rows[self.role == storage.POISON]] = True
        return mask

    @property
    def target_label(self) -> int | None:
        """The one target, or None where nothing is poisoned."""
        targets = np.unique(self.target[self.role == storage.POISON])
        return int(targets[0]) if len(targets) else None


def read_index(path: Path) -> PoisonIndex:
    with storage.open_(path, "poison_index") as file:
        arrays = {name: file[name][:] for name in storage.SCHEMAS["poison_index"][1]}
        n = int(file.attrs["n"])
        if len(arrays["rows"]) and not (arrays["rows"].min() >= 0 and arrays["rows"].max() < n):
            raise UserError(f"{path}: rows outside 0 to {n - 1}; make it again with `dvc repro poison`")
        stamp = Stamp(arrays.pop("pattern"), arrays.pop("alpha"))
        trigger = json.loads(file.attrs["trigger"])
        fraction = storage.optional_fraction(file.attrs["poison_fraction"])
        return PoisonIndex(n, stamp=stamp, trigger=trigger, poison_fraction=fraction, **arrays)


@dataclass(frozen=True)
class Images:
    """Images (N, H, W, C) uint8 at the network's size and labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class PoisonedData:
    """A data set and a poison index that belong together; image sets are read when they are asked for.

    mean, std: per channel of the clean training images, in units of [0, 1]. image_size: pixels a side, padded.
    """

    data: Path
    index: PoisonIndex
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    def train(self) -> Images:
        """All N training rows, relabelled and triggered as the index says."""
        with storage.open_(self.data, "dataset") as file:
            images, labels = file["train/images"][:], file["train/labels"][:]
        index = self.index
        images[index.rows] = index.stamp.apply(images[index.rows])
        labels[index.rows] = index.labels_after
        return Images(pad(images, self.image_size), labels)

    def test(self) -> Images:
        with storage.open_(self.data, "dataset") as file:
            return Images(pad(file["test/images"][:], self.image_size), file["test/labels"][:])

    def triggered_test(self) -> Images | None:
        """Triggered test images whose true label is not the target; None without poison."""
        target = self.index.target_label
        if target is None:
            return None
        with storage.open_(self.data, "dataset") as file:
            images, labels = file["test/images"][:], file["test/labels"][:]
        others = labels != target
        return Images(pad(self.index.stamp.apply(images[others]), self.image_size), labels[others])


def open_poisoned(data: Path, index: Path) -> PoisonedData:
    """Read the index, check that it was made for this data set."""
    poison = read_index(index)
    with storage.open_(index, "poison_index") as file:
        storage.must_match("data set", index, file.attrs["data"], data)
    with storage.open_(data, "dataset") as file:
        size = max(file["train/images"].shape[1:3])
        return PoisonedData(
            data,
            poison,
            tuple(json.loads(file.attrs["class_names"])),
            tuple(float(x) for x in file.attrs["mean"]),
            tuple(float(x) for x in file.attrs["std"]),
            max(size, int(file.attrs["pad_to"])),
        )


def pad(images: np.ndarray, size: int) -> np.ndarray:
    """Zero-pad (N, H, W, C) images evenly to (N, size, size, C); the same array if they have that size."""
    height, width = images.shape[1:3]
    if height == width == size:
        return images
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(images, ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0)))
