"""The image data sets: where they are read from, and the fixed order that their rows get.

Nothing here imports torch before a file has to be read or fetched through torchvision.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.lib.errors import UserError
from stages.lib.published import FACTS, read_published

NAMES = ("digits", "cifar10", "cifar100", "fashion_mnist")


@dataclass(frozen=True)
class ImageDataset:
    """Images (N, H, W, C) uint8, labels (N,) int64 in 0..C-1, and the C class names in label order."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]


_DIGITS_SIZE = 8  # pixels a side, as scikit-learn bundles them
_DIGITS_TEST_FRACTION = 0.2


def read(name: str, data_root: Path | None, *, image_size: int | None = None, download: bool = True) -> ImageDataset:
    """Read a data set, from the first of these that is there, with its rows in the order of `canonical_order`:

    1. `data_root/<name>/{train,test}/<class>/*.png` (or another of `image_folder.SUFFIXES`); the class folders bear
       the class names ("/" written as "_") or the labels 0, 1, …;
    2. torchvision's own files in `data_root`: `cifar-10-batches-py/`, `cifar-100-python/` (md5 checked) or
       `FashionMNIST/raw/*-ubyte`, plain or .gz;
    3. a download of these through torchvision into `data_root`, if `download` is true.

    `digits` needs no `data_root`: scikit-learn brings its 1,797 grey images of 8 x 8. They are enlarged to
    `image_size` (by default not at all), and a fixed fifth of each class is the test split, the same at every size.
    The others have their own size, and `image_size` may only repeat it.

    Raises UserError if the data set is found nowhere, or what is found is not the data set.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    if name == "digits":
        return _in_canonical_order(_read_digits(_DIGITS_SIZE if image_size is None else image_size))
    facts = FACTS[name]
    if image_size not in (None, facts.shape[0]):
        raise UserError(
            f"image_size {image_size} for {name}: its images are {facts.shape[0]} x {facts.shape[1]}, "
            "and only digits are enlarged"
        )
    try:
        arrays = read_published(name, data_root, download=download)
    except PermissionError as error:
        raise UserError(f"cannot read {name}: {error.strerror}: {error.filename}") from error
    return _in_canonical_order(ImageDataset(*arrays, class_names=facts.class_names))


def canonical_order(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A fixed pseudo-random order of the rows, the same whatever order they come in: by the SHA-256 of each row.

    A folder is read class by class. Were its rows left so, a relabelled row would stand out in the block of its true
    class, and a row number would tell a defense what it must find out. Sources also differ in their order; with this
    one they give the same arrays, bit for bit. No random generator is used, so no version of one can change it.

    Parameters: (N, H, W, C) uint8 `images`, (N,) integer `labels`; the label (8 bytes, little-endian) and then the
    image are hashed. Returns the (N,) int64 row numbers in order; rows that are equal in both keep theirs.
    """
    return order_of(b"".join(row_digest(images[row], labels[row]) for row in range(len(images))))


def row_digest(image: np.ndarray, label: int) -> bytes:
    """The 32 bytes by which `canonical_order` sorts a row."""
    return hashlib.sha256(int(label).to_bytes(8, "little", signed=True) + image.tobytes()).digest()


def order_of(digests: bytes) -> np.ndarray:
    """Row numbers in the order of their digests, (N,) int64; 32 bytes a row, equal ones keep their order."""
    words = np.frombuffer(digests, ">u8").reshape(-1, 4)
    return np.lexsort(words.T[::-1]).astype(np.int64)  # lexsort's last key is its first


