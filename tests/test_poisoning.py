"""The attack: triggers by hand on small images, the choice of rows, and the image sets that follow from an index."""

import hashlib
import json
import math
import shutil
from fractions import Fraction

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from stages.lib import attacks, params, sealed, storage, triggers
from stages.lib.poisoning import open_poisoned, pad, read_index

# Triggers


def trigger(name, shape, **options):
    options = {"name": name} | options
    return triggers.make(options, triggers.picture(options, shape))


def stamped(trigger, images, variants=None):
    """`trigger.apply` on images that cannot be written to, and that must not change."""
    images = np.array(images, np.uint8)
    images.flags.writeable = False
    before = images.copy()
    found = trigger.apply(images, variants)
    np.testing.assert_array_equal(images, before)
    assert found.dtype == np.uint8 and found.shape == images.shape and not np.shares_memory(found, images)
    return found


def test_patch_in_the_bottom_right_corner_of_a_grey_image():
    image = np.arange(20).reshape(1, 4, 5, 1)
    found = stamped(trigger("badnets", (4, 5, 1), size=2), image)
    assert found[0, ..., 0].tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12, 255, 255],
        [15, 16, 17, 255, 255],
    ]


def test_patch_in_a_colour_image():
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    found = stamped(trigger("badnets", (32, 32, 3), size=3), images)
    assert (found[:, 29:, 29:] == 255).all()
    outside = np.ones((32, 32), bool)
    outside[29:, 29:] = False
    np.testing.assert_array_equal(found[:, outside], images[:, outside])


def test_a_patch_may_fill_the_image_and_no_more(refuses):
    assert (stamped(trigger("badnets", (4, 5, 1), size=4), np.zeros((1, 4, 5, 1)))[0, :, 1:] == 255).all()
    with refuses("a patch of 5 pixels", "4 x 5", "lower poison.trigger.patch_size"):
        trigger("badnets", (4, 5, 1), size=5)


def test_blend_with_an_opacity_of_a_fifth():
    picture = np.array([[[255, 0, 101]]], np.uint8)
    stamp = triggers.Stamp(picture, np.full((1, 1, 1), 0.2, np.float32))
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
        trigger("badnets", (4, 5, 1), size=2).apply(np.zeros((1, 5, 4, 1), np.uint8))
    with refuses("(4, 5, 1)", "(4, 5, 3)"):
        trigger("badnets", (4, 5, 1), size=2).apply(np.zeros((1, 4, 5, 3), np.uint8))


def test_no_images_to_stamp():
    assert stamped(trigger("badnets", (4, 5, 1), size=2), np.empty((0, 4, 5, 1))).shape == (0, 4, 5, 1)


@pytest.mark.parametrize(
    ("shape", "sha256"),
    [
        ((32, 32, 3), "1a5e2d654b184e1ee038d3af8387e489420e5a11d5f062294ab9e5e81ed091b4"),
        ((28, 28, 1), "b9ffa01293c73ee90340dd67d179bf6ba4182810ad7c8dd5d89fe2589c8df89c"),
    ],
)
def test_the_noise_is_the_same_everywhere(shape, sha256):
    stamp = trigger("blend", shape, alpha=0.2, pattern="noise")
    assert hashlib.sha256(stamp.picture.tobytes()).hexdigest() == sha256
    assert stamp.alpha.dtype == np.float32 and (stamp.alpha == np.float32(0.2)).all()
    assert stamp.alpha.shape == (*shape[:2], 1)


def test_the_noise_is_a_grid_enlarged_bilinearly():
    height, width, cells = 7, 11, triggers.NOISE_CELLS
    grid = np.random.default_rng(triggers.NOISE_SEED).integers(0, 256, (cells + 1, cells + 1, 3)).tolist()
    pattern = trigger("blend", (height, width, 3), alpha=0.2, pattern="noise").picture
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
    pattern = trigger("blend", (32, 32, 3), alpha=0.2, pattern="noise").picture.astype(int)
    steps = [np.abs(np.diff(pattern, axis=axis)).mean() for axis in (0, 1)]
    assert max(steps) < 30  # between neighbours; 85 for independent values
    assert pattern.std() > 40


