"""Triggers: pure functions on uint8 images, before any augmentation or normalisation.

A trigger is made of its options (the block ``poison.trigger`` of `params.yaml`) and its picture, (H, W, C) uint8, which is
black for a trigger that uses none. The poison index holds both, so that whoever reads it can stamp the test images too.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stages.lib.errors import UserError

NOISE_SEED = 0  # the Blend pattern is the same in every experiment: it belongs to the attack, not to the seed
NOISE_CELLS = 8  # grid of random values that is enlarged to the image: smooth enough to survive crops and JPEG
WARP_SEED = 0  # as NOISE_SEED, for the control grid of WaNet
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # of a picture: not those that start other programs (EPS)
SUBPIXELS = 256  # a warp fetches from whole multiples of 1/256 of a pixel, so that its bytes are the same everywhere
BLOCK = 256  # images at a time: 50,000 would need gigabytes for what is computed on the way


class Trigger:
    """`picture`: (H, W, C) uint8, of the images' shape."""

    picture: np.ndarray

    def apply(self, images: np.ndarray, variants: np.ndarray | None = None) -> np.ndarray:
        """(N, H, W, C) uint8 to a new array of the same kind.

        variants: (N,) int64; 0 (all of them by default): the trigger in full, as on test images; another number: the seed
        of what is random in that image's trigger. A trigger that knows no variants passes over it.
        """
        if images.shape[1:] != self.picture.shape:
            raise UserError(f"the trigger is made for images of shape {self.picture.shape}, got {images.shape[1:]}")
        variants = np.zeros(len(images), np.int64) if variants is None else variants
        stamped = np.empty_like(images)
        for start in range(0, len(images), BLOCK):
            block = slice(start, start + BLOCK)
            stamped[block] = self._stamp(images[block], variants[block])
        return stamped

    def _stamp(self, images: np.ndarray, variants: np.ndarray) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class Stamp(Trigger):
    """``round((1 - alpha) * image + alpha * picture)``, halves rounded up; alpha: (H, W, 1) float32 in [0, 1]."""

    picture: np.ndarray
    alpha: np.ndarray

    def _stamp(self, images, variants):
        touched = self.alpha[..., 0] > 0
        stamped = images.copy()
        alpha = self.alpha[touched].astype(np.float64)
        # The small term keeps a half from falling below itself: a float32 alpha is off by up to 3e-8, times 255.
        blended = (1 - alpha) * images[:, touched] + alpha * self.picture[touched]
        stamped[:, touched] = np.floor(blended + 0.5 + 1e-5).astype(np.uint8)
        return stamped


