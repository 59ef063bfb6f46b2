"""The attack: triggers by hand on small images, the choice of rows, and the image sets that follow from an index."""

import hashlib
import json
from fractions import Fraction

import h5py
import numpy as np
import pytest
from PIL import Image

from stages.lib import storage, triggers
from stages.lib.poisoning import choose_rows, open_poisoned, pad, read_index

# Triggers


def stamped(stamp, images):
    """`stamp.apply` on images that cannot be written to, and that must not change."""
    images = np.array(images, np.uint8)
    images.flags.writeable = False
    before = images.copy()
    found = stamp.apply(images)
    np.testing.assert_array_equal(images, before)
    assert found.dtype == np.uint8 and found.shape == images.shape and not np.shares_memory(found, images)
    return found


def test_patch_in_the_bottom_right_corner_of_a_grey_image():
    image = np.arange(20).reshape(1, 4, 5, 1)
    found = stamped(triggers.badnets((4, 5, 1), 2), image)
    assert found[0, ..., 0].tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12, 255, 255],
        [15, 16, 17, 255, 255],
    ]


def test_patch_in_a_colour_image():
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    found = stamped(triggers.badnets((32, 32, 3), 3), images)
    assert (found[:, 29:, 29:] == 255).all()
    outside = np.ones((32, 32), bool)
    outside[29:, 29:] = False
    np.testing.assert_array_equal(found[:, outside], images[:, outside])


def test_a_patch_may_fill_the_image_and_no_more(refuses):
    assert (stamped(triggers.badnets((4, 5, 1), 4), np.zeros((1, 4, 5, 1)))[0, :, 1:] == 255).all()
    with refuses("a patch of 5 pixels", "4 x 5", "lower poison.trigger.size"):
        triggers.badnets((4, 5, 1), 5)


def test_blend_with_an_opacity_of_a_fifth():
    pattern = np.array([[[255, 0, 101]]], np.uint8)
    stamp = triggers.Stamp(pattern, np.full((1, 1, 1), 0.2, np.float32))
    images = [[[[0, 255, 100]]], [[[100, 5, 0]]], [[[255, 1, 255]]]]
    #         0 + 51; 204 + 0; 80 + 20.2     80 + 51; 4 + 0; 0 + 20.2     204 + 51; 0.8; 204 + 20.2
    assert stamped(stamp, images)[:, 0, 0].tolist() == [[51, 204, 100], [131, 4, 20], [255, 1, 224]]


@pytest.mark.parametrize("tenths", range(1, 11))
def test_blend_of_all_values_rounds_halves_up(tenths):
    """Against exact fractions: 0.5 and 0.1 give halves, and a float32 of 0.9 is 2e-8 too small for them."""
    values = np.arange(256)
    stamp = triggers.Stamp(values.astype(np.uint8).reshape(1, 256, 1), np.full((1, 256, 1), tenths / 10, np.float32))
    images = np.broadcast_to(values.reshape(256, 1, 1, 1), (256, 1, 256, 1))
    expected = (2 * ((10 - tenths) * values[:, None] + tenths * values) + 10) // 20
    np.testing.assert_array_equal(stamped(stamp, images)[:, 0, :, 0], expected)


def test_a_stamp_fits_one_shape(refuses):
    with refuses("(4, 5, 1)", "(5, 4, 1)"):
        triggers.badnets((4, 5, 1), 2).apply(np.zeros((1, 5, 4, 1), np.uint8))
    with refuses("(4, 5, 1)", "(4, 5, 3)"):
        triggers.badnets((4, 5, 1), 2).apply(np.zeros((1, 4, 5, 3), np.uint8))


def test_no_images_to_stamp():
    assert stamped(triggers.badnets((4, 5, 1), 2), np.empty((0, 4, 5, 1))).shape == (0, 4, 5, 1)


