"""Image files as cameras, editors and notebooks leave them, and what must not be opened."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

from sparse_moon.app.image_files import ENDINGS, MAX_PIXELS, check_images, find_images, read_image

SIZE = (7, 5)


def picture(mode: str = "RGB", seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode) if mode != "LA" else image.convert("LA")


def test_what_torchvision_reads_is_read():
    assert set(ENDINGS) > set(IMG_EXTENSIONS)


def test_all_modes_are_what_pillow_makes_of_them(tmp_path: Path) -> None:
    see_through = picture("RGBA").quantize(16)
    files = {
        "1.png": picture("1"), "L.png": picture("L"), "LA.png": picture("LA"), "P.png": picture("P"),
        "transparent.png": see_through, "RGB.bmp": picture(), "RGBA.png": picture("RGBA"), "RGBA.webp": picture("RGBA"),
        "CMYK.tif": picture("CMYK"), "CMYK.jpg": picture("CMYK"), "a.gif": picture("P"), "L.pgm": picture("L"),
    }  # fmt: skip
    assert isinstance(see_through.info.get("transparency", b""), bytes)
    for name, image in files.items():
        image.save(tmp_path / name)
        with Image.open(tmp_path / name) as opened:
            expected = opened.convert("RGBA").convert("RGB") if opened.mode == "P" else opened.convert("RGB")
        assert np.array_equal(read_image(tmp_path / name, "RGB"), expected), name
        assert read_image(tmp_path / name, "L").mode == "L"
    found = check_images([tmp_path / name for name in files], decode=True)
    assert {size for size, _ in found} == {SIZE}
    assert [name for name, (_, mode) in zip(files, found, strict=True) if mode == "L"] == [
        "1.png", "L.png", "LA.png", "L.pgm",
    ]  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_images_are_upright(tmp_path: Path, ending: str, orientation: int) -> None:
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    assert expected.size == (SIZE[::-1] if orientation > 4 else SIZE)
    assert np.array_equal(read_image(path, "RGB"), expected)
    for decode in (False, True):
        assert check_images([path], decode=decode) == [(expected.size, "RGB")]


def test_unreadable_exif_says_nothing(tmp_path: Path) -> None:
    for i, exif in enumerate((b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0")):
        path = tmp_path / f"{i}.jpg"
        picture().save(path, exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read_image(path, "RGB").size == SIZE
            assert check_images([path], decode=True) == [(SIZE, "RGB")]


def test_first_of_several_frames(tmp_path: Path) -> None:
    frames = [picture("P", seed) for seed in range(3)]
    for ending, kind in (("gif", "GIF"), ("tif", "TIFF")):
        frames[0].save(tmp_path / f"a.{ending}", kind, save_all=True, append_images=frames[1:])
        assert np.array_equal(read_image(tmp_path / f"a.{ending}", "RGB"), frames[0].convert("RGB"))
    views = [picture(seed=seed) for seed in range(2)]  # as cameras with two lenses write .jpg files
    views[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=views[1:], quality=100)
    first = np.asarray(read_image(tmp_path / "a.jpg", "L")).astype(int)
    near, far = (abs(first - np.asarray(view.convert("L"))).mean() for view in views)
    assert near < 20 < far


def test_litter_is_no_data(tmp_path: Path) -> None:
    wanted = ["A.PNG", "b b.Jpg", "ü/é 1.jpeg", "ü/deep/c.TIFF", "c.png.gif", "x.webp"]
    litter = [".DS_Store", "._A.PNG", ".hidden.png", "Thumbs.db", "desktop.ini", "notes.txt",
              ".ipynb_checkpoints/A.png", "__MACOSX/ü/c.png", "ü/.cache/d.png", "@eaDir/A.png"]  # fmt: skip
    for name in [*wanted, *litter]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == sorted(tmp_path / name for name in wanted)


def test_images_of_other_formats_are_said(tmp_path: Path) -> None:
    for name in ("a.png", "b.HEIC", "c.svg"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"2 files such as (b.HEIC|c.svg) are left out: expected .*\.jpg"):
        assert find_images(tmp_path) == [tmp_path / "a.png"]


def test_links_are_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "set", tmp_path / "elsewhere"
    for folder, count in ((inside / "a", 4), (outside, 5)):
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.png").touch()
    (inside / "b").symlink_to(outside)
    (inside / "a" / "one.png").symlink_to(outside / "0.png")
    (inside / "a" / "round").symlink_to(inside)
    (outside / "back").symlink_to(inside / "a")
    names = [str(path.relative_to(inside)) for path in find_images(inside)]
    own = ["0.png", "1.png", "2.png", "3.png", "one.png"]
    # elsewhere/back is a once more, by another way; round leads back and is not followed
    assert sorted(names) == sorted(
        [*(f"a/{n}" for n in own), *(f"b/{i}.png" for i in range(5)), *(f"b/back/{n}" for n in own)]
    )
    (inside / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone: a link to nothing, .*nowhere"):
        find_images(inside)


def test_formats_are_known_by_content(tmp_path: Path) -> None:
    """Ghostscript would run for the first, the second is no image at all."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\nshowpage\n"
    for content in (eps, b"<svg/>", b""):
        (tmp_path / "cat.png").write_bytes(content)
        for call in (lambda p: read_image(p, "RGB"), lambda p: check_images([p], decode=False)):
            with pytest.raises(ValueError, match=r"cat\.png: cannot be decoded: expected one of PNG, JPEG"):
                call(tmp_path / "cat.png")
    picture().save(tmp_path / "really.png", "JPEG")
    assert read_image(tmp_path / "really.png", "RGB").size == SIZE


