"""The image data sets of the literature: what they are known to be, and reading them from a folder or torchvision.

Nothing here imports torch before a file has to be read or fetched through torchvision.
"""

import gzip
import http.client
import os
import pickle
import shutil
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from stages.lib.errors import UserError
from stages.lib.image_folder import list_images, read_images
from stages.lib.torchvision_compat import import_torchvision

SPLITS = ("train", "test")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Images (N, H, W, C) uint8 and labels (N,) int64 of train, then of test, in the order of the source."""


@dataclass(frozen=True)
class Facts:
    """What a published data set is known to be. Every class has the same number of images."""

    torchvision_class: str
    files: tuple[str, ...]  # torchvision's own, relative to the data root
    shape: tuple[int, int, int]  # (H, W, C)
    per_class: tuple[int, int]  # in train, in test
    class_names: tuple[str, ...]


_CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
_IDX_FILES = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))

FACTS = {
    "cifar10": Facts(
        "CIFAR10",
        tuple(f"cifar-10-batches-py/{file}" for file in _CIFAR10_FILES),
        (32, 32, 3),
        (5000, 1000),
        tuple(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]),
    ),
    "cifar100": Facts(
        "CIFAR100",
        tuple(f"cifar-100-python/{file}" for file in ("train", "test", "meta")),
        (32, 32, 3),
        (500, 100),
        tuple(
            [
                "apple",
                "aquarium_fish",
                "baby",
                "bear",
                "beaver",
                "bed",
                "bee",
                "beetle",
                "bicycle",
                "bottle",
                "bowl",
                "boy",
                "bridge",
                "bus",
                "butterfly",
                "camel",
                "can",
                "castle",
                "caterpillar",
                "cattle",
                "chair",
                "chimpanzee",
                "clock",
                "cloud",
                "cockroach",
                "couch",
                "crab",
                "crocodile",
                "cup",
                "dinosaur",
                "dolphin",
                "elephant",
                "flatfish",
                "forest",
                "fox",
                "girl",
                "hamster",
                "house",
                "kangaroo",
                "keyboard",
                "lamp",
                "lawn_mower",
                "leopard",
                "lion",
                "lizard",
                "lobster",
                "man",
                "maple_tree",
                "motorcycle",
                "mountain",
                "mouse",
                "mushroom",
                "oak_tree",
                "orange",
                "orchid",
                "otter",
                "palm_tree",
                "pear",
                "pickup_truck",
                "pine_tree",
                "plain",
                "plate",
                "poppy",
                "porcupine",
                "possum",
                "rabbit",
                "raccoon",
                "ray",
                "road",
                "rocket",
                "rose",
                "sea",
                "seal",
                "shark",
                "shrew",
                "skunk",
                "skyscraper",
                "snail",
                "snake",
                "spider",
                "squirrel",
                "streetcar",
                "sunflower",
                "sweet_pepper",
                "table",
                "tank",
                "telephone",
                "television",
                "tiger",
                "tractor",
                "train",
                "trout",
                "tulip",
                "turtle",
                "wardrobe",
                "whale",
                "willow_tree",
                "wolf",
                "woman",
                "worm",
            ]
        ),
    ),
    "fashion_mnist": Facts(
        "FashionMNIST",
        tuple(f"FashionMNIST/raw/{file}" for file in _IDX_FILES),
        (28, 28, 1),
        (6000, 1000),
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}

_STALL_SECONDS = 60  # a download that receives nothing for so long has failed


def read_published(name: str, data_root: Path | None, *, download: bool) -> Arrays:
    """The arrays of the data set `name` of FACTS; `datasets.read` says where they are looked for.

    Labels follow the order of `FACTS[name].class_names`, whatever the source. Raises UserError if the data set is
    found nowhere, or what is found is not the data set.
    """
    facts = FACTS[name]
    remedy = (
        f"set the environment variable BACKDOOR_DATA_ROOT or data_root in runtime.yaml to a folder that holds "
        f"{name}/train/<class>/*.png and {name}/test/<class>/*.png, or torchvision's "
        f"{Path(facts.files[0]).parent}/"
    )
    if data_root is None:
        raise UserError(f"no folder is set to read {name} from or download it to: {remedy}")
    root = Path(data_root).expanduser()
    if any((root / name / split).is_dir() for split in SPLITS):
        return _read_folders(name, facts, root / name)
    if all(_plain_or_gz(root / file) for file in facts.files):
        datasets = import_torchvision().datasets
        with _unpacked(root, facts.files) as folder:
            try:
                return _checked(name, facts, _through_torchvision(datasets, facts, folder, download=False), root)
            except (
                AssertionError,
                EOFError,
                KeyError,
                OSError,
                RuntimeError,
                TypeError,
                ValueError,
                pickle.UnpicklingError,
            ) as error:
                raise UserError(
                    f"{(root / facts.files[0]).parent} does not hold torchvision's files of {name}, or "
                    f"they are damaged ({_one_line(error)}): replace the folder, or remove it to have it "
                    "downloaded again"
                ) from error
    looked = (
        f"{name} not found: neither {root / name}/{{train,test}}/<class>/*.png nor torchvision's "
        f"{(root / facts.files[0]).parent}/ is there"
    )
    if not download:
        raise UserError(f"{looked}, and the download is off; {remedy}; or allow the download")
    datasets = import_torchvision().datasets
    print(f"downloading {name} into {root}")
    stall_seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        arrays = _downloaded(datasets, facts, root)
    except (EOFError, OSError, RuntimeError, http.client.HTTPException, tarfile.TarError) as error:
        raise UserError(f"{looked}, and the download failed ({_one_line(error)}); {remedy}") from error
    finally:
        socket.setdefaulttimeout(stall_seconds)
    return _checked(name, facts, arrays, root)


def _read_folders(name: str, facts: Facts, folder: Path) -> Arrays:
    listings = {split: _in_label_order(name, facts, folder / split) for split in SPLITS}
    for split, per_class in zip(SPLITS, facts.per_class, strict=True):  # both splits, before any image is decoded
        _check_counts(name, facts, [len(files) for files in listings[split]], per_class, folder / split)
    arrays = []
    for split, listing in listings.items():
        images = read_images([path for files in listing for path in files], facts.shape, title=f"{name} {split}")
        arrays += [images, np.repeat(np.arange(len(listing)), [len(files) for files in listing])]
    return tuple(arrays)


def _in_label_order(name: str, facts: Facts, folder: Path) -> list[list[Path]]:
    """The image files of each class, in label order. Sorting will not do: "10" comes before "2"."""
    found = list_images(folder)
    n_classes = len(facts.class_names)
    by_name = {class_name.replace("/", "_"): label for label, class_name in enumerate(facts.class_names)}
    label_of = {entry: int(entry) if entry.isdecimal() else by_name.get(entry, -1) for entry in found}
    if sorted(label_of.values()) != list(range(n_classes)):
        unknown = [entry for entry, label in label_of.items() if not 0 <= label < n_classes]
        missing = sorted(set(by_name.values()) - set(label_of.values()))
        complaint = f"{len(found)} class folders"
        complaint += f", unknown {', '.join(map(repr, unknown[:3]))}" if unknown else ""
        complaint += f", without {', '.join(repr(list(by_name)[label]) for label in missing[:3])}" if missing else ""
        raise UserError(
            f"{folder} is not {name}: it holds {complaint}; expected {n_classes}, named after the classes "
            f"({', '.join(list(by_name)[:2])}, …) or 0 to {n_classes - 1}"
        )
    return [found[entry] for entry in sorted(found, key=label_of.__getitem__)]


def _check_counts(name: str, facts: Facts, counts: list[int], per_class: int, where: str | Path) -> None:
    n_classes = len(facts.class_names)
    if counts != [per_class] * n_classes:
        label = next((label for label, count in enumerate(counts) if count != per_class or label >= n_classes))
        named = facts.class_names[label] if label < n_classes else label
        raise UserError(
            f"{where} is not {name}: it holds {sum(counts):,} images, {counts[label]:,} of class "
            f"{named!r}; expected {per_class * n_classes:,}, {per_class:,} of each of {n_classes} classes"
        )


def _checked(name: str, facts: Facts, arrays: Arrays, root: Path) -> Arrays:
    """What was read through torchvision, once it is seen to have the counts and the size of the published data set."""
    where = (root / facts.files[0]).parent
    for split, images, labels, per_class in zip(SPLITS, arrays[::2], arrays[1::2], facts.per_class, strict=True):
        if images.shape != (len(labels), *facts.shape):
            raise UserError(
                f"{where} is not {name}: its {split} images have shape {images.shape}, with {len(labels):,}"
                f" labels; expected {(per_class * len(facts.class_names), *facts.shape)}"
            )
        counts = np.bincount(labels, minlength=len(facts.class_names)).tolist()
        _check_counts(name, facts, counts, per_class, f"{where} ({split})")
    return arrays


def _through_torchvision(datasets: ModuleType, facts: Facts, root: Path, *, download: bool) -> Arrays:
    reader = getattr(datasets, facts.torchvision_class)
    arrays = []
    for train in (True, False):
        split = reader(root, train=train, download=download)
        images = np.asarray(split.data)
        arrays += [images if images.ndim == 4 else images[..., None], np.asarray(split.targets, np.int64)]
    return tuple(arrays)


def _downloaded(datasets: ModuleType, facts: Facts, root: Path) -> Arrays:
    """Fetched beside its place: no file there is ever half of one, be it cut off or fetched twice at once."""
    root.mkdir(parents=True, exist_ok=True)
    archive = getattr(getattr(datasets, facts.torchvision_class), "filename", None)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
        if archive and (root / archive).is_file():  # laid there by hand: torchvision unpacks it in place of fetching it
            Path(folder, archive).symlink_to((root / archive).resolve())
        arrays = _through_torchvision(datasets, facts, Path(folder), download=True)
        for file in facts.files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(folder, file), root / file)
    return arrays


def _plain_or_gz(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


@contextmanager
def _unpacked(root: Path, files: tuple[str, ...]) -> Iterator[Path]:
    """A folder with plain `files`: `root`, or a temporary one if some are .gz there (the root may be read-only)."""
    if all((root / file).is_file() for file in files):
        yield root
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            source, target = _plain_or_gz(root / file), Path(folder, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with (gzip.open if source.suffix == ".gz" else open)(source, "rb") as packed, open(target, "wb") as out:
                    shutil.copyfileobj(packed, out)
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(f"cannot unpack {source} ({_one_line(error)}): replace the file") from error
        yield Path(folder)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
