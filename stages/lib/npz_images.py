"""Images and labels in a NumPy archive as MedMNIST lays them out (Yang et al. 2023, Scientific Data 10:41).

`train_images` (N, H, W) or (N, H, W, 1 or 3) uint8 and `train_labels` (N,) or (N, 1) integers, likewise `val_` and
`test_`. Images are read row by row from the archive, which may exceed memory. Nothing is ever unpickled: an array of
Python objects is refused by its header.
"""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stages.lib.errors import UserError
from stages.lib.foreign_hdf5 import BOMB, BOMB_RATIO

EXPECTED = "expected train_images and train_labels as in MedMNIST (test_images and test_labels, val_… if there are any)"


class Archive:
    """An .npz file, open for reading; use as a context manager. Raises UserError, with the path, for what is wrong.

    expected: words for what it should hold.
    """

    def __init__(self, path: Path, expected: str = EXPECTED):
        self.path, self.expected = path, expected
        try:
            self.zip = zipfile.ZipFile(path)
        except FileNotFoundError as error:
            raise UserError(f"no file {path}: expected an .npz archive; {expected}") from error
        except IsADirectoryError as error:
            raise UserError(f"{path} is a folder: set data.source to folder, or give an .npz file") from error
        except Exception as error:  # of a damaged one: BadZipFile, NotImplementedError, ValueError, struct.error, …
            raise UserError(f"{path} is no .npz archive, perhaps cut short ({error}); make it with numpy.savez") from error
        self.names = {name.removesuffix(".npy") for name in self.zip.namelist() if name.endswith(".npy")}

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_) -> None:
        self.zip.close()

    def array(self, name: str) -> np.ndarray:
        """A whole array of any shape; read-only."""
        with _Member(self, name) as member:
            values = member.read(member.shape)
            member.must_end()
            return values.reshape(member.shape, order="F" if member.by_column else "C")

    def has(self, split: str) -> bool:
        """Whether it holds the split; one half of it alone is an error."""
        found = [f"{split}_{what}" in self.names for what in ("images", "labels")]
        if any(found) and not all(found):
            missing = f"{split}_{'labels' if found[0] else 'images'}"
            raise UserError(f"{self.path} holds no array {missing}; {EXPECTED}")
        return all(found)

    def labels(self, split: str) -> np.ndarray:
        """(N,) int64."""
        with _Member(self, f"{split}_labels") as member:
            shape, dtype = member.shape, member.dtype
            if dtype.kind not in "iub" or not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
                raise UserError(
                    f"{self.path}: {split}_labels have shape {shape} and dtype {dtype}; expected one integer for each "
                    "image, (N,) or (N, 1); several labels for one image cannot be audited"
                )
            labels = member.read(shape).reshape(-1)
            member.must_end()
            if labels.dtype.kind == "u" and labels.size and labels.max() > np.iinfo(np.int64).max:
                raise UserError(f"{self.path}: {split}_labels hold {labels.max()}, which is no class number")
            return labels.astype(np.int64)

    def image_shape(self, split: str) -> tuple[int, ...]:
        """(N, H, W, C), C = 1 or 3."""
        with _Member(self, f"{split}_images") as member:
            shape, dtype = member.shape, member.dtype
            if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))) or 0 in shape:
                raise UserError(
                    f"{self.path}: {split}_images have shape {shape} and dtype {dtype}; expected (N, H, W) or "
                    "(N, H, W, 1 or 3) uint8"
                )
            if member.by_column and min(shape) > 1:
                raise UserError(
                    f"{self.path}: {split}_images is stored column by column; save numpy.ascontiguousarray of it"
                )
            return shape if len(shape) == 4 else (*shape, 1)

    def images(self, split: str) -> Iterator[np.ndarray]:
        """Each image in turn, (H, W, C) uint8."""
        n, *shape = self.image_shape(split)
        with _Member(self, f"{split}_images") as member:
            for _ in range(n):
                yield member.read(shape).reshape(shape)
            member.must_end()


class _Member:
    """One array of an archive, read from its start on: shape, dtype, and whether it is stored column by column."""

    def __init__(self, archive: Archive, name: str):
        self.archive, self.name = archive, name

    def __enter__(self) -> "_Member":
        path = self.archive.path
        if self.name not in self.archive.names:
            raise UserError(f"{path} holds no array {self.name}; {self.archive.expected}")
        try:
            self.file = self.archive.zip.open(f"{self.name}.npy")
            version = np.lib.format.read_magic(self.file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, self.by_column, self.dtype = read(self.file)
        except Exception as error:  # of a damaged or foreign one: BadZipFile, ValueError, RuntimeError (a password), …
            raise UserError(f"{path}: {self.name} is no NumPy array ({error})") from error
        if self.dtype.hasobject:
            raise UserError(f"{path}: {self.name} holds pickled Python objects, which are never loaded; save numbers")
        info = self.archive.zip.getinfo(f"{self.name}.npy")
        size = math.prod(self.shape) * self.dtype.itemsize
        if min(self.shape, default=0) < 0 or size != info.file_size - self.file.tell():
            raise UserError(
                f"{path}: {self.name} says shape {self.shape} and dtype {self.dtype}, which is not what is stored; make "
                "the archive again"
            )
        if size > max(BOMB, BOMB_RATIO * info.compress_size):
            raise UserError(
                f"{path}: {self.name} unpacks from {info.compress_size:,} to {size:,} bytes; store it uncompressed"
            )
        return self

    def read(self, shape) -> np.ndarray:
        """The next values, as many as an array of this shape has, in one dimension."""
        content = self.file.read(math.prod(shape) * self.dtype.itemsize)
        return np.frombuffer(content, self.dtype, math.prod(shape)) if math.prod(shape) else np.zeros(0, self.dtype)

    def must_end(self) -> None:
        """Read on to the end, where zipfile compares the checksum: of a deflated array it has not done so yet."""
        self.file.read(1)

    def __exit__(self, kind, error, traceback):
        self.file.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            words = " ".join(str(error).split())
            raise UserError(f"{self.archive.path}: {self.name} is damaged ({words}); make the archive again") from error
