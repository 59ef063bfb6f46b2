"""A user's own images, brought to one size and stored as a data set, with the name of each row's file.

Never more than a few images are in memory: they are decoded one by one into an unnamed temporary file beside the output
and copied from there in their final order. Disk needed meanwhile: N x image_size^2 x 3 bytes.
"""

import json
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from stages.lib import datasets, image_folder, params, storage
from stages.lib.errors import UserError
from stages.lib.npz_images import Archive

DEFAULT_IMAGE_SIZE = 64
MAX_CLASSES = 10_000  # ImageNet-21k's 21,841 classes are out of reach of these networks; row numbers as labels are not
VALIDATION = ("val", "valid", "validation")
SHOWN = 20  # lines of the log for what was skipped; the data set keeps all
COPY_ROWS = 256

Row = tuple[str, int, np.ndarray | str, tuple[int, int]]
"""Name, label, image (size, size, 3) uint8 or the reason why there is none, own (width, height)."""


@dataclass
class _Spool:
    """One split on disk: RGB images in the order in which they came, and what is known of each."""

    size: int
    folder: Path
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    grey: bool = True
    smallest: tuple[int, int] = (10**9, 10**9)
    largest: tuple[int, int] = (0, 0)

    def fill(self, rows: Iterator[Row], skipped: dict[str, str]) -> "_Spool":
        # It has no name: gone with the process, however that ends.
        self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        for name, label, image, own_size in rows:
            if isinstance(image, str):
                skipped[name] = image
                continue
            self.grey = self.grey and bool((image == image[..., :1]).all())
            self.file.write(image.tobytes())
            self.names.append(name)
            self.labels.append(label)
            self.digests += datasets.row_digest(image, label)
            self.smallest = min(self.smallest, own_size, key=min)
            self.largest = max(self.largest, own_size, key=max)
        self.file.flush()
        return self

    def order(self) -> np.ndarray:
        return datasets.order_of(bytes(self.digests))

    def take(self, rows: np.ndarray, channels: int) -> np.ndarray:
        """(n, size, size, channels) uint8. Mapped anew each time: a mapping that stays would fill memory by and by."""
        mapped = np.memmap(self.file, np.uint8, "r", shape=(len(self.names), self.size, self.size, 3))
        return np.ascontiguousarray(mapped[rows][..., :channels])


def write(spec: params.Data, source: Path, out: Path) -> list[str]:
    """Read the images at `source` as `spec` says, write the data set `out`; returns what to tell the user, in lines.

    Raises UserError with one line that names the file or folder.
    """
    size = spec.image_size or DEFAULT_IMAGE_SIZE
    skipped: dict[str, str] = {}
    if spec.source == "folder":
        class_names, splits, notes, check_unchanged = _read_folder(source, size, out.parent, skipped)
    else:
        class_names, splits, notes = _read_npz(source, size, out.parent, skipped)
    train, test = splits["train"], splits.get("test")
    channels = 1 if train.grey and (test is None or test.grey) else 3
    rows = {"train": (train, train.order())}
    if test is not None:
        rows["test"] = test, test.order()
    else:
        chosen = _held_out(np.array(train.labels), rows["train"][1], spec.test_fraction or 0)
        rows = {"train": (train, rows["train"][1][~chosen]), "test": (train, rows["train"][1][chosen])}
    _write(out, rows, channels, class_names, skipped)
    if spec.source == "folder":
        check_unchanged()  # not before: DVC looks at the folder after the stage, and takes what it sees for what was read
    notes += _notes(spec, rows, class_names, channels, size, held_out=test is None)
    if skipped:
        notes.append(f"{len(skipped)} entries skipped, neither trained on nor scored:")
        notes += [f"  {name}: {reason}" for name, reason in list(skipped.items())[:SHOWN]]
        notes += [f"  … and {len(skipped) - SHOWN} more"] if len(skipped) > SHOWN else []
    return notes


def check_classes(counts: np.ndarray, where: str | Path) -> None:
    """Refuse what cannot be meant, such as row numbers as labels or one folder for each image: (C,) images per class."""
    n, n_classes = int(counts.sum()), len(counts)
    if n_classes < 2:
        raise UserError(f"{where} holds one class; expected two or more")
    if n_classes > MAX_CLASSES or n < 2 * n_classes:
        raise UserError(
            f"{where} holds {n_classes:,} classes with {n:,} images; expected at most {MAX_CLASSES:,} classes, with two "
            "images or more in the mean: are these file names or row numbers?"
        )


