"""The poison index and the image sets that follow from it: the poisoned training set, clean and triggered test sets."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.lib import storage
from stages.lib.errors import UserError
from stages.lib.triggers import Trigger, make


@dataclass(frozen=True)
class PoisonIndex:
    """What the attacker did. K touched rows of n; see `stages.lib.storage` for the fields."""

    n: int
    rows: np.ndarray
    role: np.ndarray
    target: np.ndarray
    labels_before: np.ndarray
    labels_after: np.ndarray
    trigger: np.ndarray
    variant: np.ndarray
    goals: np.ndarray
    triggers: tuple[Trigger, ...]
    attack: str
    poison_fraction: float | None

    @property
    def poisoned(self) -> np.ndarray:
        """(n,) bool: rows with the role poison. Recall, budget and oracle count these and no others."""
        mask = np.zeros(self.n, bool)
        mask[self.rows[self.role == storage.POISON]] = True
        return mask

    @property
    def target_labels(self) -> np.ndarray:
        """The classes that a triggered image is to be taken for, rising; all of them for all_to_all, none without poison."""
        return np.unique(self.goals[self.goals >= 0])


def read_index(path: Path) -> PoisonIndex:
    with storage.open_(path, "poison_index") as file:
        arrays = {name: file[name][:] for name in storage.SCHEMAS["poison_index"][1]}
        n = int(file.attrs["n"])
        pictures, options = arrays.pop("pictures"), json.loads(file.attrs["triggers"])
        try:
            triggers = tuple(make(option, picture) for option, picture in zip(options, pictures, strict=True))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            words = f"a trigger cannot be made of {file.attrs['triggers']:.200}"
            raise UserError(f"{path}: {words}; make it again with `dvc repro poison`") from error
        fraction = storage.optional_fraction(file.attrs["poison_fraction"])
        return PoisonIndex(n, triggers=triggers, attack=file.attrs["attack"], poison_fraction=fraction, **arrays)


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
        for number, trigger in enumerate(index.triggers):
            rows = index.rows[index.trigger == number]
            images[rows] = trigger.apply(images[rows], index.variant[index.trigger == number])
        labels[index.rows] = index.labels_after
        return Images(pad(images, self.image_size), labels)

    def test(self) -> Images:
        with storage.open_(self.data, "dataset") as file:
            return Images(pad(file["test/images"][:], self.image_size), file["test/labels"][:])

    def triggered_tests(self) -> Iterator[tuple[Images, np.ndarray]]:
        """For each trigger, the triggered test images by which the attack is judged, with their true labels, and what each
        should be taken for, (N,) int64. `stages.lib.attacks` says which images these are. None without poison."""
        with storage.open_(self.data, "dataset") as file:
            images, labels = file["test/images"][:], file["test/labels"][:]
        for trigger, goal in zip(self.index.triggers, self.index.goals, strict=True):
            counts = goal[labels] >= 0
            stamped = pad(trigger.apply(images[counts]), self.image_size)
            yield Images(stamped, labels[counts]), goal[labels[counts]]


def open_poisoned(data: Path, index: Path) -> PoisonedData:
    """Read the index, check that it was made for this data set."""
    poison = read_index(index)
    with storage.open_(index, "poison_index") as file:
        storage.must_match("data set", index, file.attrs["data"], data)
    with storage.open_(data, "dataset") as file:
        size, labels = max(file["train/images"].shape[1:3]), file["train/labels"][:]
        n_classes = len(json.loads(file.attrs["class_names"]))
        if (poison.n, poison.goals.shape[1]) != (len(labels), n_classes) or (
            labels[poison.rows] != poison.labels_before
        ).any():
            raise UserError(f"{index}: its rows or labels are not those of {data}; make it again (`dvc repro poison`)")
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
