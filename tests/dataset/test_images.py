"""What becomes of a user's image file, whatever it is."""

import errno
import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from components.config.data import DataLimits
from components.dataset.images import Picture, _pixels, load, read
from components.errors import Refusal, TryAgainError

LIMITS = DataLimits(max_pixels=10_000, max_image_mib=1, max_text_chars=1000, max_bad_ratio=0.1)
GRADIENT = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def decoded(picture: Picture) -> np.ndarray:
    with Image.open(io.BytesIO(picture.content)) as image:
        assert image.mode == "RGB"
        assert not getattr(image, "is_animated", False)
        assert image.getexif().get(0x0112, 1) == 1
        return np.asarray(image)


# --- kept or made plain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_plain_files_keep_their_bytes(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, Image.fromarray(GRADIENT))
    assert load(path, LIMITS).content == path.read_bytes()


def test_a_colour_that_is_declared_transparent_is_white(tmp_path: Path) -> None:
    for mode, clear, other in (("RGB", (0, 0, 0), (9, 9, 9)), ("L", 0, 9), ("I;16", 300, 9 << 8)):
        image = Image.new(mode, (8, 8), clear)
        image.putpixel((0, 0), other)
        pixels = decoded(load(saved(tmp_path / f"{mode[0]}.png", image, transparency=clear), LIMITS))
        assert pixels[0, 0].tolist() == [9, 9, 9] and (pixels[1:] == 255).all()


def test_the_name_does_not_say_what_a_file_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.fromarray(GRADIENT), format="PNG")
    assert load(path, LIMITS).content == path.read_bytes()


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    path = saved(tmp_path / "a.png", Image.fromarray(GRADIENT), exif=exif)
    assert np.array_equal(decoded(load(path, LIMITS)), np.rot90(GRADIENT, -1))
    jpeg = load(saved(tmp_path / "a.jpg", Image.fromarray(GRADIENT), exif=exif), LIMITS)
    assert Image.open(io.BytesIO(jpeg.content)).format == "JPEG"
    assert decoded(jpeg).shape == (30, 20, 3)


def test_exif_rotation_is_applied_to_other_modes_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    path = saved(tmp_path / "a.png", Image.fromarray(GRADIENT[..., 0]), exif=exif)
    assert np.array_equal(decoded(load(path, LIMITS))[..., 1], np.rot90(GRADIENT[..., 0], 2))


@pytest.mark.parametrize("damaged", [(0x011A, b"72\0\0"), (0x0112, b"6\0\0\0")], ids=["resolution", "orientation"])
def test_damaged_exif_data_cost_no_image(tmp_path: Path, damaged: tuple[int, bytes]) -> None:
    key, text = damaged
    entry = struct.pack("<HHHI", 1, key, 2, 3) + text  # text, where a number is to be
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry + bytes(4)
    path = saved(tmp_path / "a.png", Image.fromarray(GRADIENT[..., 0]), exif=exif)
    assert np.array_equal(decoded(load(path, LIMITS))[..., 1], GRADIENT[..., 0])


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (20, 20), (255, 0, 0, 0))
    assert np.abs(decoded(load(saved(tmp_path / "a.jpg", cyan), LIMITS)).astype(int) - (0, 255, 255)).max() < 8


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    grey = (np.arange(600, dtype=np.uint16) * 100).reshape(20, 30)
    pixels = decoded(load(saved(tmp_path / "a.png", Image.fromarray(grey)), LIMITS))
    assert np.array_equal(pixels, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        path = saved(
            tmp_path / name,
            frames[0],
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if "webp" in name else {}),
        )
        assert (decoded(load(path, LIMITS)) == (255, 0, 0)).all(), name


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = saved(tmp_path / "a.png", Image.new("RGBA", (20, 20), (0, 0, 0, 0)))
    assert (decoded(load(clear, LIMITS)) == 255).all()
    half = saved(tmp_path / "b.png", Image.new("RGBA", (20, 20), (0, 0, 0, 128)))
    assert np.abs(decoded(load(half, LIMITS)).astype(int) - 127).max() <= 1
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert (decoded(load(saved(tmp_path / "c.gif", palette, transparency=0), LIMITS)) == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path / "a.tiff", Image.fromarray(GRADIENT).convert(mode))
    assert decoded(load(path, LIMITS)).shape == (20, 30, 3)