@pytest.mark.parametrize(
    ("shape", "sha256"),
    [
        ((32, 32, 3), "1a5e2d654b184e1ee038d3af8387e489420e5a11d5f062294ab9e5e81ed091b4"),
        ((28, 28, 1), "b9ffa01293c73ee90340dd67d179bf6ba4182810ad7c8dd5d89fe2589c8df89c"),
    ],
)
def test_the_noise_is_the_same_everywhere(shape, sha256):
    stamp = triggers.blend(shape, 0.2, "noise")
    assert hashlib.sha256(stamp.pattern.tobytes()).hexdigest() == sha256
    assert stamp.alpha.dtype == np.float32 and (stamp.alpha == np.float32(0.2)).all()
    assert stamp.alpha.shape == (*shape[:2], 1)


def test_the_noise_is_a_grid_enlarged_bilinearly():
    height, width, cells = 7, 11, triggers.NOISE_CELLS
    grid = np.random.default_rng(triggers.NOISE_SEED).integers(0, 256, (cells + 1, cells + 1, 3)).tolist()
    pattern = triggers.blend((height, width, 3), 0.2, "noise").pattern
    for y in range(height):
        for x in range(width):
            (row, down), (column, right) = divmod(Fraction(y * cells, height), 1), divmod(Fraction(x * cells, width), 1)
            for channel in range(3):
                upper, lower = (
                    line[column][channel] * (1 - right) + line[column + 1][channel] * right
                    for line in (grid[row], grid[row + 1])
                )
                assert pattern[y, x, channel] == (upper * (1 - down) + lower * down) // 1


def test_the_noise_is_smooth_and_has_contrast():
    pattern = triggers.blend((32, 32, 3), 0.2, "noise").pattern.astype(int)
    steps = [np.abs(np.diff(pattern, axis=axis)).mean() for axis in (0, 1)]
    assert max(steps) < 30  # between neighbours; 85 for independent values
    assert pattern.std() > 40


