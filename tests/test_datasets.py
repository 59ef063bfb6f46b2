"""The data sets: what is known of each, one order for every source, and one line for everything that can be wrong."""

import dataclasses
import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.lib import datasets, published
from stages.lib.errors import UserError
from stages.lib.torchvision_compat import import_torchvision

TRAIN_PER_CLASS, TEST_PER_CLASS = 4, 2  # of the miniature data sets below


@pytest.fixture
def miniatures(monkeypatch):
    """Every published data set is expected with a few images per class."""
    for name, facts in published.FACTS.items():
        small = dataclasses.replace(facts, per_class=(TRAIN_PER_CLASS, TEST_PER_CLASS))
        monkeypatch.setitem(published.FACTS, name, small)


def splits_of(name, seed=0):
    """Random images and their labels, class by class: (train images, labels, test images, labels)."""
    facts, rng = published.FACTS[name], np.random.default_rng(seed)
    arrays = []
    for per_class in (TRAIN_PER_CLASS, TEST_PER_CLASS):
        labels = np.repeat(np.arange(len(facts.class_names)), per_class)
        arrays += [rng.integers(0, 256, (len(labels), *facts.shape), np.uint8), labels]
    return arrays


def write_folders(root, name, arrays, folder_names=None, suffix=".png"):
    folder_names = folder_names or [class_name.replace("/", "_") for class_name in published.FACTS[name].class_names]
    for split, images, labels in zip(("train", "test"), arrays[::2], arrays[1::2]):
        for row, (image, label) in enumerate(zip(images, labels)):
            folder = root / name / split / folder_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            options = {"lossless": True} if suffix == ".webp" else {}
            Image.fromarray(image.squeeze()).save(folder / f"{row:05d}{suffix}", **options)
    return root


def write_idx(root, arrays, seed=0, packed=False):
    """Fashion-MNIST's raw files, in another order than the folders."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, images, labels in zip(("train", "t10k"), arrays[::2], arrays[1::2]):
        order = np.random.default_rng(seed).permutation(len(labels))
        contents = {
            "images-idx3": struct.pack(">4I", 2051, len(labels), 28, 28) + images[order].tobytes(),
            "labels-idx1": struct.pack(">2I", 2049, len(labels)) + labels[order].astype(np.uint8).tobytes(),
        }
        for kind, content in contents.items():
            path = raw / f"{stem}-{kind}-ubyte"
            path.with_suffix(".gz").write_bytes(gzip.compress(content)) if packed else path.write_bytes(content)
    return root


def write_cifar10(root, arrays, monkeypatch):
    """torchvision's CIFAR-10 batches, in another order than the folders; its md5 table is made to fit them."""
    reader = import_torchvision().datasets.CIFAR10
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    def batches(files, images, labels):
        order = np.random.default_rng(1).permutation(len(labels))
        flat = images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
        return [
            [file, write(file, {"data": flat[rows], "labels": labels[rows].tolist()})]
            for file, rows in zip(files, np.array_split(order, len(files)))
        ]

    monkeypatch.setattr(reader, "train_list", batches([f"data_batch_{i}" for i in range(1, 6)], *arrays[:2]))
    monkeypatch.setattr(reader, "test_list", batches(["test_batch"], *arrays[2:]))
    names = list(published.FACTS["cifar10"].class_names)
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": write("batches.meta", {"label_names": names})})
    return root


def refusal(name, root, **options):
    """The one line with which a source is refused."""
    with pytest.raises(UserError) as caught:
        datasets.read(name, root, **{"download": False, **options})
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows_of(images, labels):
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels))


# Digits


@pytest.fixture(scope="module")
def digits():
    return datasets.read("digits", None)


