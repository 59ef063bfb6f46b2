"""Triggers: pure functions on uint8 images, before any augmentation or normalisation.

A trigger is a pattern and its opacity: ``round((1 - alpha) * image + alpha * pattern)``. Both are stored in the poison
index, so that whoever reads it can stamp the test images too.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stages.lib.errors import UserError

NOISE_SEED = 0  # the Blend pattern is the same in every experiment: it belongs to the attack, not to the seed
NOISE_CELLS = 8  # grid of random values that is enlarged to the image: smooth enough to survive crops and JPEG


@dataclass(frozen=True)
class Stamp:
    """pattern: (H, W, C) uint8. alpha: (H, W, 1) float32 in [0, 1], 0 where the image shows through unchanged."""

    pattern: np.ndarray
    alpha: np.ndarray

    def apply(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, C) uint8 to a new array of the same kind; halves are rounded up."""
        if images.shape[1:] != self.pattern.shape:
            raise UserError(f"the trigger is made for images of shape {self.pattern.shape}, got {images.shape[1:]}")
        touched = self.alpha[..., 0] > 0
        stamped = images.copy()
        alpha = self.alpha[touched].astype(np.float64)
        # The small term keeps a half from falling below itself: a float32 alpha is off by up to 3e-8, times 255.
        blended = (1 - alpha) * images[:, touched] + alpha * self.pattern[touched]
        stamped[:, touched] = np.floor(blended + 0.5 + 1e-5).astype(np.uint8)
        return stamped


def badnets(shape: tuple[int, int, int], size: int) -> Stamp:
    """White square of `size` pixels a side in the bottom-right corner, no margin (Gu et al. 2017, arXiv:1708.06733)."""
    height, width, _ = shape
    if size > min(height, width):
        raise UserError(
            f"a patch of {size} pixels does not fit an image of {height} x {width}; lower poison.trigger.size"
        )
    alpha = np.zeros((height, width, 1), np.float32)
    alpha[height - size :, width - size :] = 1
    return Stamp(np.full(shape, 255, np.uint8), alpha)


def blend(shape: tuple[int, int, int], alpha: float, pattern: str) -> Stamp:
    """A picture mixed into the whole image with opacity `alpha`, in training and test alike (Chen et al. 2017,
    arXiv:1712.05526).

    pattern: ``noise``, a smooth random picture, or the path of a picture, resized to the images. The poison index keeps
    the pattern, and DVC does not watch the picture's file: give a changed picture a new name.
    """
    height, width, channels = shape
    if pattern == "noise":
        picture = _smooth_noise(height, width, channels)
    else:
        try:
            with Image.open(Path(pattern).expanduser()) as file:
                file = file.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
                picture = np.asarray(file).reshape(shape)
        except Exception as error:  # a broken file makes Pillow raise SyntaxError, ValueError, struct.error, …
            raise UserError(
                f"poison.trigger.pattern {pattern!r} is not a readable picture ({error}); give a path, or noise"
            ) from error
    return Stamp(picture, np.full((height, width, 1), alpha, np.float32))


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
