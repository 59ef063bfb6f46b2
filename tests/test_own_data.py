"""A user's own images: what is read, in which order, and one line for everything that can be wrong with them."""

import csv
import os
import pickle
import shutil
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from stages.lib import export_folder, image_folder, own_data, params, stage, storage
from stages.lib.errors import UserError


def picture(size, seed=0, grey=False):
    shape = (size[1], size[0]) if grey else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def fill(root, n=4, classes=("cat", "dog"), split="train", size=(40, 30), suffix=".png", grey=False):
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture(size, 100 * label + i, grey).save(folder / f"{i}{suffix}")
    return root


def read(source, tmp_path, kind="folder", **options):
    """The notes, and the data set as a dict of arrays."""
    out = tmp_path / "data.h5"
    notes = own_data.write(params.Data(kind, path=str(source), **{"image_size": 32} | options), source, out)
    with storage.open_(out, "dataset") as file:
        found = {
            name: file[name][:]
            for name in (f"{p}/{w}" for p in ("train", "test") for w in ("images", "labels", "files"))
        }
        found["skipped"] = [line.decode() for line in file["skipped"][:]]
        found |= dict(file.attrs)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [], (
        "no temporary file stays"
    )
    return notes, found


# What is read


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff", ".ppm", ".PNG"])
def test_every_suffix(tmp_path, suffix):
    _, found = read(fill(tmp_path / "own", suffix=suffix), tmp_path)
    assert found["train/images"].shape == (8, 32, 32, 3) and len(found["train/files"]) == 8


def test_sizes_colours_names_and_labels(tmp_path):
    root = fill(fill(tmp_path / "own", size=(100, 20)), n=1, split="test", classes=("dog",))
    picture((17, 90), 5, grey=True).save(root / "train/cat/=cmd|' grün.png")
    picture((64, 64)).convert("P").save(root / "train/cat/palette.png")
    picture((64, 64)).convert("RGBA").save(root / "train/cat/alpha.png")
    notes, found = read(root, tmp_path)
    assert found["train/images"].shape == (11, 32, 32, 3) and found["test/images"].shape == (1, 32, 32, 3)
    names = [name.decode() for name in found["train/files"]]
    assert {name.split("/")[1] for name in names} == {"cat", "dog"} and "train/cat/=cmd|' grün.png" in names
    for name, label, image in zip(names, found["train/labels"], found["train/images"], strict=True):
        assert name.split("/")[1] == ("cat", "dog")[label]
        np.testing.assert_array_equal(image, image_folder.read_resized(root / name, 32)[0])
    assert found["class_names"] == '["cat", "dog"]' and found["test/labels"].tolist() == [1]
    assert (
        "11 training and 1 test images of 2 classes, colour; " in notes[0] and "brought to 32 x 32 without" in notes[0]
    )
    np.testing.assert_allclose(found["mean"], found["train/images"].mean((0, 1, 2)) / 255)
    np.testing.assert_allclose(found["std"], found["train/images"].std((0, 1, 2)) / 255)


def test_grey_images_stay_grey(tmp_path):
    _, found = read(fill(tmp_path / "own", grey=True), tmp_path)
    assert found["train/images"].shape == (8, 32, 32, 1) and found["mean"].shape == (1,)


def test_class_folders_without_a_train_folder(tmp_path):
    _, found = read(fill(tmp_path / "own", split=""), tmp_path)
    assert found["train/files"][0].decode().split("/")[0] in ("cat", "dog")


def test_order_tells_nothing_and_bytes_repeat(tmp_path):
    root = fill(tmp_path / "own", n=40)
    _, found = read(root, tmp_path)
    first = (tmp_path / "data.h5").read_bytes()
    assert (np.diff(found["train/labels"]) != 0).sum() > 20  # not class by class
    read(root, tmp_path)
    assert (tmp_path / "data.h5").read_bytes() == first
    shutil.move(root, tmp_path / "elsewhere")
    read(tmp_path / "elsewhere", tmp_path)
    assert (tmp_path / "data.h5").read_bytes() == first, "where the folder lies is not part of the data"