def test_digits_are_the_bundled_images(digits):
    from sklearn.datasets import load_digits

    assert digits.train_images.shape == (1438, 8, 8, 1) and digits.test_images.shape == (359, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int64
    assert digits.class_names == tuple("0123456789")
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    bundled = load_digits()
    expected = np.floor(bundled.images * 255 / 16 + 0.5).astype(np.uint8)
    assert rows_of(images, labels) == rows_of(expected, bundled.target)


def test_digits_split_is_stratified_and_disjoint(digits):
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    np.testing.assert_array_equal(test, np.round((train + test) * 0.2))
    # No two of the bundled images are equal, so no image may be in both.
    assert not {image.tobytes() for image in digits.train_images} & {image.tobytes() for image in digits.test_images}


def test_digits_are_the_same_everywhere(digits):
    assert datasets.fingerprint(digits) == "914f19d9edc416e98a587549209e5b3094a211166a6d294aaba3b4b60fbb52fa"
    enlarged = datasets.read("digits", None, image_size=32)
    assert enlarged.train_images.shape == (1438, 32, 32, 1) and enlarged.train_images.flags.c_contiguous
    assert datasets.fingerprint(enlarged) == "e254c2f034aac5c29d7440f4697dc6db92d4cfca18bfca715a85d06b854ba955"


@pytest.mark.parametrize("size", [8, 13, 28, 32])
def test_enlarging_is_bilinear(digits, size):
    import torch

    images = digits.test_images[:20]
    enlarged = datasets._enlarge(images, size)
    reference = (
        torch.nn.functional.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2).double(), size, mode="bilinear")
        .permute(0, 2, 3, 1)
        .numpy()
    )
    assert np.abs(enlarged - reference).max() <= 0.5 + 1e-9
    if size == 8:
        np.testing.assert_array_equal(enlarged, images)


def test_split_does_not_depend_on_the_size(digits):
    enlarged = datasets.read("digits", None, image_size=16)
    again = datasets._enlarge(digits.test_images, 16)
    assert rows_of(enlarged.test_images, enlarged.test_labels) == rows_of(again, digits.test_labels)


# Order, subset, statistics, fingerprint


def test_order_does_not_depend_on_the_source(digits):
    images, labels = digits.train_images, digits.train_labels
    for seed in range(3):
        shuffle = np.random.default_rng(seed).permutation(len(labels))
        order = datasets.canonical_order(images[shuffle], labels[shuffle])
        assert order.dtype == np.int64
        np.testing.assert_array_equal(images[shuffle][order], images)
        np.testing.assert_array_equal(labels[shuffle][order], labels)


def test_order_is_by_the_sha256_of_label_and_image(digits):
    images, labels = digits.test_images[::-1], digits.test_labels[::-1]  # not contiguous
    digests = [
        hashlib.sha256(struct.pack("<q", label) + image.tobytes()).digest() for image, label in zip(images, labels)
    ]
    np.testing.assert_array_equal(
        datasets.canonical_order(images, labels), sorted(range(len(labels)), key=digests.__getitem__)
    )


def test_order_keeps_equal_rows_and_takes_none():
    images, labels = np.zeros((5, 2, 2, 1), np.uint8), np.array([1, 0, 1, 0, 1])
    order = datasets.canonical_order(images, labels)
    assert order[labels[order] == 0].tolist() == [1, 3] and order[labels[order] == 1].tolist() == [0, 2, 4]
    assert datasets.canonical_order(images[:0], labels[:0]).shape == (0,)


def chi_square_of_class_and_place(labels, n_places=10):
    place = np.arange(len(labels)) * n_places // len(labels)
    table = np.zeros((labels.max() + 1, n_places))
    np.add.at(table, (labels, place), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0) / len(labels)
    return ((table - expected) ** 2 / expected).sum()


CHI_SQUARE_81 = 126.1  # 99.9 % quantile at (10 - 1) * (10 - 1) degrees of freedom