def _read_folder(source: Path, size: int, spool: Path, skipped: dict[str, str]):
    if source.is_file():
        kind = "an archive: unpack it and give" if _is_archive(source) else "a file: give"
        raise UserError(f"{source} is {kind} the folder with train/<class>/ in it (an .npz file: data.source=npz)")
    if not source.is_dir():
        raise UserError(f"no folder {source}: expected one with train/<class>/ in it, and images there")
    beside = _folders(source)
    split = "train" if "train" in beside else ""
    if split and not _folders(source / split) and not set(beside) <= {"train", "test", *VALIDATION}:
        split = ""  # a class of that name, among others
    usual = {"train", "training", "test", "testing", *VALIDATION}
    if "train" not in beside and len(beside) > 1 and {name.lower() for name in beside} <= usual:
        raise UserError(
            f"{source} holds {', '.join(beside)}, and no folder `train`: rename the one with the training images"
        )
    listings = {"train": image_folder.scan(source, split)}
    if split and (source / "test").is_dir():
        listings["test"] = image_folder.scan(source, "test")
    class_names = tuple(listings["train"].files)
    check_classes(np.array([len(names) for names in listings["train"].files.values()]), source / split)
    before = {name: listing.state() for name, listing in listings.items()}
    splits = {}
    for name, listing in listings.items():
        unknown = sorted(set(listing.files) - set(class_names))
        if unknown:
            raise UserError(f"{source / name / unknown[0]} is no class of {source / 'train'}: remove it or rename it")
        skipped |= listing.skipped
        splits[name] = _Spool(size, spool).fill(_folder_rows(listing, class_names, size, name), skipped)
    present = set(splits["train"].labels)
    for label, name in enumerate(class_names):
        if label not in present:
            first = listings["train"].files[name][0]
            raise UserError(
                f"{source / split / name} holds no image that can be read, e.g. {first} ({skipped[first]}): remove the "
                "folder or replace the files"
            )

    def check_unchanged() -> None:
        for name, listing in listings.items():
            again = image_folder.scan(source, split if name == "train" else "test")
            if again.files != listing.files or again.state() != before[name]:
                raise UserError(f"{source} changed while it was read: nothing was written; run it again")

    others = [name for name in beside if split and name not in ("train", "test")]
    notes = [f"{source / name} is left out: neither trained on nor scored" for name in others[:SHOWN]]
    notes += [f"… and {len(others) - SHOWN} more folders beside train"] if len(others) > SHOWN else []
    return class_names, splits, notes, check_unchanged


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _folder_rows(listing: image_folder.Listing, class_names, size: int, title: str) -> Iterator[Row]:
    label_of = {name: label for label, name in enumerate(class_names)}
    total = sum(map(len, listing.files.values()))
    for label, name in tqdm(listing.rows(), desc=title, total=total, unit="image", disable=None):
        try:
            image, own_size = image_folder.read_resized(listing.root / name, size)
            yield name, label_of[label], image, own_size
        except image_folder.Unreadable as error:
            yield name, label_of[label], str(error), (0, 0)


def _read_npz(source: Path, size: int, spool: Path, skipped: dict[str, str]):
    with Archive(source) as archive:
        if not archive.has("train"):
            raise UserError(f"{source} holds no array train_images; it holds {', '.join(sorted(archive.names)[:8])}")
        held_out = "test" if archive.has("test") else "val" if archive.has("val") else None
        notes = []
        if held_out == "test" and archive.has("val"):
            notes.append("val_images are left out: neither trained on nor scored")
        of_split = {"train": "train"} | ({"test": held_out} if held_out else {})
        labels = {}
        for name, stored in of_split.items():
            labels[name], n = archive.labels(stored), archive.image_shape(stored)[0]
            if len(labels[name]) != n:
                raise UserError(f"{source}: {stored}_labels has {len(labels[name])} rows, {stored}_images has {n}")
        values, counts = np.unique(labels["train"], return_counts=True)
        check_classes(counts, source)
        unknown = np.setdiff1d(labels.get("test", values), values)
        if len(unknown):
            raise UserError(f"{source}: {held_out}_labels hold {unknown[0]}, which train_labels do not")
        splits = {}
        for name, stored in of_split.items():
            of_row = np.searchsorted(values, labels[name])
            splits[name] = _Spool(size, spool).fill(_npz_rows(archive, stored, of_row, size), skipped)
    return tuple(str(value) for value in values), splits, notes