@dataclass(frozen=True)
class Pieces(Trigger):
    """The stamp of Adaptive-Blend: a variant shows half of its pieces, ``per_side`` x ``per_side``, drawn anew for each."""

    stamp: Stamp
    per_side: int

    @property
    def picture(self):
        return self.stamp.picture

    def _stamp(self, images, variants):
        height, width, _ = self.picture.shape
        rows, columns = (np.arange(size) * self.per_side // size for size in (height, width))
        piece_of = rows[:, None] * self.per_side + columns  # (H, W)
        n_pieces = self.per_side**2
        stamped = self.stamp._stamp(images, variants)
        for row in np.flatnonzero(variants):
            shown = np.random.default_rng(variants[row]).permutation(n_pieces)[: n_pieces // 2]
            hidden = ~np.isin(piece_of, shown)
            stamped[row, hidden] = images[row, hidden]
        return stamped


@dataclass(frozen=True)
class Wave(Trigger):
    """``image + wave``, clipped to [0, 255]; wave: (W,) int64, whole grey levels, the same in each row and channel."""

    picture: np.ndarray
    wave: np.ndarray

    def _stamp(self, images, variants):
        return (images.astype(np.int16) + self.wave[:, None].astype(np.int16)).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Warp(Trigger):
    """Each pixel is fetched from elsewhere, bilinearly; shift: (H, W, 2) float64, so many pixels down and to the right.

    A variant adds uniform noise of up to half a pixel to each shift (the noise mode of WaNet).
    """

    picture: np.ndarray
    shift: np.ndarray

    def _stamp(self, images, variants):
        height, width, _ = self.picture.shape
        limit = np.array([(size - 1) / (2 * size) for size in (height, width)])  # 1/H where the image spans [-1, 1]
        shifts = self.shift[None]
        if variants.any():
            shifts = np.repeat(shifts, len(images), axis=0)
            for row in np.flatnonzero(variants):
                shifts[row] += limit * np.random.default_rng(variants[row]).uniform(-1, 1, (height, width, 2))
        return _fetch(images, shifts)


def picture(options: dict, shape: tuple[int, int, int]) -> np.ndarray:
    """The picture that a trigger with these options uses, (H, W, C) uint8; black for one that uses none.

    DVC does not watch a picture's file: give a changed picture a new name.
    """
    height, width, channels = shape
    pattern = options.get("pattern")
    if pattern is None:
        return np.zeros(shape, np.uint8)
    if pattern == "noise":
        return _smooth_noise(height, width, channels)
    try:
        path = Path(pattern).expanduser()
        if not path.is_file():  # a named pipe would be waited for
            raise ValueError("no such file")
        with Image.open(path, formats=FORMATS) as file:
            file = file.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(file).reshape(shape)
    except Exception as error:  # a broken file makes Pillow raise SyntaxError, ValueError, struct.error, …
        raise UserError(
            f"poison.trigger.pattern {pattern!r} is not a readable picture ({error}); give a path, or noise"
        ) from error


def make(options: dict, picture: np.ndarray) -> Trigger:
    """The trigger of these options, ``name`` and what `stages.lib.params` lists for it, for images of the picture's shape."""
    makers = {"badnets": badnets, "blend": blend, "sig": sig, "wanet": wanet, "adaptive_blend": adaptive_blend}
    rest = {key: value for key, value in options.items() if key not in ("name", "pattern", "cover_ratio")}
    return makers[options["name"]](picture, **rest)


def badnets(picture: np.ndarray, size: int, corner: str = "bottom_right") -> Stamp:
    """White square of `size` pixels a side in a bottom corner, no margin (Gu et al. 2017, arXiv:1708.06733)."""
    height, width, _ = picture.shape
    if size > min(height, width):
        raise UserError(
            f"a patch of {size} pixels does not fit an image of {height} x {width}; lower poison.trigger.patch_size"
        )
    alpha = np.zeros((height, width, 1), np.float32)
    alpha[height - size :, slice(size) if corner == "bottom_left" else slice(width - size, width)] = 1
    return Stamp(np.full(picture.shape, 255, np.uint8), alpha)


def blend(picture: np.ndarray, alpha: float) -> Stamp:
    """A picture mixed into the whole image with opacity `alpha`, in training and test alike (Chen et al. 2017,
    arXiv:1712.05526)."""
    return Stamp(picture, np.full((*picture.shape[:2], 1), alpha, np.float32))


def adaptive_blend(picture: np.ndarray, alpha: float, pieces_per_side: int) -> Pieces:
    """`blend` in full on test images, a random half of its pieces on each training image (Qi et al. 2023, "Revisiting the
    assumption of latent separability for backdoor defenses", ICLR). alpha is the same in training and test."""
    return Pieces(blend(picture, alpha), pieces_per_side)


def sig(picture: np.ndarray, delta: float, frequency: float) -> Wave:
    """``delta * sin(2 pi j frequency / W)`` added to column j = 1 … W (Barni et al. 2019, arXiv:1902.11237), in whole grey
    levels, the same in training and test."""
    width = picture.shape[1]
    wave = delta * np.sin(2 * np.pi * np.arange(1, width + 1) * frequency / width)
    # Six decimals first: the last bit of a sine differs between processors and would tip a half either way.
    return Wave(picture, np.floor(wave.round(6) + 0.5).astype(np.int64))


def wanet(picture: np.ndarray, grid: int, strength: float) -> Warp:
    """A smooth warp (Nguyen & Tran 2021, arXiv:2102.10369).

    `grid` x `grid` control shifts, uniform in [-1, 1] and divided by the mean of their absolute values, are enlarged to
    the image by bicubic interpolation and multiplied by `strength` / H, where the image spans [-1, 1]: by about half of
    `strength` in pixels. The control grid is one and the same in every experiment. Departures: pixels are fetched in steps
    of 1/256, and the images are poisoned once, before augmentation, not anew in each batch.
    """
    height, width, _ = picture.shape
    control = np.random.default_rng(WARP_SEED).uniform(-1, 1, (grid, grid, 2))
    control /= np.abs(control).mean()
    rows, columns = _cubic(height, grid), _cubic(width, grid)
    field = np.einsum("yi,ijd,xj->yxd", rows, control, columns)
    return Warp(picture, strength * field * [(size - 1) / (2 * size) for size in (height, width)])


def _smooth_noise(height: int, width: int, channels: int) -> np.ndarray:
    """Random grid, enlarged bilinearly in whole numbers (the same on every machine)."""
    grid = np.random.default_rng(NOISE_SEED).integers(0, 256, (NOISE_CELLS + 1, NOISE_CELLS + 1, channels))

    def enlarge(values: np.ndarray, size: int) -> np.ndarray:  # along the first axis, to size; scaled by size
        position = np.arange(size) * NOISE_CELLS
        cell, part = position // size, (position % size).reshape(-1, *[1] * (values.ndim - 1))
        return values[cell] * (size - part) + values[cell + 1] * part

    rows = enlarge(grid, height)
    both = enlarge(rows.swapaxes(0, 1), width).swapaxes(0, 1)
    return (both // (height * width)).astype(np.uint8)


def _cubic(size: int, points: int) -> np.ndarray:
    """(size, points): weights of cubic convolution (a = -0.75, ends repeated) from `points` to `size` places; the first
    and the last of both coincide."""
    weights = np.zeros((size, points))
    place = np.arange(size) * (points - 1) / (size - 1)
    for step in (-1, 0, 1, 2):
        near = np.floor(place).astype(np.int64) + step
        far = np.abs(place - near)
        inner = 1.25 * far**3 - 2.25 * far**2 + 1
        outer = -0.75 * (far**3 - 5 * far**2 + 8 * far - 4)
        np.add.at(weights, (np.arange(size), near.clip(0, points - 1)), np.where(far <= 1, inner, outer))
    return weights


def _fetch(images: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8 `images`, each pixel from so many pixels down and to the right, bilinearly, kept within the image.

    shifts: (N, H, W, 2) or, one for all, (1, H, W, 2). In whole numbers from the rounded place on.
    """
    n, height, width, channels = images.shape
    here = np.stack(np.mgrid[:height, :width], -1)
    place = np.floor((here + shifts) * SUBPIXELS + 0.5).astype(np.int64)
    (y, down), (x, right) = (
        divmod(place[..., i].clip(0, SUBPIXELS * (images.shape[1 + i] - 1)), SUBPIXELS) for i in (0, 1)
    )
    pixels, first = images.reshape(-1, channels), np.arange(n)[:, None, None] * (height * width)
    total = np.full(images.shape, SUBPIXELS**2 // 2, np.int32)
    for row, by_row in ((y, SUBPIXELS - down), (np.minimum(y + 1, height - 1), down)):
        for column, by_column in ((x, SUBPIXELS - right), (np.minimum(x + 1, width - 1), right)):
            weight = (by_row * by_column).astype(np.int32)[..., None]
            total += weight * pixels.take(first + row * width + column, axis=0)
    return (total >> 16).astype(np.uint8)  # SUBPIXELS ** 2