def test_order_tells_nothing_of_the_class(digits):
    assert chi_square_of_class_and_place(np.sort(digits.train_labels)) > 50 * CHI_SQUARE_81  # it can tell
    assert chi_square_of_class_and_place(digits.train_labels) < CHI_SQUARE_81
    neighbours_alike = np.mean(digits.train_labels[1:] == digits.train_labels[:-1])
    assert abs(neighbours_alike - 0.1) < 0.03  # 1,437 pairs: a standard deviation is 0.008


def test_subset_takes_the_first_of_each_class_and_keeps_the_order():
    labels = np.array([2, 0, 1, 0, 2, 2, 1, 0, 1])
    images = np.zeros((9, 1, 1, 1), np.uint8)
    chosen = datasets.subset(images, labels, 2)
    assert chosen.tolist() == [0, 1, 2, 3, 4, 6] and chosen.dtype == np.int64
    np.testing.assert_array_equal(datasets.subset(images, labels, 3), np.arange(9))
    with pytest.raises(UserError, match="4 images per class: class 0 has only 3"):
        datasets.subset(images, labels, 4)
    with pytest.raises(UserError, match="at least 1"):
        datasets.subset(images, labels, 0)


def test_long_tail_falls_exponentially_from_the_first_class_to_the_last():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
    images = np.zeros((len(labels), 1, 1, 1), np.uint8)
    sizes = np.bincount(labels[datasets.subset(images, labels, None, 100)])
    assert sizes.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # as CIFAR-10-LT is usually given
    assert np.bincount(labels[datasets.subset(images, labels, 1000, 10)])[[0, -1]].tolist() == [1000, 100]
    whole = datasets.subset(images, labels, 300, 1)
    np.testing.assert_array_equal(whole, datasets.subset(images, labels, 300))
    with pytest.raises(UserError, match="5 images per class with an imbalance factor of 10: expected at least 1 of every"):
        datasets.subset(images, labels, 5, 10)


@pytest.mark.parametrize("shape", [(5000, 3, 4, 3), (7, 5, 5, 1)])
def test_channel_statistics(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mean, std = datasets.channel_statistics(images)
    assert mean.shape == std.shape == (shape[-1],) and mean.dtype == std.dtype == np.float64
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)
    shuffled = datasets.channel_statistics(np.random.default_rng(1).permutation(images))
    np.testing.assert_array_equal(shuffled, (mean, std))  # to the last bit


def test_fingerprint_sees_every_part(digits):
    seen = {datasets.fingerprint(digits)}
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        array = getattr(digits, field).copy()
        array[-1] += 1
        seen.add(datasets.fingerprint(dataclasses.replace(digits, **{field: array})))
        seen.add(datasets.fingerprint(dataclasses.replace(digits, **{field: getattr(digits, field)[::-1]})))
    seen.add(datasets.fingerprint(dataclasses.replace(digits, class_names=tuple("012345678x"))))
    assert len(seen) == 10
    assert datasets.fingerprint(dataclasses.replace(digits)) in seen


# Folders and torchvision's files


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_folders(name, tmp_path, miniatures):
    arrays = splits_of(name)
    got = datasets.read(name, write_folders(tmp_path, name, arrays), download=False)
    assert got.class_names == published.FACTS[name].class_names
    assert rows_of(got.train_images, got.train_labels) == rows_of(*arrays[:2])
    assert rows_of(got.test_images, got.test_labels) == rows_of(*arrays[2:])
    assert got.train_labels.dtype == got.test_labels.dtype == np.int64
    np.testing.assert_array_equal(
        datasets.canonical_order(got.train_images, got.train_labels), np.arange(len(got.train_labels))
    )


@pytest.mark.parametrize("suffix", [".bmp", ".webp", ".PNG"])
@pytest.mark.parametrize("folder_names", [None, [str(label) for label in range(100)]])
def test_suffixes_and_numbered_folders(suffix, folder_names, tmp_path, miniatures):
    arrays = splits_of("cifar100")  # whose folder "10" sorts before "2"
    first = datasets.read("cifar100", write_folders(tmp_path / "a", "cifar100", arrays), download=False)
    root = write_folders(tmp_path / "b", "cifar100", arrays, folder_names, suffix)
    (root / "cifar100" / "train" / ".DS_Store").write_bytes(b"")
    (root / "cifar100" / "train" / (folder_names or ["apple"])[0] / "._00000.png").write_bytes(b"")
    second = datasets.read("cifar100", root, download=False)
    assert datasets.fingerprint(first) == datasets.fingerprint(second)