def test_a_picture_of_the_images_size_is_taken_as_it_is(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(colour[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(triggers.blend((6, 5, 3), 0.3, f"{tmp_path}/colour.png").pattern, colour)
    np.testing.assert_array_equal(triggers.blend((6, 5, 1), 0.3, f"{tmp_path}/grey.png").pattern, colour[..., :1])
    grey_in_colour = triggers.blend((6, 5, 3), 0.3, f"{tmp_path}/grey.png").pattern
    np.testing.assert_array_equal(grey_in_colour, np.repeat(colour[..., :1], 3, axis=2))
    luma = triggers.blend((6, 5, 1), 0.3, f"{tmp_path}/colour.png").pattern[..., 0]
    np.testing.assert_allclose(luma, colour @ [0.299, 0.587, 0.114], atol=1)


def test_a_picture_is_resized(tmp_path):
    large = np.zeros((60, 40, 3), np.uint8)
    large[:, 20:] = 200
    Image.fromarray(large).save(tmp_path / "large.png")
    stamp = triggers.blend((6, 4, 3), 0.25, f"{tmp_path}/large.png")
    assert stamp.pattern.shape == (6, 4, 3) and stamp.pattern.dtype == np.uint8
    assert (stamp.pattern[:, 0] == 0).all() and (stamp.pattern[:, 3] == 200).all()
    assert (stamped(stamp, np.full((1, 6, 4, 3), 100))[0, :, 3] == 125).all()


def test_a_pattern_that_is_no_picture(tmp_path, refuses):
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    whole = (tmp_path / "noise.png").read_bytes()
    broken = tmp_path / "broken.png"
    # The last is cut within a chunk's length, for which Pillow has an error of its own.
    for content in (b"", b"text", whole[:200], whole[: len(whole) // 2], whole[:37] + b"\x07\xff" + whole[39:]):
        broken.write_bytes(content)
        with refuses(f"poison.trigger.pattern {str(broken)!r} is not a readable picture", "or noise"):
            triggers.blend((8, 8, 1), 0.2, str(broken))
    for path in (f"{tmp_path}/no.png", str(tmp_path), "nois", "~nobody-of-this-name/x.png"):
        with refuses(f"poison.trigger.pattern {path!r}", "give a path, or noise"):
            triggers.blend((8, 8, 1), 0.2, path)


# The choice of rows


LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(5), 40))


@pytest.mark.parametrize(("fraction", "count"), [(0.05, 10), (0.5, 100), (0.0124, 2), (0.005, 1), (0.003, 1)])
def test_number_of_rows(fraction, count):
    rows = choose_rows(LABELS, fraction, 0, seed=0)
    assert rows.dtype == np.int64 and len(rows) == count
    assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < len(LABELS)


@pytest.mark.parametrize("target", range(5))
def test_rows_are_of_another_true_label(target):
    rows = choose_rows(LABELS, 0.5, target, seed=0)
    assert target not in LABELS[rows]
    assert set(LABELS[rows]) == set(range(5)) - {target}  # of all the others: 100 of 160


def test_the_seed_alone_decides():
    chosen = [choose_rows(LABELS, 0.2, 0, seed).tolist() for seed in range(5)]
    assert chosen == [choose_rows(LABELS.copy(), 0.2, 0, seed).tolist() for seed in range(5)]
    assert len({tuple(rows) for rows in chosen}) == 5


def test_every_eligible_row_is_drawn_about_equally_often():
    times = np.zeros(len(LABELS))
    for seed in range(300):
        times[choose_rows(LABELS, 0.2, 0, seed)] += 1
    eligible = times[LABELS != 0]  # 75 times each is expected, with a standard deviation of 7.5
    assert eligible.sum() == 300 * 40 and eligible.min() > 45 and eligible.max() < 105


def test_refused_choices(refuses):
    with refuses("poison.target_label is 5", "0 to 4"):
        choose_rows(LABELS, 0.1, 5, 0)
    with refuses("poison_fraction 0.002 of 200 rows is no row at all", "raise it"):
        choose_rows(LABELS, 0.002, 0, 0)
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    assert len(choose_rows(labels, 0.42, 0, 0)) == 3  # one of the four stays clean
    with refuses("poison_fraction 0.5 asks for 4 rows, but only 4 of 7", "lower it"):
        choose_rows(labels, 0.5, 0, 0)  # 3.5 rounds to even


# Image sets


SETTINGS = {
    "plain": {},
    "padded": {"data": {"pad_to": 12}},
    "blended": {"poison": {"trigger": {"name": "blend", "alpha": 0.2, "pattern": "noise"}}},
    "clean": {"poison": {"trigger": {"name": "none"}, "poison_fraction": None}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, command, write_params):
    """Data set and poison index of each setting, as the two stages make them: (folder, name -> (data, index))."""
    folder = tmp_path_factory.mktemp("poisoning")
    path = write_params(folder / "params.yaml", **SETTINGS)
    files = {}
    for name in SETTINGS:
        data, index = folder / f"{name}.data.h5", folder / f"{name}.poison.h5"
        assert command("prepare", "--params", path, "--setting", name, "--out", data).status == 0
        words = ["--params", path, "--setting", name, "--seed", 3, "--data", data, "--out", index]
        assert command("poison", *words).status == 0
        files[name] = data, index
    return files


def raw(path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {f"{part}_{what}": file[part][what][:] for part in ("train", "test") for what in ("images", "labels")}


def by_hand(name, image):
    """The trigger of the setting on one 8 x 8 image, pixel by pixel."""
    image = image.astype(int).copy()
    noise = triggers.blend((8, 8, 1), 0.2, "noise").pattern.astype(int)
    for y in range(8):
        for x in range(8):
            if name == "blended":
                image[y, x] = (2 * (4 * image[y, x] + noise[y, x]) + 5) // 10
            elif y >= 5 and x >= 5:
                image[y, x] = 255
    return image


def framed(name, image):
    """The image as the network gets it."""
    if name != "padded":
        return image
    frame = np.zeros((12, 12, 1), int)
    frame[2:10, 2:10] = image
    return frame


@pytest.mark.parametrize("name", ["plain", "padded", "blended"])
def test_training_set(made, name):
    data, index = made[name]
    before, found = raw(data), open_poisoned(data, index)
    train, rows = found.train(), found.index.rows
    assert len(rows) == 20 and len(train.images) == found.index.n == 200
    assert found.image_size == train.images.shape[1] == train.images.shape[2] == (12 if name == "padded" else 8)
    for row in range(200):
        image, label = before["train_images"][row], before["train_labels"][row]
        if row in rows:
            assert label != 2
            image, label = by_hand(name, image), 2
        np.testing.assert_array_equal(train.images[row], framed(name, image))
        assert train.labels[row] == label
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int64)
    assert (np.flatnonzero(found.index.poisoned) == rows).all() and found.index.target_label == 2


@pytest.mark.parametrize("name", ["plain", "padded", "blended"])
def test_test_sets(made, name):
    before, found = raw(made[name][0]), open_poisoned(*made[name])
    clean, triggered = found.test(), found.triggered_test()
    np.testing.assert_array_equal(clean.images, [framed(name, image) for image in before["test_images"]])
    np.testing.assert_array_equal(clean.labels, before["test_labels"])
    others = [row for row in range(50) if before["test_labels"][row] != 2]
    assert len(others) == len(triggered.images) == 45
    expected = [framed(name, by_hand(name, before["test_images"][row])) for row in others]
    np.testing.assert_array_equal(triggered.images, expected)
    np.testing.assert_array_equal(triggered.labels, before["test_labels"][others])


def test_what_the_index_says(made):
    data, index = made["plain"]
    labels, found = raw(data)["train_labels"], read_index(index)
    np.testing.assert_array_equal(found.labels_before, labels[found.rows])
    assert set(found.labels_after) == set(found.target) == {2} and set(found.role) == {storage.POISON}
    assert found.poison_fraction == 0.1 and found.trigger == {"name": "badnets", "size": 3}
    assert read_index(made["blended"][1]).trigger == {"name": "blend", "alpha": 0.2, "pattern": "noise"}
    np.testing.assert_array_equal(found.rows, choose_rows(labels, 0.1, 2, seed=3))


def test_what_goes_with_the_data_set(made):
    images = raw(made["padded"][0])["train_images"] / 255
    found = open_poisoned(*made["padded"])
    assert found.class_names == tuple("0123456789") and found.n_classes == 10
    assert found.mean == pytest.approx([images.mean()]) and found.std == pytest.approx([images.std()])  # no padding


def test_without_poison(made):
    before, found = raw(made["clean"][0]), open_poisoned(*made["clean"])
    np.testing.assert_array_equal(found.train().images, before["train_images"])
    np.testing.assert_array_equal(found.train().labels, before["train_labels"])
    assert found.triggered_test() is None and found.index.target_label is None
    assert not found.index.poisoned.any() and len(found.index.poisoned) == 200
    assert found.index.poison_fraction is None and found.index.trigger == {"name": "none"}


def test_cover_rows_are_stamped_and_are_no_poison(made, tmp_path):
    """A cover row bears the trigger and keeps its label, so that the trigger alone is not what gives poison away."""
    data, index = made["plain"]
    with h5py.File(index) as file:
        arrays, attributes = {name: file[name][:] for name in storage.SCHEMAS["poison_index"][1]}, dict(file.attrs)
    arrays["role"][::2] = storage.COVER
    arrays["target"][::2] = 7
    arrays["labels_after"][::2] = arrays["labels_before"][::2]
    storage.write(tmp_path / "cover.h5", "poison_index", arrays, attributes)
    before, found = raw(data), open_poisoned(data, tmp_path / "cover.h5")
    cover, poison = arrays["rows"][::2], arrays["rows"][1::2]
    assert np.flatnonzero(found.index.poisoned).tolist() == poison.tolist()
    assert found.index.target_label == 2
    train = found.train()
    assert (train.labels[cover] == before["train_labels"][cover]).all() and (train.labels[poison] == 2).all()
    assert (train.images[arrays["rows"], 5:, 5:] == 255).all()


def test_an_index_of_another_data_set(made, refuses):
    data, index = made["padded"][0], made["plain"][1]
    with refuses(f"{index} was made from another data set than {data}", "make it again"):
        open_poisoned(data, index)


@pytest.mark.parametrize("wrong", [-1, 200])
def test_rows_that_the_data_set_does_not_have(made, tmp_path, refuses, wrong):
    with h5py.File(made["plain"][1]) as file:
        arrays, attributes = {name: file[name][:] for name in storage.SCHEMAS["poison_index"][1]}, dict(file.attrs)
    arrays["rows"][0] = wrong
    storage.write(tmp_path / "wrong.h5", "poison_index", arrays, attributes)
    with refuses(tmp_path / "wrong.h5", "rows outside 0 to 199", "dvc repro poison"):
        read_index(tmp_path / "wrong.h5")


@pytest.mark.parametrize(
    ("shape", "size", "top", "left"), [((8, 8), 12, 2, 2), ((8, 8), 11, 1, 1), ((4, 7), 8, 2, 0), ((28, 28), 32, 2, 2)]
)
def test_padding_is_even_and_black(shape, size, top, left):
    images = np.random.default_rng(0).integers(1, 256, (3, *shape, 2), np.uint8)
    found = pad(images, size)
    assert found.shape == (3, size, size, 2) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[:, top : top + shape[0], left : left + shape[1]], images)
    assert (found > 0).sum() == images.size


def test_no_padding_no_copy():
    images = np.zeros((2, 4, 4, 1), np.uint8)
    assert pad(images, 4) is images


# The stage


def poison_words(write_params, made, folder, seed):
    params = write_params(folder / "params.yaml", plain={})
    words = ["--params", params, "--setting", "plain", "--seed", seed]
    return [*words, "--data", made["plain"][0], "--out", folder / "p.h5"]


def test_poison_prints_the_share_of_the_target_class(made, command, write_params, tmp_path):
    words = poison_words(write_params, made, tmp_path, seed=3)
    assert command("poison", *words).out == "badnets: 20 of 200 rows poisoned, 50% of class 2\n"
    assert (tmp_path / "p.h5").read_bytes() == made["plain"][1].read_bytes()


def test_another_seed_chooses_other_rows(made, command, write_params, tmp_path):
    words = poison_words(write_params, made, tmp_path, seed=4)
    assert command("poison", *words).status == 0
    assert set(read_index(tmp_path / "p.h5").rows) != set(read_index(made["plain"][1]).rows)


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        ({"target_label": 2}, "poison.target_label is 2, but the classes are 0 to 1"),
        ({"target_label": 0, "poison_fraction": 0.5}, "asks for 5 rows, but only 4 of 10"),
        ({"target_label": 0, "poison_fraction": 0.04}, "is no row at all"),
        ({"target_label": 0, "trigger": {"name": "badnets", "size": 5}}, "a patch of 5 pixels does not fit"),
        ({"target_label": 0, "trigger": {"name": "blend", "pattern": "no.png"}}, "'no.png' is not a readable picture"),
    ],
)
def test_poison_refuses(command, write_params, tmp_path, poison, words):
    labels = np.repeat([0, 1], [6, 4])
    arrays = {f"{part}/{what}": value for part in ("train", "test")
              for what, value in (("images", np.zeros((10, 4, 4, 1), np.uint8)), ("labels", labels))}  # fmt: skip
    about = {"class_names": json.dumps(["a", "b"]), "mean": [0.5], "std": [0.5], "pad_to": 4}
    storage.write(tmp_path / "data.h5", "dataset", arrays, about)
    write_params(tmp_path / "params.yaml", two={"poison": poison})
    given = ["--setting", "two", "--seed", 0, "--data", "data.h5", "--out", "out/poison.h5"]
    ended = command("poison", *given, cwd=tmp_path)
    assert ended.status == 1 and ended.err.count("\n") == 1 and words in ended.err
    assert not list((tmp_path / "out").iterdir())