def test_held_out_split(tmp_path):
    root = fill(tmp_path / "own", n=10)
    notes, found = read(root, tmp_path, test_fraction=0.2)
    assert np.bincount(found["train/labels"]).tolist() == [8, 8] and np.bincount(found["test/labels"]).tolist() == [
        2,
        2,
    ]
    assert not set(found["train/files"]) & set(found["test/files"])
    assert any("4 of the training images are held out as test images: they are not scored" in note for note in notes)
    _, found = read(root, tmp_path)
    assert len(found["test/labels"]) == 0 and len(found["train/labels"]) == 20
    _, found = read(fill(root, n=3, split="test"), tmp_path, test_fraction=0.2)
    assert len(found["test/labels"]) == 6 and len(found["train/labels"]) == 20, "a test folder comes first"


# A patch survives


@pytest.mark.parametrize(("size", "patch"), [((128, 128), 6), ((256, 200), 8), ((40, 30), 3)])
def test_a_corner_patch_survives_the_default_size(size, patch):
    """Of a patch that is at least 2 % of the side, the corner pixel keeps its full contrast; nothing is cropped."""
    image = Image.new("RGB", size, (90, 90, 90))
    image.paste((255, 255, 255), (size[0] - patch, size[1] - patch, *size))
    small = image_folder.resized(image, own_data.DEFAULT_IMAGE_SIZE)
    assert small[-1, -1].min() >= 250 and small[0, 0].max() == 90


def test_no_pixel_is_stepped_over():
    """A single pixel in a large image keeps its share of the light, wherever it lies."""
    dark = np.zeros((256, 256, 3), np.uint8)
    for y, x in [(0, 0), (101, 37), (255, 255)]:
        image = dark.copy()
        image[y, x] = 255
        assert image_folder.resized(Image.fromarray(image), 64).max() == 16  # 255 / 4^2


# Passed over, and said so


def test_what_cannot_be_used_is_listed_and_skipped(tmp_path):
    root = fill(tmp_path / "own", n=20)
    (root / "train/cat/3.png").write_bytes(b"no image")
    whole = (root / "train/cat/4.png").read_bytes()
    (root / "train/cat/4.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(root / "train/cat/5.png")
    (root / "train/dog/6.png").write_bytes(b"")
    (root / "train/dog/notes.txt").write_text("x")
    (root / "train/dog/deeper").mkdir()
    (root / "train/stray.png").write_bytes(b"x")
    (root / "train/cat/new\nline.png").write_bytes(whole)
    (root / "train/cat/.hidden.png").write_bytes(b"x")
    (root / "train/cat/.DS_Store").write_bytes(b"x")
    (root / "train/.hid").mkdir()
    (root / "train/cat/postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with open(os.fsencode(root / "train/cat") + b"/\xff.png", "wb") as file:
        file.write(whole)
    notes, found = read(root, tmp_path)
    assert len(found["train/labels"]) == 40 - 4
    reasons = dict(line.split(": ", 1) for line in found["skipped"])
    assert "train/cat/new\\nline.png" in reasons and "train/cat/\\udcff.png" in reasons
    assert "cannot identify" in reasons["train/cat/3.png"] and "truncated" in reasons["train/cat/4.png"]
    assert reasons["train/cat/5.png"] == "more than 8 bits per channel (mode I;16)"
    assert "train/dog/6.png" in reasons and "cannot identify" in reasons["train/cat/postscript.png"]
    assert reasons["train/dog/notes.txt"].startswith("not an image by its suffix")
    assert reasons["train/stray.png"] == "not in a class folder" and "train/dog/deeper" in reasons
    assert sum("control characters or is not UTF-8" in line for line in found["skipped"]) == 2
    assert reasons["train/cat/.hidden.png"] == reasons["train/.hid"]
    assert reasons["train/.hid"] == "its name begins with a dot; torchvision's ImageFolder would read it"
    assert len(found["skipped"]) == 12 and not any(".DS_Store" in line for line in found["skipped"])
    assert (
        "12 entries skipped, neither trained on nor scored:" in notes
        and "  train/stray.png: not in a class folder" in notes
    )
    assert all("\n" not in note for note in notes)


def test_what_lies_beside_the_training_images_is_named(tmp_path):
    root = fill(tmp_path / "own")
    for name in ("val", "bird", "owl"):
        fill(root, n=1, split=name)
    notes, _ = read(root, tmp_path)
    left = [note for note in notes if "is left out: neither trained on nor scored" in note]
    assert left == [f"{root / name} is left out: neither trained on nor scored" for name in ("bird", "owl", "val")]


def test_a_class_may_be_called_train(tmp_path):
    _, found = read(fill(tmp_path / "own", classes=("bus", "car", "train"), split=""), tmp_path)
    assert sorted(found["train/labels"].tolist()) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "val")])