@pytest.mark.parametrize("packed", [False, True])
def test_raw_fashion_mnist_equals_the_folder(packed, tmp_path, miniatures):
    arrays = splits_of("fashion_mnist")
    folder = datasets.read("fashion_mnist", write_folders(tmp_path / "a", "fashion_mnist", arrays), download=False)
    root = write_idx(tmp_path / "b", arrays, packed=packed)
    before = sorted(root.rglob("*"))
    raw = datasets.read("fashion_mnist", root, download=True)  # nothing is missing, so nothing is fetched
    for field in dataclasses.fields(folder):
        np.testing.assert_array_equal(getattr(folder, field.name), getattr(raw, field.name))
    assert datasets.fingerprint(folder) == datasets.fingerprint(raw)
    assert sorted(root.rglob("*")) == before


def test_cifar_batches_equal_the_folder(tmp_path, miniatures, monkeypatch):
    arrays = splits_of("cifar10")
    folder = datasets.read("cifar10", write_folders(tmp_path / "a", "cifar10", arrays), download=False)
    root = write_cifar10(tmp_path / "b", arrays, monkeypatch)
    assert datasets.fingerprint(datasets.read("cifar10", root, download=False)) == datasets.fingerprint(folder)
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    message = refusal("cifar10", root)
    assert "cifar-10-batches-py" in message and "corrupted" in message and "remove it" in message


def test_a_folder_goes_before_raw_files(tmp_path, miniatures):
    write_idx(tmp_path, splits_of("fashion_mnist", seed=1))
    arrays = splits_of("fashion_mnist", seed=2)
    got = datasets.read("fashion_mnist", write_folders(tmp_path, "fashion_mnist", arrays), download=False)
    assert rows_of(got.train_images, got.train_labels) == rows_of(*arrays[:2])


# What is refused


def test_unknown_name_and_size(tmp_path):
    assert all(name in refusal("imagenet", tmp_path) for name in datasets.NAMES)
    assert "32 x 32" in refusal("cifar10", tmp_path, image_size=64)
    assert "at least" in refusal("digits", None, image_size=7)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_nothing_there(name, tmp_path):
    for root in (tmp_path, tmp_path / "missing"):
        message = refusal(name, root)
        for part in (
            str(root),
            f"{name}/train",
            str(Path(published.FACTS[name].files[0]).parent),
            "BACKDOOR_DATA_ROOT",
            "runtime.yaml",
            "allow the download",
        ):
            assert part in message
    message = refusal(name, None, download=True)
    assert "BACKDOOR_DATA_ROOT" in message and name in message


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
@pytest.mark.parametrize("failure", ["no network", "corrupted"])
def test_failed_download(name, failure, tmp_path, monkeypatch):
    from urllib.error import URLError

    utils = import_torchvision().datasets.utils

    def fail(*args, **kwargs):
        raise URLError("Name or service\nnot known") if failure == "no network" else RuntimeError("File corrupted.")

    monkeypatch.setattr(utils, "download_url", fail)
    message = refusal(name, tmp_path, download=True)
    assert "download failed" in message and "BACKDOOR_DATA_ROOT" in message
    assert ("Name or service not known" if failure == "no network" else "File corrupted.") in message


def test_download_leaves_files_that_are_read_next_time(tmp_path, miniatures, monkeypatch):
    reader, arrays = import_torchvision().datasets.FashionMNIST, splits_of("fashion_mnist")

    def fetch(self):
        if not self._check_exists():
            write_idx(Path(self.root), arrays)

    monkeypatch.setattr(reader, "download", fetch)
    first = datasets.read("fashion_mnist", tmp_path)
    monkeypatch.setattr(reader, "download", None)
    assert datasets.fingerprint(datasets.read("fashion_mnist", tmp_path)) == datasets.fingerprint(first)