def test_equal_pictures_have_one_hash_whatever_their_file(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT)
    paths = [
        saved(tmp_path / "a.png", image),
        saved(tmp_path / "b.bmp", image),
        saved(tmp_path / "c.webp", image, lossless=True),
    ]
    assert len({load(path, LIMITS).sha256 for path in paths}) == 1
    assert load(saved(tmp_path / "d.png", Image.fromarray(GRADIENT.transpose(1, 0, 2))), LIMITS).sha256 not in {
        load(path, LIMITS).sha256 for path in paths
    }


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(Refusal) as refusal:
        load(path, LIMITS)
    assert path.name[:20] in refusal.value.detail
    assert "\n" not in refusal.value.detail
    return refusal.value.reason


@pytest.mark.parametrize(
    ("there", "asked", "said"),
    [
        ("e\u0301.png", "\xe9.png", "the form NFD"),
        ("a b.png", "a%20b.png", "without %20"),
        ("in/a.png", r"in\a.png", "with / for a backslash"),
        ("a.JPG", "a.jpg", "capitals"),
    ],
)
def test_a_name_that_is_spelt_otherwise_is_told(tmp_path: Path, there: str, asked: str, said: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / there).touch()
    with pytest.raises(Refusal) as refusal:
        read(tmp_path / asked, 1)
    assert there in refusal.value.detail and said in refusal.value.detail


def test_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere.png") == "missing_file"
    assert refused(tmp_path) == "missing_file"
    assert refused(tmp_path / "nul\0.png") == "missing_file"
    assert refused(tmp_path / ("long" * 100)) == "missing_file"
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    assert refused(tmp_path / "pipe.png") == "missing_file"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE])
def test_a_disk_that_does_not_answer_costs_no_row(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(TryAgainError, match=r"a\.png cannot be read.*run again"):
        read(tmp_path / "a.png", 1)


def test_zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert refused(tmp_path / "a.png") == "zero_bytes"


@pytest.mark.parametrize(
    "content", [b"this is a text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG"]
)
def test_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(Refusal, match=re.escape(repr(content[:24]))) as refusal:  # a web page, or Git LFS's pointer
        load(tmp_path / "a.png", LIMITS)
    assert refusal.value.reason == "not_an_image"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
def test_truncated(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    path = saved(tmp_path / name, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert refused(path) in ("damaged", "not_an_image")
    if name in ("a.png", "a.jpg", "a.gif", "a.bmp"):
        assert refused(path) == "damaged"


def test_a_decompression_bomb_is_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.core, "zip_decoder", lambda *_: pytest.fail("it was decoded"), raising=True)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: pytest.fail("it was decoded"))
    for side in (101, 1000, 20_000):  # a little above the limit, above twice the limit, 400 million pixels in 49 kB
        path = saved(tmp_path / f"{side}.png", Image.new("1", (side, side)), optimize=True)
        assert path.stat().st_size < 2**20
        assert refused(path) == "too_large"


def test_a_picture_at_the_limit_passes_and_the_limit_is_put_back(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    assert load(saved(tmp_path / "a.png", Image.new("RGB", (100, 100))), LIMITS)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_file_too_large_is_not_even_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (10, 10)))
    with path.open("ab") as file:
        file.truncate(2**20 + 1)
    assert refused(path) == "too_large"


def test_pixels_of_unknown_range(tmp_path: Path) -> None:
    assert refused(saved(tmp_path / "a.tiff", Image.fromarray(np.ones((5, 5), dtype=np.float32)))) == "unsupported"


@given(st.sampled_from(["png", "jpeg", "webp", "gif", "tiff", "bmp"]), st.data())
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_bytes_it_is_a_picture_or_a_refusal(tmp_path: Path, format_: str, data: st.DataObject) -> None:
    file = io.BytesIO()
    Image.fromarray(GRADIENT).save(file, format_)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a"
    path.write_bytes(content)
    try:
        picture = load(path, LIMITS)
    except Refusal as refusal:
        assert refusal.reason in ("damaged", "not_an_image", "too_large", "unsupported")
    else:
        assert decoded(picture).size


@pytest.mark.parametrize("size", [(30, 20), (3000, 2000)], ids=["in one block", "in several"])
def test_pixels_are_the_same_bytes_copied_or_not(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert bytes(_pixels(image)) == image.tobytes("raw", "RGBX")
    assert np.array_equal(np.frombuffer(_pixels(image), np.uint8).reshape(*size[::-1], 4)[..., :3], noise)
