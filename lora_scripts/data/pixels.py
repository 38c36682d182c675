"""From an image file to the pixels that are trained on: 8-bit sRGB, upright, without alpha."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from lora_scripts.data.buckets import Size, crop_box
from lora_scripts.errors import Problem, UserError
from lora_scripts.files import AnyPath

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP")  # by content; MPO: a JPEG with further pictures

# What Pillow raises on files that are damaged (found by feeding it damaged files).
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILE_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}


@contextmanager
def open_image(path: AnyPath) -> Iterator[ImageFile.ImageFile]:
    """Open an image, header only; errors of decoding inside the block are said to the user.

    Raises:
        UserError: naming the file, if it is no image, of a kind not read, or damaged.
    """
    try:
        with Image.open(path) as image:
            if image.format not in FORMATS:
                what = f"its content is {image.format}; {_SAVE_AS}"
                raise UserError([Problem(str(path), what, "error", "unread-format")])
            yield image
    except UserError:
        raise
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        kind, what = _reason(path, error)
        raise UserError([Problem(str(path), what, "error", kind)]) from error


def load_rgb(path: AnyPath) -> Image.Image:
    """The picture in a file as RGB, 8 bits a channel, as a viewer shows it on a white page.

    EXIF orientation is applied. Alpha (channel, palette or one transparent colour) is blended
    over white. 16-bit grey is divided by 257 and rounded; 16-bit colour keeps the high byte, as
    Pillow decodes it. Grey, CMYK and RGB with an embedded ICC profile are converted to sRGB; a
    profile that cannot be read or is for another kind of pixels is left out, as viewers do, and
    the colours taken as sRGB (`looking.look` remarks it). Of an animation the first frame is taken.

    Raises:
        UserError: naming the file, if it cannot be decoded.
    """
    with _loaded(path) as (image, turn):
        rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def load_alpha(path: AnyPath) -> Image.Image | None:
    """The alpha channel of an image file (mode L), upright; None if there is none.

    Raises:
        UserError: naming the file, if it cannot be decoded.
    """
    with _loaded(path) as (image, turn):
        _, alpha = _split(image)
    return alpha if alpha is None or turn is None else alpha.transpose(turn)


@contextmanager
def _loaded(path: AnyPath) -> Iterator[tuple[ImageFile.ImageFile, Image.Transpose | None]]:
    """An image decoded, and how it must be turned to be upright."""
    with open_image(path) as image:
        turn = _TURNS.get(orientation(image) or 1)
        colour_key_16 = _colour_key_16(image)
        image.load()
        if colour_key_16 is not None:
            image.info["transparency"] = colour_key_16
        yield image, turn


def upright_size(image: ImageFile.ImageFile) -> Size:
    """(width, height) in pixels of an image as `load_rgb` turns it; reads the header only."""
    width, height = image.size
    return (height, width) if (orientation(image) or 1) >= 5 else (width, height)


def orientation(image: ImageFile.ImageFile) -> int | None:
    """The EXIF orientation, 1 to 8 (1, upright, if none is given); None if EXIF is unreadable."""
    late = image.format == "PNG" and "exif" not in image.info
    if late and (exif := _late_png_exif(os.fsdecode(image.filename))) is not None:
        image.info["exif"] = exif
    try:
        # PNG's own getexif decodes the whole picture to look for EXIF behind it
        found = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except _DECODE_ERRORS:
        return None
    return found if found in range(1, 9) else 1


def profile_fits(profile: bytes, mode: str) -> bool:
    """Whether an embedded ICC profile can be read and describes pixels of this mode."""
    return _read_profile(profile, _colour_mode(mode)) is not None


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode of PNG, JPEG, WebP and BMP as sRGB on white; not turned.

    Raises:
        ValueError: for a mode without a fixed range or meaning (32-bit, float, Lab …).
    """
    colour, alpha = _split(image)
    rgb = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def to_bucket(
    image: Image.Image, bucket: Size, corner: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """An image scaled to cover `bucket` (width, height) and cut to it.

    Cut at `corner` (left, top in the scaled image), by default from the middle.

    Lanczos, which in Pillow averages over all source pixels when it reduces. Only the part that is
    kept is scaled, so that a very long image needs no more memory than another.

    Returns:
        pixels_HWC, uint8, RGB; pixels_HW of a grey image.
    """
    (wide, high), middle = crop_box(image.size, bucket)
    left, top = middle if corner is None else corner
    across, down = image.width / wide, image.height / high
    box = (
        left * across,
        top * down,
        min((left + bucket[0]) * across, image.width),
        min((top + bucket[1]) * down, image.height),
    )
    return np.array(image.resize(bucket, Image.Resampling.LANCZOS, box=box))


# --- colour and alpha -----------------------------------------------------------------------------


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours (mode L, RGB or CMYK) and the alpha (mode L), if there is any."""
    match image.mode:
        case "I;16" | "I;16L" | "I;16B":
            return _split_16_bit(image)
        case "LA":
            return image.getchannel("L"), image.getchannel("A")
        case "1" | "L" | "P" | "PA" | "RGB" | "RGBA" if image.has_transparency_data:
            rgba = image.convert("RGBA")
            colour = rgba.convert("RGB")
            grey = image.mode in ("1", "L")
            return (colour.getchannel("R") if grey else colour), rgba.getchannel("A")
        case "1" | "L" | "P" | "RGB" | "CMYK":
            return image.convert(_colour_mode(image.mode)), None
        case _:
            raise ValueError(f"pixels of the kind {image.mode} have no fixed range; {_SAVE_AS}")


def _split_16_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values_HW = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))
    if (key := image.info.get("transparency")) is None:
        return grey, None
    return grey, Image.fromarray(np.where(values_HW == key, 0, 255).astype(np.uint8))


def _colour_key_16(image: ImageFile.ImageFile) -> tuple[int, ...] | None:
    """The transparent colour of a 16-bit RGB PNG, at the 8 bits that Pillow decodes such a file to.

    Pillow compares the file's 16-bit numbers with its 8-bit pixels. Call before decoding.
    """
    key = image.info.get("transparency")
    deep = any("RGB;16B" in str(tile.args) for tile in image.tile)
    return tuple(value >> 8 for value in key) if deep and isinstance(key, tuple) else None


def _colour_mode(mode: str) -> str:
    """What the colours of a mode are once bit depth, palette and alpha are resolved."""
    if mode == "CMYK":
        return "CMYK"
    return "L" if mode in ("1", "L", "LA") or mode.startswith("I;16") else "RGB"


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    source = _read_profile(profile, colour.mode) if profile else None
    if source is None:
        return colour.convert("RGB")
    target = ImageCms.createProfile("sRGB")
    try:
        converted = ImageCms.profileToProfile(colour, source, target, outputMode="RGB")
    except ImageCms.PyCMSError:
        return colour.convert("RGB")
    assert converted is not None  # None only when it converts in place
    return converted


def _read_profile(profile: bytes, mode: str) -> ImageCms.ImageCmsProfile | None:
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except OSError:
        return None
    return found if _PROFILE_MODES.get(found.profile.xcolor_space) == mode else None


# --- headers ------------------------------------------------------------------------------------

_SAVE_AS = "save it as an 8-bit PNG, JPEG or WebP"


def _late_png_exif(path: AnyPath) -> bytes | None:
    """EXIF behind the pixels of a PNG (some tools append it), found without decoding."""
    with open(path, "rb", buffering=0) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"eXIf":
                return b"Exif\0\0" + file.read(length)
            if name == b"IEND":
                break
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _reason(path: AnyPath, error: Exception) -> tuple[str, str]:
    """The kind of problem, and what the user is told."""
    text = re.sub(r"\s+", " ", str(error))
    if isinstance(error, FileNotFoundError):
        return "unreadable-file", "there is no such file"
    if isinstance(error, OSError) and error.errno is not None:
        return "unreadable-file", f"the file cannot be read ({error.strerror})"
    if isinstance(error, Image.DecompressionBombError):
        what = (
            f"the image is too large to be decoded safely ({text}); make it smaller, a training "
            "resolution needs a few megapixels at most"
        )
        return "too-large", what
    if os.path.getsize(path) == 0:
        return "empty-file", "the file is empty (0 bytes); replace it or remove it"
    if isinstance(error, UnidentifiedImageError):
        what = "this is not an image, or its header is damaged; replace it or remove it"
        return "not-an-image", what
    if "truncated" in text.lower():
        return "truncated", f"the file is cut short ({text}); replace it or remove it"
    return "damaged", f"the file is damaged ({text}); replace it or remove it"