def _npz_rows(archive: Archive, stored: str, labels: np.ndarray, size: int) -> Iterator[Row]:
    images = tqdm(archive.images(stored), desc=stored, total=len(labels), unit="image", disable=None)
    for row, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        yield f"{stored}_images[{row}]", label, image_folder.resized(picture, size), picture.size


def _held_out(labels: np.ndarray, order: np.ndarray, fraction: float) -> np.ndarray:
    """(N,) bool over the rows in `order`: the first share of each class; one image of it at least stays."""
    chosen = np.zeros(len(order), bool)
    ordered = labels[order]
    for label in np.unique(labels):
        rows = np.flatnonzero(ordered == label)
        chosen[rows[: min(round(len(rows) * fraction), len(rows) - 1)]] = True
    return chosen


def _write(out: Path, rows: dict, channels: int, class_names: tuple[str, ...], skipped: dict[str, str]) -> None:
    train, order = rows["train"]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(order), COPY_ROWS):
        counts += datasets.value_counts(train.take(order[start : start + COPY_ROWS], channels))
    mean, std = datasets.statistics_of(counts)
    attributes = {
        "class_names": json.dumps(class_names),
        "mean": mean,
        "std": np.maximum(std, 1 / 255),  # a channel that never changes must not divide by zero
        "pad_to": train.size,
    }
    with storage.create(out, "dataset", attributes) as file:
        for part, (spool, order) in rows.items():
            stored = file.create_dataset(f"{part}/images", (len(order), train.size, train.size, channels), np.uint8)
            for start in range(0, len(order), COPY_ROWS):
                stored[start : start + COPY_ROWS] = spool.take(order[start : start + COPY_ROWS], channels)
            file.create_dataset(f"{part}/labels", data=np.array(spool.labels, np.int64)[order])
            names = [spool.names[row] for row in order]
            file.create_dataset(f"{part}/files", data=names, shape=(len(names),), dtype=h5py.string_dtype())
        lines = [f"{name}: {reason}" for name, reason in skipped.items()]
        file.create_dataset("skipped", data=lines, shape=(len(lines),), dtype=h5py.string_dtype())


def _notes(spec: params.Data, rows: dict, class_names, channels: int, size: int, held_out: bool) -> list[str]:
    (train, order), (_, test_order) = rows["train"], rows["test"]
    of_class = np.bincount(np.array(train.labels)[order], minlength=len(class_names))
    lines = [
        f"{spec.source}: {len(order)} training and {len(test_order)} test images of {len(class_names)} classes, "
        f"{'grey' if channels == 1 else 'colour'}; {_by(train.smallest)} to {_by(train.largest)} pixels, brought to "
        f"{_by((size, size))} without cropping"
    ]
    shrinks = max(train.largest) / size
    if shrinks > 1:
        lines.append(
            f"the largest is shrunk {shrinks:.1f}-fold: a trigger of fewer than {int(np.ceil(shrinks))} pixels a side "
            f"becomes less than one pixel there and may be lost (data.image_size up to {params.OWN_IMAGE_SIZES[1]})"
        )
    if held_out and len(test_order):
        lines.append(f"{len(test_order)} of the training images are held out as test images: they are not scored")
    for label in np.flatnonzero(of_class == 1):
        row = next(row for row in order if train.labels[row] == label)
        lines.append(f"class {class_names[label]!r} has one image, {train.names[row]}: it cannot be judged")
    missing = np.setdiff1d(np.arange(len(class_names)), np.array(rows["test"][0].labels)[test_order])
    if len(test_order) and len(missing):
        lines.append(f"class {class_names[missing[0]]!r} has no test images ({len(missing)} such classes)")
    return lines


def _is_archive(path: Path) -> bool:
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path) or path.suffix in (".7z", ".rar", ".gz", ".zst", ".xz")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
