"""Image files as cameras, editors and notebooks leave them: which of a folder's files are images, and their pixels."""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Endings of the files that are read, in lower case; upper case will do."""

MAX_PIXELS = 89_478_485
"""Width times height of the largest image that is read: Pillow's own limit, 256 MiB as RGB.

Above twice its own limit Pillow refuses by itself; who trusts such files raises ``PIL.Image.MAX_IMAGE_PIXELS``, too.
"""

Mode = Literal["L", "RGB"]

# By content, not by name: Pillow would start Ghostscript for an EPS file that is called cat.png.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
_OTHER_IMAGES = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".tga", ".ico", ".psd", ".eps", ".svg", ".dng", ".cr2", ".cr3",
    ".nef", ".arw",
)  # fmt: skip
_LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # of macOS' archives, network storage and Windows
_ORIENTATION = 0x0112
_CHUNK = 1024


def find_images(folder: Path) -> list[Path]:
    """All images in ``folder`` and below, sorted; links are followed, but not back to a folder that they are in.

    Hidden files and folders (``.DS_Store``, ``._a.png``, ``.ipynb_checkpoints``) and litter such as ``__MACOSX`` are no
    data. Images whose ending is not in `ENDINGS` are left out with a warning.

    Raises:
        ValueError: a folder that cannot be listed, or a link to nothing.
    """
    found, unread = [], []
    for path in _walk(folder, frozenset()):
        ending = path.suffix.lower()
        if ending in ENDINGS:
            found.append(path)
        elif ending in _OTHER_IMAGES:
            unread.append(path)
    if unread:
        warnings.warn(
            f"{folder}: {len(unread)} files such as {unread[0].name} are left out: expected images that end in "
            f"one of {', '.join(ENDINGS)}",
            stacklevel=3,
        )
    return sorted(found)


def visible(folder: Path) -> list[Path]:
    """What is in ``folder`` but for hidden files and folders, and litter.

    Raises:
        ValueError: as `find_images`.
    """
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in _LITTER]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed: {error}") from error
    for path in entries:
        if not path.exists():
            raise ValueError(f"{path}: a link to nothing, {os.readlink(path)}")
    return entries


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The files in ``folder`` and below; ``above`` are the real paths of the folders on the way to it."""
    real = folder.resolve()
    if real in above:
        return
    for path in visible(folder):
        if path.is_dir():
            yield from _walk(path, above | {real})
        else:
            yield path


@contextmanager
def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image file at ``path``, whose pixels need not be decoded yet: the first of several frames.

    Raises:
        ValueError: with the path, also for what happens inside the block: damaged, no image of the formats that are
            read, more than 8 bits a grey value, or more than ``max_pixels``.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise ValueError("not a file" if path.exists() else "there is no such file")
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} are more than {max_pixels} pixels")
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to 0..255 silently
                raise ValueError(f"expected 8 bits a channel, got mode {image.mode}")
            yield image
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: cannot be decoded: expected one of {', '.join(_FORMATS)}") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(f"{path}: cannot be decoded: {str(error) or type(error).__name__}") from error


def read_image(path: Path, mode: Mode, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The pixels, upright as the camera says, of kind ``mode``; what is transparent has the colour that it hides.

    Raises:
        ValueError: as `open_image`.
    """
    with open_image(path, max_pixels) as image:
        image.load()
        upright: Image.Image = image
        with suppress(Exception):  # EXIF that cannot be read says nothing
            upright = ImageOps.exif_transpose(image)
        return _convert(upright, mode)


def check_images(
    paths: Sequence[Path], *, decode: bool, max_pixels: int = MAX_PIXELS
) -> list[tuple[tuple[int, int], Mode]]:
    """Open every file, so that none is found damaged when hours of training are over.

    Args:
        paths: of N images.
        decode: whether pixels are decoded, too: otherwise a file whose header is good may be damaged.
        max_pixels: see `open_image`.

    Returns:
        Of each the (width, height), upright, and whether it is grey, ``"L"``, or ``"RGB"``.

    Raises:
        ValueError: as `open_image`.
    """

    def check(path: Path) -> tuple[tuple[int, int], Mode]:
        with open_image(path, max_pixels) as image:
            if image.format == "TIFF":
                image.load()  # turns itself upright
            size = image.size
            mode: Mode = "L" if Image.getmodebase(image.mode) == "L" else "RGB"
            if decode:
                image.draft(None, (1, 1))  # a JPEG's bits are all read, but not all of its pixels are computed
                _convert(image, mode)
            turned = False
            with suppress(Exception):
                # Image's own method, as that of PNG would decode the pixels.
                turned = Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return size[::-1] if turned else size, mode

    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours, and an error
        return [
            found for start in range(0, len(paths), _CHUNK) for found in pool.map(check, paths[start : start + _CHUNK])
        ]


def _convert(image: Image.Image, mode: Mode) -> Image.Image:
    if image.mode in ("P", "PA"):  # Pillow warns of a palette with transparency that becomes RGB at once
        image = image.convert("RGBA")
    return image.convert(mode)