def test_splits_by_other_names_are_no_classes(tmp_path, names):
    root = fill(tmp_path / "own")
    shutil.move(root / "train", root / names[0])
    shutil.copytree(root / names[0], root / names[1])
    assert f"holds {', '.join(sorted(names))}, and no folder `train`: rename" in refusal(root, tmp_path)


def test_images_without_classes_are_no_two_classes(tmp_path):
    root = fill(tmp_path / "own", classes=("train", "test"), split="")
    assert "holds no class folders" in refusal(root, tmp_path)


def test_a_long_list_is_cut_in_the_log_alone(tmp_path):
    root = fill(tmp_path / "own")
    for i in range(30):
        (root / f"train/cat/{i}.txt").write_text("x")
    notes, found = read(root, tmp_path)
    assert notes[-1] == "  … and 10 more" and len(found["skipped"]) == 30


def test_links(tmp_path):
    root, outside = fill(tmp_path / "own"), fill(tmp_path / "outside", classes=("cat", "owl"))
    (root / "train/cat/out.png").symlink_to(outside / "train/cat/0.png")
    (root / "train/cat/in.png").symlink_to(root / "train/dog/0.png")
    (root / "train/owl").symlink_to(outside / "train/owl")
    (root / "train/cat/dangling.png").symlink_to(root / "nothing.png")
    _, found = read(root, tmp_path)
    names = [name.decode() for name in found["train/files"]]
    assert "train/cat/in.png" in names and "train/cat/out.png" not in names and found["class_names"] == '["cat", "dog"]'
    assert sum("a link that leaves" in line for line in found["skipped"]) == 2
    assert any(line.startswith("train/cat/dangling.png: ") for line in found["skipped"])
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert read(linked, tmp_path)[1]["train/files"].tolist() == found["train/files"].tolist(), (
        "the folder may be a link"
    )


def test_a_class_with_one_image_is_named(tmp_path):
    root = fill(tmp_path / "own", n=10)
    (root / "train/owl").mkdir()
    picture((9, 9)).save(root / "train/owl/only.png")
    notes, _ = read(root, tmp_path, test_fraction=0.5)
    assert "class 'owl' has one image, train/owl/only.png: it cannot be judged" in notes


# Refused


def refusal(source, tmp_path, kind="folder", **options):
    with pytest.raises(UserError) as caught:
        read(source, tmp_path, kind, **options)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    return str(caught.value)


def test_refused_folders(tmp_path):
    assert "no folder" in refusal(tmp_path / "missing", tmp_path)
    root = fill(tmp_path / "own")
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.write(root / "train/cat/0.png")
    assert "own.zip is an archive: unpack it and give the folder" in refusal(tmp_path / "own.zip", tmp_path)
    assert "is a file: give the folder" in refusal(root / "train/cat/0.png", tmp_path)
    (root / "train/empty").mkdir()
    assert "empty holds no images" in refusal(root, tmp_path)
    (root / "train/empty/broken.png").write_bytes(b"x")
    message = refusal(root, tmp_path)
    assert "train/empty holds no image that can be read" in message and "broken.png (cannot identify" in message
    shutil.rmtree(root / "train/empty")
    fill(root, n=1, split="test", classes=("owl",))
    assert "test/owl is no class of" in refusal(root, tmp_path)
    assert "holds no class folders" in refusal(tmp_path / "own/train/cat", tmp_path)
    links = fill(tmp_path / "links")
    for name in ("0.png", "1.png", "2.png", "3.png"):
        (links / "train/dog" / name).unlink()
        (links / "train/dog" / name).symlink_to(root / "train/dog" / name)
    message = refusal(links, tmp_path)
    assert "train/dog holds no images" in message and "fill it or remove it" not in message
    assert f"train/dog/0.png: a link that leaves {links} (and 3 more)" in message
    one = fill(tmp_path / "one", classes=("cat",))
    assert "holds one class" in refusal(one, tmp_path)