def subset(images: np.ndarray, labels: np.ndarray, per_class: int | None, imbalance_factor: float = 1.0) -> np.ndarray:
    """The first rows of each class, as sorted (n,) int64 row numbers, so that the order stays.

    `per_class` of each class, None for as many as the smallest has; with an `imbalance_factor` above 1 so many of the first,
    and of class k of K, rounded down, per_class * imbalance_factor ** (-k / (K - 1)): the long tail of Cui et al. 2019
    (arXiv:1901.05555). Raises UserError if a class that occurs in `labels` has fewer rows, or would have none.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    classes, sizes = np.unique(labels, return_counts=True)
    per_class = int(sizes.min()) if per_class is None else per_class
    shares = imbalance_factor ** (-np.arange(len(classes)) / max(len(classes) - 1, 1))
    wanted = np.floor(per_class * shares + 1e-9).astype(int)  # a whole number must not fall short by its rounding
    if wanted[-1] < 1:
        tail = f" with an imbalance factor of {imbalance_factor:g}" if imbalance_factor > 1 else ""
        raise UserError(f"{per_class} images per class{tail}: expected at least 1 of every class")
    chosen = []
    for label, available, number in zip(classes, sizes, wanted, strict=True):
        if available < number:
            raise UserError(f"{number} images per class: class {label} has only {available}; ask for fewer")
        chosen.append(np.flatnonzero(labels == label)[:number])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of each channel of (N, H, W, C) uint8 images, in units of 0..1.

    Both are (C,) float64 and come from exact integer sums, so that no order of summation shows in them.
    """
    return statistics_of(value_counts(images))


def value_counts(images: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of (N, H, W, C) uint8 images, (C, 256) int64."""
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    block = max(1, 2**22 // math.prod(images.shape[1:3]))  # rows at a time: bincount makes 8 bytes of each value
    for start in range(0, len(images), block):
        for channel in range(channels):
            counts[channel] += np.bincount(images[start : start + block, ..., channel].ravel(), minlength=256)
    return counts


def statistics_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`channel_statistics` of the images with these `value_counts`."""
    means, stds = [], []
    for of_value in counts.tolist():  # Python's integers do not overflow
        n = sum(of_value)
        total = sum(value * count for value, count in enumerate(of_value))
        squares = sum(value * value * count for value, count in enumerate(of_value))
        means.append(total / (255 * n))
        stds.append(math.sqrt(n * squares - total * total) / (255 * n))
    return np.array(means), np.array(stds)


def fingerprint(dataset: ImageDataset) -> str:
    """SHA-256, in hex, of a data set's class names, shapes, images and labels, in their order."""
    arrays = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    digest = hashlib.sha256(json.dumps([dataset.class_names, [array.shape for array in arrays]]).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
    return digest.hexdigest()


def _in_canonical_order(dataset: ImageDataset) -> ImageDataset:
    train = canonical_order(dataset.train_images, dataset.train_labels)
    test = canonical_order(dataset.test_images, dataset.test_labels)
    return ImageDataset(
        dataset.train_images[train],
        dataset.train_labels[train],
        dataset.test_images[test],
        dataset.test_labels[test],
        dataset.class_names,
    )


def _read_digits(image_size: int) -> ImageDataset:
    if image_size < _DIGITS_SIZE:
        raise UserError(f"image_size {image_size} for digits: expected at least their own size, {_DIGITS_SIZE}")
    from sklearn.datasets import load_digits  # here, for it takes a second and one data set needs it

    digits = load_digits()
    images = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[..., None]  # 0..16 to 0..255
    labels = digits.target.astype(np.int64)
    # Split before enlarging, in the canonical order: the same images are the test split at every size.
    order = canonical_order(images, labels)
    images, labels = _enlarge(images[order], image_size), labels[order]
    test = np.zeros(len(labels), bool)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        test[rows[: round(len(rows) * _DIGITS_TEST_FRACTION)]] = True
    return ImageDataset(images[~test], labels[~test], images[test], labels[test], tuple("0123456789"))


def _enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of square (N, s, s, C) uint8 images, pixel centres at (i + 1/2) / s.

    In integers throughout, so that every machine and library version gives the same bytes.
    """
    side = images.shape[1]
    unit = 2 * size  # a source position times this is an integer
    position = (2 * np.arange(size) + 1) * side - size
    low = position // unit
    weight = position - low * unit
    low, high = low.clip(0, side - 1), (low + 1).clip(0, side - 1)
    wide = images.astype(np.int64)
    weight_y, weight_x = weight[:, None, None], weight[:, None]
    wide = wide[:, low] * (unit - weight_y) + wide[:, high] * weight_y
    wide = wide[:, :, low] * (unit - weight_x) + wide[:, :, high] * weight_x
    return np.ascontiguousarray((wide + unit * unit // 2) // (unit * unit), np.uint8)