def test_a_download_that_is_cut_off_leaves_nothing(tmp_path, miniatures, monkeypatch):
    def fetch(self):
        write_idx(Path(self.root), splits_of("fashion_mnist"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(import_torchvision().datasets.FashionMNIST, "download", fetch)
    assert "download failed" in refusal("fashion_mnist", tmp_path, download=True)
    assert not list(tmp_path.iterdir())


def test_an_archive_that_lies_in_the_folder_is_unpacked(tmp_path, miniatures, monkeypatch):
    reader = import_torchvision().datasets.CIFAR10
    source = write_cifar10(tmp_path / "a", splits_of("cifar10"), monkeypatch)
    root = tmp_path / "b"
    root.mkdir()
    with tarfile.open(root / reader.filename, "w:gz") as archive:
        archive.add(source / reader.base_folder, reader.base_folder)
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5((root / reader.filename).read_bytes()).hexdigest())
    found = datasets.fingerprint(datasets.read("cifar10", root, download=True))
    assert found == datasets.fingerprint(datasets.read("cifar10", source, download=False))
    assert datasets.fingerprint(datasets.read("cifar10", root, download=False)) == found
    assert sorted(path.name for path in root.iterdir()) == [reader.base_folder, reader.filename]


def test_unreadable_folder(tmp_path, monkeypatch):
    (tmp_path / "cifar10" / "train").mkdir(parents=True)

    def deny(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("stages.lib.image_folder.os.scandir", deny)
    message = refusal("cifar10", tmp_path)
    assert str(tmp_path / "cifar10" / "train") in message and "Permission denied" in message


@pytest.fixture
def cifar10_folders(tmp_path, miniatures):
    return write_folders(tmp_path, "cifar10", splits_of("cifar10"))


def damage_png(folder):
    path = next((folder / "train" / "frog").iterdir())
    path.write_bytes(path.read_bytes()[:60])
    return path


def not_an_image(folder):
    path = folder / "test" / "ship" / "00017.png"
    path.write_bytes(b"<html>404</html>")
    return path


def wrong_size(folder):
    path = next((folder / "train" / "cat").iterdir())
    Image.new("RGB", (64, 32)).save(path)
    return path


def sixteen_bit(folder):
    path = next((folder / "train" / "cat").iterdir())
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(path)
    return path


@pytest.mark.parametrize(
    "break_image, says",
    [
        (damage_png, "cannot read"),
        (not_an_image, "cannot read"),
        (wrong_size, "64 x 32 pixels, expected 32 x 32"),
        (sixteen_bit, "8 bits"),
    ],
)
def test_bad_image_is_named(break_image, says, cifar10_folders):
    path = break_image(cifar10_folders / "cifar10")
    message = refusal("cifar10", cifar10_folders)
    assert str(path) in message and says in message


def image_too_few(folder):
    next((folder / "train" / "deer").iterdir()).unlink()
    return "39 images, 3 of class 'deer'; expected 40, 4 of each of 10 classes"


def image_too_many(folder):
    Image.new("RGB", (32, 32)).save(folder / "test" / "dog" / "extra.png")
    return "21 images, 3 of class 'dog'; expected 20, 2 of each of 10 classes"


def empty_class(folder):
    for path in (folder / "train" / "horse").iterdir():
        path.unlink()
    return str(folder / "train" / "horse")


def missing_class(folder):
    (folder / "train" / "truck").rename(folder / "truck")
    return "9 class folders, without 'truck'"


def foreign_class(folder):
    (folder / "train" / "truck").rename(folder / "train" / "lorry")
    return "unknown 'lorry', without 'truck'"


def no_test(folder):
    (folder / "test").rename(folder / "validation")
    return str(folder / "test")


def no_classes(folder):
    (folder / "test").rename(folder / "validation")
    (folder / "test").mkdir()
    return "holds no class folders"


@pytest.mark.parametrize(
    "change", [image_too_few, image_too_many, empty_class, missing_class, foreign_class, no_test, no_classes]
)
def test_another_folder_is_refused(change, cifar10_folders):
    says = change(cifar10_folders / "cifar10")
    message = refusal("cifar10", cifar10_folders)
    assert says in message and "cifar10" in message


def idx_truncated(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])


def idx_of_another_kind(raw):
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"<html>404</html>")