def test_a_train_folder_that_leads_away(tmp_path):
    fill(tmp_path / "other")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train").symlink_to(tmp_path / "other/train")
    assert "is a link that leaves" in refusal(tmp_path / "own", tmp_path)


def test_a_million_classes_by_mistake(tmp_path):
    root = fill(tmp_path / "own", n=1, classes=[f"photo{i}" for i in range(30)])
    assert "30 classes with 30 images" in refusal(root, tmp_path)
    with pytest.raises(UserError, match=r"1,000,000 classes with 3,000,000 images"):
        own_data.check_classes(np.full(10**6, 3), "x")


def test_a_folder_that_changes_meanwhile(tmp_path, monkeypatch):
    root, plain = fill(tmp_path / "own"), image_folder.read_resized

    def adding(path, size):
        picture((9, 9)).save(root / "train/dog/late.png")
        return plain(path, size)

    monkeypatch.setattr(image_folder, "read_resized", adding)
    assert "changed while it was read: nothing was written" in refusal(root, tmp_path)


def test_a_folder_that_changes_while_the_data_set_is_written(tmp_path, monkeypatch):
    root, plain = fill(tmp_path / "own"), own_data._write

    def adding(*args):
        plain(*args)
        picture((9, 9)).save(root / "train/dog/late.png")

    monkeypatch.setattr(own_data, "_write", adding)
    assert "changed while it was read: nothing was written" in refusal(root, tmp_path)
    out, spec = tmp_path / "out/data.h5", params.Data(source="folder", path=str(root))
    with pytest.raises(UserError, match="changed"), stage.Outputs([out], []) as temporary:
        own_data.write(spec, root, temporary[out])
    assert not list(out.parent.iterdir())


def test_a_validation_folder_is_left_out_and_that_is_said(tmp_path):
    root = fill(tmp_path / "own")
    (root / "val/dog").mkdir(parents=True)
    picture((9, 9)).save(root / "val/dog/a.png")
    spec = params.Data(source="folder", path=str(root))
    assert any("val is left out" in line for line in own_data.write(spec, root, tmp_path / "data.h5"))


# NumPy archives


def arrays(n=12, shape=(28, 28), classes=3, **changes):
    generator = np.random.default_rng(0)
    found = {}
    for split, count in (("train", n), ("test", 6)):
        found[f"{split}_images"] = generator.integers(0, 256, (count, *shape), np.uint8)
        found[f"{split}_labels"] = (np.arange(count) % classes)[:, None].astype(np.uint8)
    return {name: value for name, value in (found | changes).items() if value is not None}


