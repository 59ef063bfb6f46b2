"""Image folders as `torchvision.datasets.ImageFolder` reads them: one folder per class, images in it.

Two ways of reading: strict, for the published data sets, where anything unexpected means that it is another data set;
and forgiving, for a user's own folder, where a file that cannot be used is listed with the reason and passed over.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from stages.lib.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
OWN_SUFFIXES = (*SUFFIXES, ".gif", ".pgm", ".ppm", ".tif", ".tiff")  # in a user's own folder
# Decoders that a user's files may reach, whatever their suffix: not those that start other programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def list_images(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder in `folder`, classes and files sorted by name.

    Files with another suffix and everything whose name starts with a dot are passed over.

    Raises UserError if `folder` is no folder, holds no class folder, or a class folder holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected one folder per class in it, with images ({', '.join(SUFFIXES)})")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(
            f"{folder} holds no class folders: expected one folder per class, with images ({', '.join(SUFFIXES)})"
        )
    listing = {}
    for name in classes:
        files = sorted(
            entry.name
            for entry in os.scandir(folder / name)
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
        )
        if not files:
            raise UserError(f"{folder / name} holds no images ({', '.join(SUFFIXES)}): fill it or remove it")
        listing[name] = [folder / name / file for file in files]
    return listing


def read_images(paths: list[Path], shape: tuple[int, int, int], *, title: str = "") -> np.ndarray:
    """Decode images of one size.

    Parameters: `shape` is (H, W, C) with C = 1 (grey) or 3 (RGB); palette, grey and alpha images are converted.
    `title` names the progress bar, which a terminal alone shows.

    Returns a (N, H, W, C) uint8 array in the order of `paths`.

    Raises UserError, with the file's name, for one that cannot be decoded, has another size or more than 8 bits.
    """
    images = np.empty((len(paths), *shape), np.uint8)
    # One thread: on small PNGs Pillow spends its time in Python, and a pool is no faster (10,000 in 1.1 s alone, in
    # 1.0 s with two threads, in 2.5 s with six).
    for row, path in enumerate(tqdm(paths, desc=title, unit="image", disable=None)):
        images[row] = _decode(path, shape)
    return images


@dataclass
class Listing:
    """What a user's folder holds. `files`: class name -> names relative to `root`, sorted. `skipped`: name -> reason."""

    root: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[str, str]]:
        """(class name, file name) of each file in order."""
        return ((label, name) for label, names in self.files.items() for name in names)

    def state(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of each file, to see whether the folder changed meanwhile."""
        found = {}
        for _, name in self.rows():
            try:
                stat = (self.root / name).stat()
                found[name] = stat.st_size, stat.st_mtime_ns
            except OSError:
                found[name] = -1, -1
        return found


def scan(root: Path, split: str = "") -> Listing:
    """The image files in `root/split/<class>/`, whatever their sizes, with a reason for each entry that is passed over.

    Passed over: other suffixes, folders within a class, links that lead out of `root`, images and folders whose name begins
    with a dot (other files that do are ignored), and names that cannot stand in a list of one name a line (control
    characters, not UTF-8).

    Raises UserError if there is no class folder, a class folder holds no image at all, or `split` leads out of `root`.
    """
    folder, inside = root / split, _real(root)
    if not _real(folder).is_relative_to(inside):
        raise UserError(f"{folder} is a link that leaves {root}; give the folder that it points into")
    listing = Listing(root)

    def reason(entry: os.DirEntry) -> str | None:
        if any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in entry.name):
            return "its name holds control characters or is not UTF-8: rename it"
        if entry.name.startswith("."):
            return "its name begins with a dot; torchvision's ImageFolder would read it"
        if entry.is_symlink() and not _real(entry.path).is_relative_to(inside):
            return f"a link that leaves {root}"
        return None

    def name_of(entry: os.DirEntry, parent: str = "") -> str:
        return os.path.join(split, parent, entry.name)

    def entries(path: Path) -> list[os.DirEntry]:
        seen = (e for e in os.scandir(path) if not e.name.startswith(".") or could_hold_images(e))
        return sorted(seen, key=lambda entry: entry.name)

    def could_hold_images(entry: os.DirEntry) -> bool:
        return os.path.isdir(entry.path) or entry.name.lower().endswith(OWN_SUFFIXES)

    def nothing(path: Path | str, what: str) -> UserError:
        """The error for a folder of which nothing can be used, with the first of the reasons."""
        below = [f"{name}: {why}" for name, why in listing.skipped.items() if (root / name).is_relative_to(path)]
        known = f"{below[0]}{f' (and {len(below) - 1} more)' if len(below) > 1 else ''}" if below else ""
        return UserError(f"{path} holds no {what}{f'; passed over: {known}' if known else ': fill it or remove it'}")

    for class_entry in entries(folder):
        if why := reason(class_entry):
            listing.skipped[_printable(name_of(class_entry))] = why
        elif not os.path.isdir(class_entry.path):
            listing.skipped[name_of(class_entry)] = "not in a class folder"
        else:
            names = []
            for entry in entries(Path(class_entry.path)):
                name = name_of(entry, class_entry.name)
                if why := reason(entry):
                    listing.skipped[_printable(name)] = why
                elif os.path.isdir(entry.path):
                    listing.skipped[name] = "a folder within a class; images lie directly in the class folder"
                elif not os.path.isfile(entry.path):  # opening a named pipe would wait for ever
                    listing.skipped[name] = "not a file, or a link to nothing"
                elif not entry.name.lower().endswith(OWN_SUFFIXES):
                    listing.skipped[name] = f"not an image by its suffix ({', '.join(OWN_SUFFIXES)})"
                else:
                    names.append(name)
            if not names:
                raise nothing(class_entry.path, f"images ({', '.join(OWN_SUFFIXES)})")
            listing.files[class_entry.name] = names
    if not listing.files:
        raise nothing(folder, f"class folders, one per class, with images ({', '.join(OWN_SUFFIXES)}) in it")
    return listing


def _real(path: Path | str) -> Path:
    """Where links lead; Path.resolve fails for one that leads to itself."""
    return Path(os.path.realpath(path))


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


class Unreadable(Exception):
    """An image that cannot be used; its message is the reason, in a few words."""


def read_resized(path: Path, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode an image of any size and bring it to (size, size, 3) uint8; also its own (width, height).

    Raises `Unreadable`.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image.mode.startswith(("I", "F")):
                raise Unreadable(f"more than 8 bits per channel (mode {image.mode})")
            return resized(image, size), image.size
    except Unreadable:
        raise
    except Exception as error:  # a broken file makes Pillow raise OSError, SyntaxError, ValueError, struct.error, …
        words = " ".join(str(error).replace(str(path), "the file").split())
        raise Unreadable(words or type(error).__name__) from error


def resized(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8. The whole image, without cropping, so that a patch in a corner stays where it is; the
    aspect ratio is not kept. Shrinking averages over the area that each new pixel covers: nothing is stepped over.
    """
    shrinks = min(image.size) >= size
    filter_ = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(image.convert("RGB").resize((size, size), filter_))


def _decode(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    height, width, channels = shape
    try:
        with Image.open(path, formats=FORMATS) as image:
            size, mode = image.size, image.mode
            if size == (width, height) and not mode.startswith(("I", "F")):
                return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(shape)
    except Exception as error:  # a broken file makes Pillow raise OSError, SyntaxError, ValueError, struct.error, …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the image {path}: {reason}; replace the file") from error
    if size != (width, height):
        raise UserError(f"{path} is {size[0]} x {size[1]} pixels, expected {width} x {height}")
    raise UserError(f"{path} has more than 8 bits per channel (mode {mode}), expected 8-bit grey or RGB")