@pytest.mark.parametrize("side", [9_500, 20_000])
def test_bombs_are_errors(tmp_path: Path, side: int) -> None:
    """Pillow warns of the first alone, and refuses the second."""
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 10**6 and side**2 > MAX_PIXELS
    with pytest.raises(ValueError, match=r"bomb\.png: cannot be decoded: "):
        check_images([path], decode=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"bomb\.png: cannot be decoded: "):
            read_image(path, "L")
    picture().save(path)
    with pytest.raises(ValueError, match="7 x 5 are more than 34 pixels"):
        read_image(path, "L", max_pixels=34)
    assert read_image(path, "L", max_pixels=35).size == SIZE


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_truncated_files_are_errors(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    picture(size=(40, 30)).save(path)
    whole = path.read_bytes()
    for part in (0.02, 0.5, 0.9):
        path.write_bytes(whole[: int(part * len(whole))])
        for call in (lambda p: read_image(p, "RGB"), lambda p: check_images([p], decode=True)):
            with pytest.raises(ValueError, match=rf"a\.{ending}: cannot be decoded"):
                call(path)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_damaged_files_decode_or_are_one_kind_of_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    picture(size=(40, 30)).save(path)
    whole, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's of strange metadata
        for _ in range(200):
            damaged = whole.copy()
            for place in rng.integers(min(len(whole), 200), size=3):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                read_image(path, "RGB", max_pixels=10**6)
            except ValueError as error:
                assert str(error).startswith(f"{path}: cannot be decoded: ")


def test_any_exception_of_a_decoder_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "a.png")
    for kind in (MemoryError, EOFError, SyntaxError, IndexError, OverflowError):

        def fail(*args: Any, kind: type[Exception] = kind) -> None:
            raise kind("too much")

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(ValueError, match=r"a\.png: cannot be decoded: too much"):
            read_image(tmp_path / "a.png", "RGB")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, message in (("pipe", "not a file"), ("folder", "not a file"), ("gone", "there is no such file")):
        with pytest.raises(ValueError, match=rf"{name}\.png: cannot be decoded: {message}"):
            check_images([tmp_path / f"{name}.png"], decode=False)