@pytest.mark.parametrize(("shape", "channels"), [((28, 28), 1), ((28, 28, 1), 1), ((20, 36, 3), 3)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archive(tmp_path, shape, channels, save):
    content = arrays(shape=shape)
    save(tmp_path / "own.npz", **content)
    notes, found = read(tmp_path / "own.npz", tmp_path, "npz")
    assert found["train/images"].shape == (12, 32, 32, channels) and found["test/images"].shape == (6, 32, 32, channels)
    for name, label, image in zip(found["train/files"], found["train/labels"], found["train/images"], strict=True):
        row = int(name.decode().removeprefix("train_images[").removesuffix("]"))
        assert label == content["train_labels"][row, 0]
        original = Image.fromarray(content["train_images"][row].squeeze())
        np.testing.assert_array_equal(image, image_folder.resized(original, 32)[..., :channels])
    assert notes[0].startswith("npz: 12 training and 6 test images of 3 classes")


def test_archive_with_other_splits(tmp_path):
    content = arrays(classes=3)
    content["train_labels"] = content["train_labels"].astype(int) * 10 - 3
    content |= {
        "val_images": content.pop("test_images"),
        "val_labels": content.pop("test_labels").astype(int) * 10 - 3,
    }
    np.savez(tmp_path / "own.npz", **content)
    _, found = read(tmp_path / "own.npz", tmp_path, "npz")
    assert found["class_names"] == '["-3", "7", "17"]' and found["test/files"][0].startswith(b"val_images[")
    for name in ("val_images", "val_labels"):
        content.pop(name)
    np.savez(tmp_path / "own.npz", **content)
    assert len(read(tmp_path / "own.npz", tmp_path, "npz", test_fraction=0.25)[1]["test/labels"]) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": None}, "holds no array train_images"),
        ({"train_labels": None}, "holds no array train_labels"),
        ({"test_labels": None}, "holds no array test_labels"),
        ({"train_labels": np.zeros(11, int)}, "train_labels has 11 rows, train_images has 12"),
        ({"train_labels": np.zeros((12, 14), int)}, "one integer for each image"),
        ({"train_labels": np.zeros(12)}, "one integer for each image"),
        ({"train_labels": np.array(["cat"] * 12, object)}, "train_labels holds pickled Python objects"),
        ({"train_images": np.array([None] * 12, object)}, "train_images holds pickled Python objects"),
        ({"train_images": np.zeros((12, 28, 28), np.float32)}, "expected (N, H, W) or (N, H, W, 1 or 3) uint8"),
        ({"train_images": np.zeros((12, 28, 28, 28), np.uint8)}, "expected (N, H, W) or (N, H, W, 1 or 3) uint8"),
        ({"train_images": np.zeros((28, 28, 12), np.uint8).T}, "stored column by column"),
        ({"test_labels": np.full(6, 9)}, "test_labels hold 9, which train_labels do not"),
        ({"train_labels": np.arange(12)}, "12 classes with 12 images"),
        ({"train_labels": np.zeros(12, int)}, "holds one class"),
    ],
)
def test_refused_archives(tmp_path, changes, words):
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    message = refusal(tmp_path / "own.npz", tmp_path, "npz")
    assert words in message and "own.npz" in message


def test_an_archive_that_is_none(tmp_path):
    assert "no file" in refusal(tmp_path / "own.npz", tmp_path, "npz")
    (tmp_path / "own.npz").write_bytes(pickle.dumps(arrays()))
    assert "is no .npz archive" in refusal(tmp_path / "own.npz", tmp_path, "npz")
    np.savez(tmp_path / "own.npz", **arrays())
    content = (tmp_path / "own.npz").read_bytes()
    (tmp_path / "own.npz").write_bytes(content[: len(content) // 2])
    assert "cut short" in refusal(tmp_path / "own.npz", tmp_path, "npz")
    damaged = bytearray(content)
    damaged[3000] ^= 255  # within the images, whose checksum is then wrong
    (tmp_path / "own.npz").write_bytes(damaged)
    assert "train_images is damaged" in refusal(tmp_path / "own.npz", tmp_path, "npz")
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder: set data.source to folder" in refusal(tmp_path / "folder.npz", tmp_path, "npz")


# Parameters and the stage


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "folder"}, "data.path is missing"),
        ({"source": "npz", "path": "x", "image_size": 16}, "image_size is 16; expected a whole number in [32, 224]"),
        ({"source": "folder", "path": "x", "image_size": 250}, "image_size is 250"),
        ({"source": "folder", "path": "x", "pad_to": 64}, "data.pad_to does not go with the source folder"),
        ({"source": "folder", "path": "x", "train_per_class": 64}, "data.train_per_class does not go with"),
        ({"source": "folder", "path": "x", "test_fraction": 0.95}, "test_fraction is 0.95"),
        ({"source": "digits", "path": "x"}, "data.path belongs to the sources folder and npz"),
        ({"source": "digits", "test_fraction": 0.1}, "data.test_fraction belongs to"),
    ],
)
def test_refused_settings(tmp_path, write_params, refuses, data, words):
    write_params(tmp_path / "params.yaml", own={})
    content = (tmp_path / "params.yaml").read_text()
    start = content.index("    data:\n")
    end = content.index("    model:\n")
    block = "    data:\n" + "".join(f"      {key}: {value}\n" for key, value in data.items())
    (tmp_path / "params.yaml").write_text(content[:start] + block + content[end:])
    with refuses(words):
        params.setting(tmp_path / "params.yaml", "own")


