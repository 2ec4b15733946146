"""Out-of-distribution images that are always at hand: parts of photographs, letters, noise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sparse_moon.app.images import Shape


def _photos(shape: Shape, rng: np.random.Generator) -> Tensor:
    from sklearn.datasets import load_sample_images  # here, because importing it takes seconds

    _, height, width = shape
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    images = []
    for _ in range(_GENERATED_IMAGES):
        photo = photos[rng.integers(len(photos))]
        # Not much smaller than the result where the photographs allow it, so that parts are rarely blown up.
        side = int(rng.integers(min(max(32, height, width), 256), min(photo.size)))
        left, top = (int(rng.integers(extent - side + 1)) for extent in photo.size)
        part = photo.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        images.append(np.array(part))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _letters(shape: Shape, rng: np.random.Generator) -> Tensor:
    import matplotlib  # here, for its fonts alone

    _, height, width = shape
    # Drawn at 64 pixels or more and averaged down, the way scikit-learn's digits were made from larger bitmaps.
    over = max(1, 64 // min(height, width))
    canvas_size = np.array([width, height]) * over
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [
        # Capital letters of DejaVu Sans Mono are 0.73 of the font size high and at most 0.6 of it wide.
        ImageFont.truetype(fonts / file, round(share * min(canvas_size) / 0.73))
        for file in ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf")
        for share in (0.7, 0.8, 0.9)
    ]
    images = []
    for i in range(_GENERATED_IMAGES):
        letter, face = _LETTERS[i % len(_LETTERS)], faces[rng.integers(len(faces))]
        left, top, right, bottom = face.getbbox(letter)
        offset = rng.uniform(-1 / 16, 1 / 16, 2) * canvas_size
        corner = (canvas_size - (left + right, top + bottom)) / 2 + offset
        canvas = Image.new("L", (int(canvas_size[0]), int(canvas_size[1])))
        ImageDraw.Draw(canvas).text((float(corner[0]), float(corner[1])), letter, fill=255, font=face)
        images.append(np.array(canvas.reduce(over)))
    return torch.from_numpy(np.stack(images)).unsqueeze(1)


def _noise(shape: Shape, rng: np.random.Generator) -> Tensor:
    images = [rng.normal(127.5, 64, shape).round().clip(0, 255).astype(np.uint8) for _ in range(_GENERATED_IMAGES)]
    return torch.from_numpy(np.stack(images))


GENERATED: dict[str, Callable[[Shape, np.random.Generator], Tensor]] = {
    "photos": _photos,
    "letters": _letters,
    "noise": _noise,
}
"""Sources by name, from the (C, H, W) of an image: uint8 (1000, 1 or 3, H, W)."""
_GENERATED_IMAGES = 1000
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
