"""Validation of image files and their conversion to plain RGB.

A stored image decodes to one upright 8-bit RGB frame. JPEG, PNG and WebP files that do so already keep their bytes. In
other files EXIF rotation is applied, 16-bit grey loses its low byte, transparency is composited on white, CMYK and other
modes are converted, and animations are reduced to the first frame; they are stored as JPEG (quality 95) if they were
JPEG, else as PNG.
"""

from __future__ import annotations

import errno
import hashlib
import io
import unicodedata
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from xxhash import xxh3_128_hexdigest

from components.config.data import DataLimits
from components.dataset.perceptual_hash import dhash
from components.errors import LIMITS, AlignTIError, Refusal, TryAgainError

KEPT = ("JPEG", "PNG", "WEBP")
READ = (*KEPT, "GIF", "BMP", "TIFF")  # raster formats only: Pillow would hand an EPS file to Ghostscript
PASSING = (*LIMITS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN)  # no file's own fault


class Picture(NamedTuple):
    content: bytes  # the file to store
    sha256: str  # hash of size and pixels (XXH3), independent of file name and encoding
    dhash: int  # see components/dataset/perceptual_hash.py


def load(path: Path, limits: DataLimits) -> Picture:
    """Checked image of a file. Raises Refusal: missing_file, zero_bytes, too_large, not_an_image, damaged or unsupported."""
    return check(read(path, limits.max_image_mib), str(path), limits)


def check(content: bytes, path: str, limits: DataLimits) -> Picture:
    """Decode and check an image file's bytes. `path`: its name in messages. Raises Refusal as `load`."""
    if not content:
        raise Refusal("zero_bytes", f"{path} is empty")
    if len(content) > limits.max_image_mib * 2**20:
        raise too_large(path, len(content), limits.max_image_mib)
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd but readable files
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return decode(content, path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Refusal("too_large", f"{path} has more than limits.max_pixels = {limits.max_pixels:,} pixels") from None
    except UnidentifiedImageError:
        raise Refusal("not_an_image", f"{path} is none of {', '.join(READ)}: it begins with {content[:24]!r}") from None
    except (Refusal, AlignTIError):
        raise
    except Exception as error:  # decoders may raise anything on invalid bytes
        raise Refusal("damaged", f"{path} is truncated or damaged: {error}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def too_large(path: str, size: int, max_mib: float) -> Refusal:
    return Refusal("too_large", f"{path} has {size / 2**20:.1f} MiB, more than limits.max_image_mib = {max_mib:g}")


def read(path: Path, max_mib: float) -> bytes:
    """Content of an image file. Raises Refusal: missing_file or too_large; TryAgainError as `unreadable`."""
    try:
        if not path.is_file():
            raise Refusal("missing_file", f"{path} is no file{_spelt_otherwise(path)}")
        if (size := path.stat().st_size) > max_mib * 2**20:
            raise too_large(str(path), size, max_mib)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> Refusal | TryAgainError:
    """Refusal missing_file; TryAgainError if the disk, its server or the process is at fault: no row is lost for it."""
    if getattr(error, "errno", None) in PASSING:
        return TryAgainError(
            f"{path} cannot be read: {error}; run again to go on, and if that does not pass, restore the file or drop its rows"
        )
    return Refusal("missing_file", f"{str(path)!r} cannot be read: {error}")


def _spelt_otherwise(path: Path) -> str:
    """Remark on a file that differs in its Unicode form (a Mac's), %20, backslashes or its ending's capitals; or nothing."""
    text = str(path)
    stem, dot, ending = text.rpartition(".")
    spellings = {f"its name is in the form {form}": unicodedata.normalize(form, text) for form in ("NFC", "NFD")} | {
        "write it without %20 and the like": unquote(text),
        "write it with / for a backslash": text.replace("\\", "/"),
        "its ending has other capitals": f"{stem}{dot}{ending.swapcase()}",
    }
    for how, name in spellings.items():
        if name != text and Path(name).is_file():
            return f", but {name} is: {how}"
    return ""


def decode(content: bytes, path: str) -> Picture:
    """Picture of an image file's bytes, of any size. Raises Refusal: unsupported; and whatever Pillow raises."""
    with Image.open(io.BytesIO(content), formats=READ) as image:
        image.load()  # the first frame
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        opaque = image.mode == "RGB" and not image.has_transparency_data
        plain = opaque and orientation == 1 and not getattr(image, "is_animated", False)
        rgb = image if plain else ImageOps.exif_transpose(_rgb(image, path, orientation))
        digest = hashlib.sha256(f"{rgb.size} {xxh3_128_hexdigest(_pixels(rgb))}".encode()).hexdigest()
        if not plain or image.format not in KEPT:
            content = _encode(rgb, "JPEG" if image.format in ("JPEG", "MPO") else "PNG")
        return Picture(content, digest, dhash(rgb))


def _pixels(image: Image.Image) -> Any:
    """Pillow's RGB buffer, four bytes per pixel; copied only if a large image lies in several blocks."""
    import pyarrow as pa

    try:
        return pa.array(image).buffers()[-1]
    except ValueError:
        return image.tobytes("raw", "RGBX")


def _rgb(image: Image.Image, path: str, orientation: Any) -> Image.Image:
    """8-bit RGB image whose EXIF data are the original's orientation alone: Pillow cannot write damaged entries again."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        shown = np.where(grey == image.info.get("transparency"), 255, grey >> 8)
        converted = Image.fromarray(shown.astype(np.uint8)).convert("RGB")
    elif image.mode in ("I", "F", "LAB"):
        raise Refusal("unsupported", f"{path} has {image.mode} pixels, whose range is not known; convert it to 8-bit RGB")
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        converted = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    else:
        converted = image.convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = int(orientation) if orientation in range(1, 9) else 1
    converted.info["exif"] = exif.tobytes()
    return converted


def _encode(image: Image.Image, format_: str) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(file, format_, quality=95)  # pixels without metadata
    return file.getvalue()