def own_params(write_params, folder, path, **train):
    """A parameter file with a one-epoch setting `own` for the folder at `path`."""
    import yaml

    file = write_params(folder / "params.yaml", own={"train": {"batch_size": 16} | train})
    content = yaml.safe_load(file.read_text())
    content["settings"]["own"] |= {
        "data": {"source": "folder", "path": str(path), "image_size": 32},
        "poison": {"trigger": {"name": "none"}, "poison_fraction": None},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def test_stages_on_a_folder(tmp_path, command, write_params):
    """prepare, an empty poison index, one epoch, features: in the order of the data set."""
    root = fill(fill(tmp_path / "own", n=20), n=3, split="test")
    own_params(write_params, tmp_path, root)
    for words in (
        "prepare --setting own --out data.h5",
        "poison --setting own --seed 0 --data data.h5 --out poison.h5",
        "train --setting own --seed 0 --data data.h5 --index poison.h5 --rows all --out model.pt",
        "extract --data data.h5 --index poison.h5 --checkpoint model.pt --out features.h5",
    ):
        ended = command(*words.split(), cwd=tmp_path)
        assert ended.status == 0, ended.err
    with storage.open_(tmp_path / "features.h5", "features") as dump, h5py.File(tmp_path / "data.h5") as data:
        assert dump["features"].shape == (40, 64) and np.isnan(dump.attrs["poison_fraction"])
        np.testing.assert_array_equal(dump["labels"][:], data["train/labels"][:])


def test_the_stage_says_one_line_and_writes_nothing(tmp_path, command, write_params):
    own_params(write_params, tmp_path, tmp_path / "missing")
    ended = command("prepare", "--setting", "own", "--out", "data.h5", cwd=tmp_path)
    assert ended.status == 1 and ended.err.count("\n") == 1 and "missing" in ended.err
    assert not (tmp_path / "data.h5").exists()


# The folder that `poison` writes


@pytest.fixture(scope="module")
def exported(tmp_path_factory, command, write_params):
    folder = tmp_path_factory.mktemp("exported")
    write_params(folder / "params.yaml", tiny={})
    assert command("prepare", "--setting", "tiny", "--out", "data.h5", cwd=folder).status == 0
    words = "poison --setting tiny --seed 3 --data data.h5 --out poison.h5 --export-folder pictures"
    ended = command(*words.split(), cwd=folder)
    assert ended.status == 0, ended.err
    assert "250 images in pictures, and which are poisoned in pictures-truth.csv" in ended.out
    return folder


def test_exported_images_are_those_of_the_victim(exported):
    from stages.lib.poisoning import open_poisoned

    poisoned = open_poisoned(exported / "data.h5", exported / "poison.h5")
    train = poisoned.train()
    with open(exported / "pictures-truth.csv", newline="") as file:
        truth = {int(line["file"][-11:-4]): line for line in csv.DictReader(file)}
    assert len(truth) == 200 and sorted(truth) == list(range(200))
    for row, line in truth.items():
        with Image.open(exported / "pictures" / line["file"]) as image:
            np.testing.assert_array_equal(np.asarray(image), train.images[row, ..., 0])
        assert line["file"].split("/")[1] == line["label_after"] == str(train.labels[row])
    roles = np.array([truth[row]["role"] == "poison" for row in range(200)])
    np.testing.assert_array_equal(roles, poisoned.index.poisoned)
    assert all(
        line["label_before"] != "2" and line["label_after"] == "2"
        for line in truth.values()
        if line["role"] == "poison"
    )
    assert len(list((exported / "pictures/test").rglob("*.png"))) == 50


def test_an_export_is_audited_as_it_is(exported, tmp_path):
    _, found = read(exported / "pictures", tmp_path)
    assert found["train/images"].shape == (200, 32, 32, 1) and not found["skipped"]


def test_exports_that_are_refused(exported, tmp_path, refuses):
    with refuses("is there and not an empty folder"):
        export_folder.check_target(exported / "pictures", tmp_path / "truth.csv")
    with refuses("where an audit would find it"):
        export_folder.check_target(tmp_path / "new", tmp_path / "new" / "truth.csv")
    with refuses("is there already"):
        export_folder.check_target(tmp_path / "new", exported / "pictures-truth.csv")