def idx_labels_too_many(raw):
    path = raw / "t10k-labels-idx1-ubyte"
    path.write_bytes(struct.pack(">2I", 2049, 21) + bytes(21))


def idx_label_out_of_range(raw):
    path = raw / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([10]))


@pytest.mark.parametrize("damage", [idx_truncated, idx_of_another_kind, idx_labels_too_many, idx_label_out_of_range])
def test_damaged_raw_files(damage, tmp_path, miniatures):
    write_idx(tmp_path, splits_of("fashion_mnist"))
    damage(tmp_path / "FashionMNIST" / "raw")
    assert str(tmp_path / "FashionMNIST" / "raw") in refusal("fashion_mnist", tmp_path)


def test_damaged_gz(tmp_path, miniatures):
    write_idx(tmp_path, splits_of("fashion_mnist"), packed=True)
    path = tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in refusal("fashion_mnist", tmp_path)


def test_real_counts_are_expected(tmp_path):
    write_idx(tmp_path, splits_of("fashion_mnist"))
    assert "40 images, 4 of class 'T-shirt/top'; expected 60,000, 6,000 of each" in refusal("fashion_mnist", tmp_path)


# torchvision


def test_torchvision_imports():
    torchvision = import_torchvision()
    assert import_torchvision() is torchvision and hasattr(torchvision.datasets, "CIFAR10")


def test_only_the_missing_operator_is_mended(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::roi_align does not exist")

    monkeypatch.setattr("stages.lib.torchvision_compat.importlib.import_module", fail)
    with pytest.raises(RuntimeError, match="roi_align"):
        import_torchvision()


def test_importing_datasets_leaves_torch_alone():
    code = (
        "import sys; from stages.lib import datasets; datasets.read('digits', None); "
        "sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=100).returncode == 0


# The real data sets


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, n_classes, counts, shape, mean",
    [
        ("cifar10", 10, (50_000, 10_000), (32, 32, 3), (0.4914, 0.4822, 0.4465)),
        ("cifar100", 100, (50_000, 10_000), (32, 32, 3), (0.5071, 0.4865, 0.4409)),
        ("fashion_mnist", 10, (60_000, 10_000), (28, 28, 1), (0.2860,)),
    ],
)
def test_real_data_set(name, n_classes, counts, shape, mean):
    if "BACKDOOR_DATA_ROOT" not in os.environ:
        pytest.skip("BACKDOOR_DATA_ROOT does not say where the real data sets are")
    dataset = datasets.read(name, Path(os.environ["BACKDOOR_DATA_ROOT"]), download=False)
    assert dataset.train_images.shape == (counts[0], *shape) and dataset.test_images.shape == (counts[1], *shape)
    for labels, count in ((dataset.train_labels, counts[0]), (dataset.test_labels, counts[1])):
        np.testing.assert_array_equal(np.bincount(labels), np.full(n_classes, count // n_classes))
    # The published means; a copy of CIFAR-100 that went through JPEG is off by up to 2e-4.
    tolerance = 3e-4 if name == "cifar100" else 6e-5
    np.testing.assert_allclose(datasets.channel_statistics(dataset.train_images)[0], mean, rtol=0, atol=tolerance)
    if n_classes == 10:
        assert chi_square_of_class_and_place(dataset.train_labels) < CHI_SQUARE_81