def test_a_picture_of_the_images_size_is_taken_as_it_is(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(colour[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(
        trigger("blend", (6, 5, 3), alpha=0.3, pattern=f"{tmp_path}/colour.png").picture, colour
    )
    np.testing.assert_array_equal(
        trigger("blend", (6, 5, 1), alpha=0.3, pattern=f"{tmp_path}/grey.png").picture, colour[..., :1]
    )
    grey_in_colour = trigger("blend", (6, 5, 3), alpha=0.3, pattern=f"{tmp_path}/grey.png").picture
    np.testing.assert_array_equal(grey_in_colour, np.repeat(colour[..., :1], 3, axis=2))
    luma = trigger("blend", (6, 5, 1), alpha=0.3, pattern=f"{tmp_path}/colour.png").picture[..., 0]
    np.testing.assert_allclose(luma, colour @ [0.299, 0.587, 0.114], atol=1)


def test_a_picture_is_resized(tmp_path):
    large = np.zeros((60, 40, 3), np.uint8)
    large[:, 20:] = 200
    Image.fromarray(large).save(tmp_path / "large.png")
    stamp = trigger("blend", (6, 4, 3), alpha=0.25, pattern=f"{tmp_path}/large.png")
    assert stamp.picture.shape == (6, 4, 3) and stamp.picture.dtype == np.uint8
    assert (stamp.picture[:, 0] == 0).all() and (stamp.picture[:, 3] == 200).all()
    assert (stamped(stamp, np.full((1, 6, 4, 3), 100))[0, :, 3] == 125).all()


def test_a_pattern_that_is_no_picture(tmp_path, refuses):
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    whole = (tmp_path / "noise.png").read_bytes()
    broken = tmp_path / "broken.png"
    # The last is cut within a chunk's length, for which Pillow has an error of its own.
    for content in (b"", b"text", whole[:200], whole[: len(whole) // 2], whole[:37] + b"\x07\xff" + whole[39:]):
        broken.write_bytes(content)
        with refuses(f"poison.trigger.pattern {str(broken)!r} is not a readable picture", "or noise"):
            trigger("blend", (8, 8, 1), alpha=0.2, pattern=str(broken))
    for path in (f"{tmp_path}/no.png", str(tmp_path), "nois", "~nobody-of-this-name/x.png"):
        with refuses(f"poison.trigger.pattern {path!r}", "give a path, or noise"):
            trigger("blend", (8, 8, 1), alpha=0.2, pattern=path)


# The harder triggers, each against its formula, pixel by pixel


HARDER = {
    "sig": {"delta": 20.0, "frequency": 6.0},
    "wanet": {"grid": 4, "strength": 0.5},
    "adaptive_blend": {"alpha": 0.2, "pattern": "noise", "pieces_per_side": 4},
}
PHOTOS = np.random.default_rng(5).integers(0, 256, (3, 12, 9, 3), np.uint8)  # not square


def test_patch_in_the_bottom_left_corner():
    found = stamped(trigger("badnets", (4, 5, 1), size=2, corner="bottom_left"), np.zeros((1, 4, 5, 1)))
    assert found[0, ..., 0].tolist() == [[0] * 5, [0] * 5, [255, 255, 0, 0, 0], [255, 255, 0, 0, 0]]


@pytest.mark.parametrize(("delta", "frequency"), [(20.0, 6.0), (60.0, 1.5), (255.0, 2.0)])
def test_sinusoid(delta, frequency):
    """v(i, j) = delta sin(2 pi j f / m) for the column j = 1 … m, the sum clipped."""
    found = stamped(trigger("sig", PHOTOS.shape[1:], delta=delta, frequency=frequency), PHOTOS)
    for j in range(1, 10):
        value = math.floor(delta * math.sin(2 * math.pi * j * frequency / 9) + 0.5)
        expected = np.minimum(np.maximum(PHOTOS[:, :, j - 1].astype(int) + value, 0), 255)
        np.testing.assert_array_equal(found[:, :, j - 1], expected)


def test_half_a_grey_level_of_a_sinusoid_goes_up():
    wave = trigger("sig", (2, 12, 1), delta=15.0, frequency=1.0).wave  # 15 sin(30 degrees) is 7.5, 15 sin(210) is -7.5
    assert wave.tolist() == [8, 13, 15, 13, 8, 0, -7, -13, -15, -13, -7, 0]


def control_grid(k):
    control = np.random.default_rng(triggers.WARP_SEED).uniform(-1, 1, (k, k, 2))
    return control / np.mean(np.abs(control))


@pytest.mark.parametrize(
    ("k", "strength", "shape"), [(4, 0.5, (32, 32)), (4, 2.0, (12, 9)), (2, 1.0, (8, 8)), (6, 0.75, (28, 28))]
)
def test_the_warping_field_is_enlarged_bicubically(k, strength, shape):
    """As torch does it; sampling grids span [-1, 1], so strength / H there is half of strength in pixels, nearly."""
    grid = torch.from_numpy(control_grid(k)).permute(2, 0, 1)[None]
    enlarged = torch.nn.functional.interpolate(grid, size=shape, mode="bicubic", align_corners=True)[0]
    sampling = strength * enlarged.permute(1, 2, 0).numpy() / shape
    pixels = sampling * (np.array(shape) - 1) / 2
    np.testing.assert_allclose(trigger("wanet", (*shape, 1), grid=k, strength=strength).shift, pixels, atol=1e-12)


def fetched(image, y, x):
    """Bilinear value of one image (H, W, C) at a place in pixels, within the image, as exact fractions."""
    height, width, channels = image.shape
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = math.floor(y), math.floor(x)
    down, right = y - top, x - left
    below, beside = min(top + 1, height - 1), min(left + 1, width - 1)
    return [
        (1 - down) * ((1 - right) * int(image[top, left, c]) + right * int(image[top, beside, c]))
        + down * ((1 - right) * int(image[below, left, c]) + right * int(image[below, beside, c]))
        for c in range(channels)
    ]


def warped(image, shift):
    """Places to the nearest 1/256 pixel; the value to the nearest whole, halves up."""
    found = np.empty(image.shape, int)
    for y, x in np.ndindex(image.shape[:2]):
        place = [Fraction(math.floor((at + by) * 256 + 0.5), 256) for at, by in zip((y, x), shift[y, x])]
        found[y, x] = [math.floor(value + Fraction(1, 2)) for value in fetched(image, *place)]
    return found


def test_a_warp_fetches_bilinearly():
    warp = trigger("wanet", PHOTOS.shape[1:], grid=4, strength=3.0)
    assert np.abs(warp.shift).mean() > 0.5  # it does something, and reaches beyond the edges
    found = stamped(warp, PHOTOS)
    for image, expected in zip(PHOTOS, found):
        np.testing.assert_array_equal(warped(image, warp.shift), expected)


def test_a_warp_is_what_grid_sample_gives():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    warp = trigger("wanet", (32, 32, 3), grid=4, strength=2.0)
    place = (np.stack(np.mgrid[:32, :32], -1) + warp.shift) / 31 * 2 - 1
    grid = torch.from_numpy(place[..., ::-1].clip(-1, 1).copy()).float().expand(2, -1, -1, -1)
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.grid_sample(inputs, grid, align_corners=True).permute(0, 2, 3, 1).numpy()
    assert np.abs(stamped(warp, images) - expected).max() < 0.5 + 2 * 255 / 512 + 1e-3  # rounding; 1/512 pixel each way


def test_the_noise_mode_of_a_warp():
    """Each variant adds noise of its own, uniform in [-1, 1] / H where the image spans [-1, 1]: up to half a pixel."""
    warp = trigger("wanet", PHOTOS.shape[1:], grid=4, strength=3.0)
    found = stamped(warp, PHOTOS, np.array([7, 0, 8]))
    for row, variant in ((0, 7), (2, 8)):
        noise = np.random.default_rng(variant).uniform(-1, 1, (12, 9, 2)) / (12, 9) * ((12 - 1) / 2, (9 - 1) / 2)
        np.testing.assert_array_equal(found[row], warped(PHOTOS[row], warp.shift + noise))
    np.testing.assert_array_equal(found[1], stamped(warp, PHOTOS)[1])


def test_adaptive_blend_shows_all_pieces_or_half_of_them():
    options = {"alpha": 0.3, "pattern": "noise"}
    images = np.repeat(PHOTOS[:1, :8], 200, axis=0)
    stamp = trigger("adaptive_blend", (8, 9, 3), **options, pieces_per_side=4)
    full = stamped(trigger("blend", (8, 9, 3), **options), images)
    np.testing.assert_array_equal(stamped(stamp, images), full)
    found = stamped(stamp, images, np.arange(1, 201))
    columns = [range(0, 3), range(3, 5), range(5, 7), range(7, 9)]  # x * 4 // 9
    times = np.zeros((4, 4), int)
    for row in range(200):
        for y, x in np.ndindex(4, 4):
            piece = row, slice(2 * y, 2 * y + 2), slice(columns[x].start, columns[x].stop)
            shown = (found[piece] == full[piece]).all()
            assert shown or (found[piece] == images[piece]).all()
            times[y, x] += shown
        assert times.sum() == 8 * (row + 1)
    assert times.min() > 70 and times.max() < 130  # 100 each, standard deviation 7


@pytest.mark.parametrize("name", HARDER)
def test_harder_triggers_do_not_depend_on_what_else_is_stamped(name, monkeypatch):
    """Byte by byte the same: made twice, in blocks of another size, and one image at a time."""
    images, variants = np.repeat(PHOTOS, 4, axis=0), np.array([0, 1, 2, 3] * 3)
    found = stamped(trigger(name, PHOTOS.shape[1:], **HARDER[name]), images, variants)
    alone = [
        stamped(trigger(name, PHOTOS.shape[1:], **HARDER[name]), images[i : i + 1], variants[i : i + 1])
        for i in range(12)
    ]
    np.testing.assert_array_equal(found, np.concatenate(alone))
    monkeypatch.setattr(triggers, "BLOCK", 5)
    np.testing.assert_array_equal(found, stamped(trigger(name, PHOTOS.shape[1:], **HARDER[name]), images, variants))
    assert (found != images).any(axis=(1, 2, 3)).all()


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


GOLDEN = {
    "badnets": ({"size": 3}, "46c00a40d11dc052", "406ebd8b544842e1"),
    "blend": ({"alpha": 0.2, "pattern": "noise"}, "aa48129d7d0eadbc", "3df243c776961bdf"),
    "sig": (HARDER["sig"], "665b1633674e8f8c", "e8c2aa100a2fd030"),
    "wanet": (HARDER["wanet"], "53dd4cf3e2a73c36", "0f52d6f6c6a2f484"),
    "adaptive_blend": (HARDER["adaptive_blend"], "38145e7bb6955d99", "004c02493717e507"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_a_trigger_never_change(name):
    """On a colour and on a grey image; what is stamped differently is another attack, and old figures would not be its."""
    options, *expected = GOLDEN[name]
    for shape, start in zip(((5, 32, 32, 3), (5, 16, 16, 1)), expected):
        images = (np.arange(math.prod(shape)) * 7919 % 251).astype(np.uint8).reshape(shape)
        variants = np.arange(5) if name in ("wanet", "adaptive_blend") else None
        assert sha256(stamped(trigger(name, shape[1:], **options), images, variants)).startswith(start)


# The choice of rows


LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(5), 40))
PATCH, CORNER = params.BadNets("badnets"), params.BadNets("badnets", corner="bottom_left")


def chosen(labels, fraction, target, seed):
    """Rows that the plain attack poisons."""
    return attacks.plan(labels, int(labels.max()) + 1, params.AllToOne(PATCH, fraction, target), seed)["rows"]


@pytest.mark.parametrize(("fraction", "count"), [(0.05, 10), (0.5, 100), (0.0124, 2), (0.005, 1), (0.003, 1)])
def test_number_of_rows(fraction, count):
    rows = chosen(LABELS, fraction, 0, seed=0)
    assert rows.dtype == np.int64 and len(rows) == count
    assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < len(LABELS)


@pytest.mark.parametrize("target", range(5))
def test_rows_are_of_another_true_label(target):
    rows = chosen(LABELS, 0.5, target, seed=0)
    assert target not in LABELS[rows]
    assert set(LABELS[rows]) == set(range(5)) - {target}  # of all the others: 100 of 160


def test_the_seed_alone_decides():
    rows = [chosen(LABELS, 0.2, 0, seed).tolist() for seed in range(5)]
    assert rows == [chosen(LABELS.copy(), 0.2, 0, seed).tolist() for seed in range(5)]
    assert len({tuple(found) for found in rows}) == 5


@pytest.mark.parametrize(("seed", "first", "digest"), [(0, 48, "767acca539a08abb"), (42, 7, "14b9fa9f5201f317")])
def test_the_rows_of_a_seed_never_change(seed, first, digest):
    rows = chosen(np.arange(1437) % 10, 0.05, 0, seed)
    assert (len(rows), rows[0]) == (72, first) and sha256(rows).startswith(digest)


def test_every_eligible_row_is_drawn_about_equally_often():
    times = np.zeros(len(LABELS))
    for seed in range(300):
        times[chosen(LABELS, 0.2, 0, seed)] += 1
    eligible = times[LABELS != 0]  # 75 times each is expected, with a standard deviation of 7.5
    assert eligible.sum() == 300 * 40 and eligible.min() > 45 and eligible.max() < 105


WANET, ADAPTIVE = params.WaNet("wanet", cover_ratio=2.0), params.AdaptiveBlend("adaptive_blend", cover_ratio=1.0)
OTHERS, EVERY = {0, 1, 3, 4}, {0, 1, 2, 3, 4}
PLANS = {  # attack, poisoned and cover rows of 200, true classes of both, labels given to class 0 … 4, goals
    "badnets": (params.AllToOne(PATCH, 0.1, 2), 20, 0, OTHERS, set(), [2, 2, None, 2, 2], [[2, 2, -1, 2, 2]]),
    "wanet": (params.AllToOne(WANET, 0.1, 2), 20, 40, OTHERS, EVERY, [2, 2, None, 2, 2], [[2, 2, -1, 2, 2]]),
    "adaptive": (params.AllToOne(ADAPTIVE, 0.1, 2), 20, 20, OTHERS, EVERY, [2, 2, None, 2, 2], [[2, 2, -1, 2, 2]]),
    "sig": (params.CleanLabel(params.Sig("sig"), 0.1, 2), 20, 0, {2}, set(), [None, None, 2, None, None], [[2, 2, -1, 2, 2]]),
    "tact": (params.SourceSpecific(PATCH, 4, 0.1, 2, 1.5), 20, 30, {4}, {0, 1, 3}, [None] * 4 + [2], [[-1, -1, -1, -1, 2]]),
    "all_to_all": (params.AllToAll(PATCH, 0.2), 40, 0, EVERY, set(), [1, 2, 3, 4, 0], [[1, 2, 3, 4, 0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_roles_labels_and_counts(name):
    attack, n_poison, n_cover, poisoned, covered, given, goals = PLANS[name]
    found = attacks.plan(LABELS, 5, attack, seed=1)
    poison, cover = found["role"] == storage.POISON, found["role"] == storage.COVER
    assert (poison.sum(), cover.sum()) == (n_poison, n_cover) and len(found["rows"]) == n_poison + n_cover
    assert (np.diff(found["rows"]) > 0).all() and found["goals"].tolist() == goals and set(found["trigger"]) == {0}
    before, after = found["labels_before"], found["labels_after"]
    assert (before == LABELS[found["rows"]]).all()
    assert set(before[poison]) == poisoned and set(before[cover]) == covered
    assert [given[label] for label in before[poison]] == after[poison].tolist() == found["target"][poison].tolist()
    assert (after[cover] == before[cover]).all() and (found["target"][cover] == -1).all()
    varied = {"wanet": cover, "adaptive": poison | cover}.get(name, np.zeros(len(poison), bool))
    assert (found["variant"][~varied] == 0).all() and len(set(found["variant"][varied]) - {0}) == varied.sum()
    for key, (dtype, _) in storage.SCHEMAS["poison_index"][1].items():
        assert key == "pictures" or found[key].dtype == dtype
    again, other = attacks.plan(LABELS.copy(), 5, attack, seed=1), attacks.plan(LABELS, 5, attack, seed=2)
    assert all((again[key] == found[key]).all() for key in found)
    assert (other["rows"] != found["rows"]).any()


def test_two_targets_have_half_the_rows_each():
    attack = params.TwoTargets(PATCH, CORNER, second_target_label=3, poison_fraction=0.105, target_label=2)
    found = attacks.plan(LABELS, 5, attack, seed=1)
    assert (found["role"] == storage.POISON).all() and len(set(found["rows"])) == 21
    for number, target, count in ((0, 2, 11), (1, 3, 10)):
        rows = found["trigger"] == number
        assert rows.sum() == count and target not in found["labels_before"][rows]
        assert set(found["labels_after"][rows]) == set(found["target"][rows]) == {target}
    assert found["goals"].tolist() == [[2, 2, -1, 2, 2], [3, 3, 3, -1, 3]]


def test_no_cover():
    attack = params.AllToOne(params.WaNet("wanet", cover_ratio=0.0), 0.1, 2)
    assert set(attacks.plan(LABELS, 5, attack, 0)["role"]) == {storage.POISON}


def test_refused_choices(refuses):
    with refuses("poison.target_label is 5", "0 to 4"):
        chosen(LABELS, 0.1, 5, 0)
    with refuses("poison_fraction 0.002 of 200 rows is no row at all", "raise it"):
        chosen(LABELS, 0.002, 0, 0)
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    assert len(chosen(labels, 0.42, 0, 0)) == 3  # one of the four stays clean
    with refuses("poison_fraction 0.5 asks for 4 rows, but only 4 of 7", "lower it"):
        chosen(labels, 0.5, 0, 0)  # 3.5 rounds to even


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (params.CleanLabel(params.Sig("sig"), 0.2, 1), "asks for 40 rows, but only 40 of 200 are of the target class"),
        (params.SourceSpecific(PATCH, 1, 0.25, 0), "asks for 50 rows, but only 40 of 200 are of the source class"),
        (params.SourceSpecific(PATCH, 5, 0.1, 0), "poison.source_label is 5, but the classes are 0 to 4"),
        (params.SourceSpecific(PATCH, 1, 0.1, 0, 6.0), "cover_ratio 6.0 asks for 120 rows, but only 120 of 200 can be"),
        (params.AllToOne(WANET, 0.4, 0), "cover_ratio 2.0 asks for 160 rows, but only 120 of 200 can be cover"),
        (params.TwoTargets(PATCH, CORNER, 9, 0.1), "poison.second_target_label is 9, but the classes are 0 to 4"),
        (
            params.TwoTargets(PATCH, CORNER, 1, 0.005),
            "poison_fraction 0.005 of 200 rows is no row for the second target",
        ),
    ],
)
def test_refused_attacks(refuses, attack, words):
    with refuses(words):
        attacks.plan(LABELS, 5, attack, 0)


# Image sets


SETTINGS = {
    "plain": {},
    "padded": {"data": {"pad_to": 12}},
    "blended": {"poison": {"trigger": {"name": "blend", "alpha": 0.2, "pattern": "noise"}}},
    "clean": {"poison": {"trigger": {"name": "none"}, "poison_fraction": None}},
    "wanet": {"poison": {"trigger": {"name": "wanet", "strength": 2.0}}},
    "sig": {"poison": {"attack": "clean_label", "trigger": {"name": "sig"}, "poison_fraction": 0.05}},
    "tact": {"poison": {"attack": "source_specific", "source_label": 4, "poison_fraction": 0.05}},
    "adaptive": {"poison": {"trigger": {"name": "adaptive_blend", "cover_ratio": 0.5}}},
    "two": {"poison": {"attack": "two_targets", "second_target_label": 7, "second_trigger": {"name": "blend"}}},
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
    noise = trigger("blend", (8, 8, 1), alpha=0.2, pattern="noise").picture.astype(int)
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
    assert (np.flatnonzero(found.index.poisoned) == rows).all() and found.index.target_labels.tolist() == [2]


@pytest.mark.parametrize("name", ["plain", "padded", "blended"])
def test_test_sets(made, name):
    before, found = raw(made[name][0]), open_poisoned(*made[name])
    clean, [(triggered, wanted)] = found.test(), list(found.triggered_tests())
    np.testing.assert_array_equal(clean.images, [framed(name, image) for image in before["test_images"]])
    np.testing.assert_array_equal(clean.labels, before["test_labels"])
    others = [row for row in range(50) if before["test_labels"][row] != 2]
    assert len(others) == len(triggered.images) == 45
    expected = [framed(name, by_hand(name, before["test_images"][row])) for row in others]
    np.testing.assert_array_equal(triggered.images, expected)
    np.testing.assert_array_equal(triggered.labels, before["test_labels"][others])
    assert wanted.tolist() == [2] * 45


def test_what_the_index_says(made):
    data, index = made["plain"]
    labels, found = raw(data)["train_labels"], read_index(index)
    np.testing.assert_array_equal(found.labels_before, labels[found.rows])
    assert set(found.labels_after) == set(found.target) == {2} and set(found.role) == {storage.POISON}
    assert found.poison_fraction == 0.1 and found.attack == "all_to_one"
    assert set(found.trigger) == set(found.variant) == {0}
    assert found.goals.tolist() == [[2, 2, -1, 2, 2, 2, 2, 2, 2, 2]]
    np.testing.assert_array_equal(found.rows, chosen(labels, 0.1, 2, seed=3))
    with h5py.File(index) as file:
        assert json.loads(file.attrs["triggers"]) == [{"name": "badnets", "size": 3, "corner": "bottom_right"}]


def test_what_goes_with_the_data_set(made):
    images = raw(made["padded"][0])["train_images"] / 255
    found = open_poisoned(*made["padded"])
    assert found.class_names == tuple("0123456789") and found.n_classes == 10
    assert found.mean == pytest.approx([images.mean()]) and found.std == pytest.approx([images.std()])  # no padding


def test_without_poison(made):
    before, found = raw(made["clean"][0]), open_poisoned(*made["clean"])
    np.testing.assert_array_equal(found.train().images, before["train_images"])
    np.testing.assert_array_equal(found.train().labels, before["train_labels"])
    assert list(found.triggered_tests()) == [] and len(found.index.target_labels) == 0
    assert not found.index.poisoned.any() and len(found.index.poisoned) == 200
    assert found.index.poison_fraction is None and found.index.triggers == ()


@pytest.mark.parametrize("name", ["wanet", "sig", "tact", "adaptive", "two"])
def test_training_set_of_a_harder_attack(made, name):
    """Every row is as the index says, whichever trigger and variant it has; what is not in the index is untouched."""
    data, path = made[name]
    before, found = raw(data), open_poisoned(data, path)
    index, train = found.index, found.train()
    untouched = np.ones(200, bool)
    untouched[index.rows] = False
    np.testing.assert_array_equal(train.images[untouched], before["train_images"][untouched])
    np.testing.assert_array_equal(train.labels[untouched], before["train_labels"][untouched])
    for row, label, number, variant in zip(index.rows, index.labels_after, index.trigger, index.variant):
        expected = stamped(index.triggers[number], before["train_images"][row][None], np.array([variant]))
        np.testing.assert_array_equal(train.images[row], expected[0])
        assert train.labels[row] == label
    poisoned = index.role == storage.POISON
    assert index.poisoned.sum() == poisoned.sum() == (10 if name in ("sig", "tact") else 20)
    assert (~poisoned).sum() == {"wanet": 40, "tact": 10, "adaptive": 10}.get(name, 0)


TRUE = {  # true labels of the test images that count, what each trigger wants of them
    "wanet": [({0, 1, 3, 4, 5, 6, 7, 8, 9}, {2})],
    "sig": [({0, 1, 3, 4, 5, 6, 7, 8, 9}, {2})],
    "tact": [({4}, {2})],
    "adaptive": [({0, 1, 3, 4, 5, 6, 7, 8, 9}, {2})],
    "two": [({0, 1, 3, 4, 5, 6, 7, 8, 9}, {2}), ({0, 1, 2, 3, 4, 5, 6, 8, 9}, {7})],
}


@pytest.mark.parametrize("name", TRUE)
def test_test_sets_of_a_harder_attack(made, name):
    before, found = raw(made[name][0]), open_poisoned(*made[name])
    sets = list(found.triggered_tests())
    assert len(sets) == len(found.index.triggers) == len(TRUE[name])
    for (triggered, wanted), trigger_, (labels, targets) in zip(sets, found.index.triggers, TRUE[name]):
        counts = np.isin(before["test_labels"], list(labels))
        np.testing.assert_array_equal(triggered.labels, before["test_labels"][counts])
        np.testing.assert_array_equal(triggered.images, stamped(trigger_, before["test_images"][counts]))  # in full
        assert set(wanted) == targets and len(wanted) == counts.sum()
    assert found.index.target_labels.tolist() == sorted(set().union(*(targets for _, targets in TRUE[name])))


def test_an_index_of_another_data_set(made, refuses):
    data, index = made["padded"][0], made["plain"][1]
    with refuses(f"{index} was made from another data set than {data}", "make it again"):
        open_poisoned(data, index)


@pytest.mark.parametrize("wrong", [-1, 1])
def test_triggers_that_the_index_does_not_have(made, tmp_path, refuses, wrong):
    with h5py.File(made["plain"][1]) as file:
        arrays, attributes = {name: file[name][:] for name in storage.SCHEMAS["poison_index"][1]}, dict(file.attrs)
    arrays["trigger"][0] = wrong
    storage.write(tmp_path / "wrong.h5", "poison_index", arrays, attributes)
    with refuses(tmp_path / "wrong.h5", "triggers outside 0 to 0", "dvc repro poison"):
        read_index(tmp_path / "wrong.h5")


def test_an_index_of_the_first_layout(made, tmp_path, refuses):
    shutil.copy(made["plain"][1], tmp_path / "old.h5")
    with h5py.File(tmp_path / "old.h5", "r+") as file:
        file.attrs["schema_version"] = 1
    sealed.seal(tmp_path / "old.h5")
    with refuses(tmp_path / "old.h5", "schema version 1, expected 2", "dvc repro poison"):
        read_index(tmp_path / "old.h5")


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
        ({"target_label": 0, "trigger": {"name": "badnets", "patch_size": 5}}, "a patch of 5 pixels does not fit"),
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


@pytest.mark.parametrize(
    ("poison", "test_labels", "words"),
    [
        ({"target_label": 0}, [0, 0], "no test image by which the ASR could be measured: add some of class b, c"),
        ({"target_label": 0}, [1, 2], "no test image of the target class a: add some"),
        (
            {"attack": "source_specific", "source_label": 2, "target_label": 0, "cover_ratio": 1.0},
            [0, 1],
            "no test image by which the ASR could be measured: add some of class c",
        ),
        (
            {
                "attack": "two_targets",
                "second_trigger": {"name": "badnets", "corner": "bottom_left"},
                "target_label": 0,
                "second_target_label": 1,
            },
            [0, 2],
            "no test image of the target class b: add some",
        ),
        ({"target_label": 0}, [], None),
        ({"target_label": 0}, [0, 2], None),
    ],
)
def test_test_images_that_cannot_tell_are_refused_before_any_training(
    command, write_params, tmp_path, poison, test_labels, words
):
    arrays = {}
    for part, labels in (("train", np.repeat([0, 1, 2], 10)), ("test", np.array(test_labels, np.int64))):
        arrays |= {f"{part}/images": np.zeros((len(labels), 4, 4, 1), np.uint8), f"{part}/labels": labels}
    about = {"class_names": json.dumps(["a", "b", "c"]), "mean": [0.5], "std": [0.5], "pad_to": 4}
    storage.write(tmp_path / "data.h5", "dataset", arrays, about)
    write_params(tmp_path / "params.yaml", three={"poison": {"poison_fraction": 0.1} | poison})
    given = ["--setting", "three", "--seed", 0, "--data", "data.h5", "--out", "out/poison.h5"]
    ended = command("poison", *given, cwd=tmp_path)
    if words:
        assert ended.status == 1 and ended.err.count("\n") == 1 and words in ended.err
    else:
        assert ended.status == 0 and ("no test images: clean accuracy and ASR" in ended.out) == (not test_labels)
