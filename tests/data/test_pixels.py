"""Pixels by hand: each mode of each file format, against values that are known beforehand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from lora_scripts.data.buckets import crop_box
from lora_scripts.data.pixels import (
    load_rgb,
    open_image,
    orientation,
    profile_fits,
    to_bucket,
    to_rgb,
    upright_size,
)
from lora_scripts.errors import UserError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size: tuple[int, int], depth: int, kind: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand: colour kind 0 grey, 2 RGB, 3 palette, 4 grey+alpha, 6 RGBA."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body


def pixels(path: Path) -> list[list[list[int]]]:
    image = load_rgb(path)
    assert image.mode == "RGB"
    found: list[list[list[int]]] = np.asarray(image).tolist()
    return found


def row_of(path: Path, data: bytes) -> list[list[int]]:
    path.write_bytes(data)
    return pixels(path)[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "赛博朋克 图片"
    folder.mkdir()
    return folder / "图01.png"


def test_rgb_and_grey(path: Path) -> None:
    assert row_of(path, png((2, 1), 8, 2, b"\0\1\2\3\xfd\xfe\xff")) == [[1, 2, 3], [253, 254, 255]]
    assert row_of(path, png((2, 1), 8, 0, b"\0\5\xfa")) == [[5] * 3, [250] * 3]
    assert row_of(path, png((2, 1), 4, 0, b"\0\x5f")) == [[85] * 3, [255] * 3]
    assert row_of(path, png((2, 1), 1, 0, b"\0\x40")) == [[0] * 3, [255] * 3]


def test_16_bit_grey_is_scaled_not_clipped(path: Path) -> None:
    values = [0, 128, 129, 257, 32896, 65406, 65407, 65535]
    expected = [0, 0, 1, 1, 128, 254, 255, 255]  # round(value / 257)
    data = png((8, 1), 16, 0, b"\0" + struct.pack(">8H", *values))
    assert row_of(path, data) == [[value] * 3 for value in expected]
    array = np.array([values], np.uint16)
    for image in (Image.fromarray(array), Image.fromarray(array.astype(">u2"))):
        assert image.mode in ("I;16", "I;16B")
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


def test_16_bit_colour_keeps_the_high_byte(path: Path) -> None:
    rgb = png((2, 1), 16, 2, b"\0" + struct.pack(">6H", 0, 257, 32896, 65535, 0x12FF, 0x3400))
    assert row_of(path, rgb) == [[0, 1, 128], [255, 0x12, 0x34]]
    rgba = png((2, 1), 16, 6, b"\0" + struct.pack(">8H", 0, 257, 32896, 65535, 1, 2, 3, 0))
    assert row_of(path, rgba) == [[0, 1, 128], [255] * 3]
    grey = png((2, 1), 16, 4, b"\0" + struct.pack(">4H", 32896, 65535, 7, 0))
    assert row_of(path, grey) == [[128] * 3, [255] * 3]


def test_alpha_is_blended_over_white(path: Path) -> None:
    rgba = png((3, 1), 8, 6, bytes([0, 10, 20, 30, 255, 10, 20, 30, 0, 0, 100, 200, 128]))
    # 128/255 of the colour and 127/255 of white
    assert row_of(path, rgba) == [[10, 20, 30], [255] * 3, [127, 177, 227]]
    grey = png((3, 1), 8, 4, bytes([0, 10, 255, 10, 0, 0, 51]))
    assert row_of(path, grey) == [[10] * 3, [255] * 3, [204] * 3]


def test_palettes(path: Path) -> None:
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
    opaque = png((3, 1), 8, 3, b"\0\2\1\0", palette)
    assert row_of(path, opaque) == [[70, 80, 90], [40, 50, 60], [10, 20, 30]]
    # transparency: entry 0 wholly, entry 1 by four fifths, entry 2 not
    clear = png((3, 1), 8, 3, b"\0\2\1\0", palette, chunk(b"tRNS", bytes([0, 51])))
    assert row_of(path, clear) == [[70, 80, 90], [212, 214, 216], [255] * 3]
    with_alpha = Image.new("PA", (1, 1))
    with_alpha.putpalette([10, 20, 30])
    assert np.asarray(to_rgb(with_alpha)).tolist() == [[[255] * 3]]


def test_one_transparent_colour(path: Path) -> None:
    grey = png((2, 1), 8, 0, b"\0\5\6", chunk(b"tRNS", struct.pack(">H", 5)))
    assert row_of(path, grey) == [[255] * 3, [6] * 3]
    bit = png((2, 1), 1, 0, b"\0\x40", chunk(b"tRNS", struct.pack(">H", 0)))
    assert row_of(path, bit) == [[255] * 3, [255] * 3]
    rgb = png((2, 1), 8, 2, b"\0\5\6\7\5\6\x08", chunk(b"tRNS", struct.pack(">3H", 5, 6, 7)))
    assert row_of(path, rgb) == [[255] * 3, [5, 6, 8]]
    grey16 = png((2, 1), 16, 0, b"\0" + struct.pack(">2H", 1000, 1001))
    assert row_of(path, grey16) == [[4] * 3, [4] * 3]
    key = chunk(b"tRNS", struct.pack(">H", 1000))
    grey16 = png((2, 1), 16, 0, b"\0" + struct.pack(">2H", 1000, 1001), key)
    assert row_of(path, grey16) == [[255] * 3, [4] * 3]
    key = chunk(b"tRNS", struct.pack(">3H", 0x1000, 0x2000, 0x3000))
    rows = b"\0" + struct.pack(">6H", 0x1000, 0x2000, 0x3000, 0x1000, 0x2000, 0x4000)
    assert row_of(path, png((2, 1), 16, 2, rows, key)) == [[255] * 3, [0x10, 0x20, 0x40]]


def test_cmyk_jpeg(path: Path) -> None:
    path = path.with_suffix(".JPG")
    inks = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, expected in inks.items():
        Image.new("CMYK", (8, 8), ink).save(path, "JPEG", quality=100)
        assert b"Adobe" in path.read_bytes()  # stored inverted, as Photoshop does
        np.testing.assert_allclose(pixels(path), np.full((8, 8, 3), expected), atol=2)


def test_webp_and_bmp(path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 100, 200, 128)).save(path, "WEBP", lossless=True, exact=True)
    assert pixels(path)[0][0] == [127, 177, 227]
    Image.new("RGB", (3, 2), (9, 8, 7)).save(path, "BMP")
    assert pixels(path)[1][2] == [9, 8, 7]


LABELLED: NDArray[np.uint8] = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
UPRIGHT = {  # where EXIF says that the first row and the first column stand
    1: LABELLED,
    2: LABELLED[:, ::-1],
    3: LABELLED[::-1, ::-1],
    4: LABELLED[::-1],
    5: LABELLED.T,
    6: np.rot90(LABELLED, -1),
    7: LABELLED[::-1, ::-1].T,
    8: np.rot90(LABELLED),
}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(path: Path, kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    zoomed = Image.fromarray(np.kron(LABELLED, np.ones((16, 16), np.uint8))).convert("RGB")
    zoomed.save(path, kind, exif=exif, quality=100, lossless=True)
    found = np.asarray(load_rgb(path))[8::16, 8::16, 0].astype(int)
    np.testing.assert_allclose(found, UPRIGHT[turn], atol=3)
    with open_image(path) as image:
        assert upright_size(image) == ((48, 32) if turn < 5 else (32, 48))


def test_exif_behind_the_pixels_of_a_png(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = png((3, 2), 8, 0, b"\0\0\x28\x50\0\x78\xa0\xc8")
    late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    path.write_bytes(whole[:-12] + late + whole[-12:])
    assert np.asarray(load_rgb(path))[..., 0].tolist() == UPRIGHT[6].tolist()
    with open_image(path) as image:
        assert upright_size(image) == (2, 3)


def test_unreadable_exif_is_taken_as_upright(path: Path) -> None:
    Image.new("RGB", (3, 2)).save(path, "WEBP", exif=b"Exif\0\0nonsense")
    with open_image(path) as image:
        assert orientation(image) is None
        assert upright_size(image) == (3, 2)
    assert load_rgb(path).size == (3, 2)
    exif = Image.Exif()
    exif[0x0112] = 99
    Image.new("RGB", (3, 2)).save(path, exif=exif)
    assert load_rgb(path).size == (3, 2)


def swapped_channels() -> bytes:
    """An sRGB profile with the primaries of red and blue exchanged."""
    profile = SRGB.replace(b"rXYZ", b"tmp!", 1).replace(b"bXYZ", b"rXYZ", 1)
    return profile.replace(b"tmp!", b"bXYZ", 1)


def grey_profile(gamma: float) -> bytes:
    """A grey ICC profile by hand: white point D50 and a power curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = [(b"wtpt", white), (b"kTRC", curve)]
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags:
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data
    size = offset + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def test_icc_profile_is_converted_to_srgb(path: Path) -> None:
    red = Image.new("RGB", (2, 2), (200, 20, 90))
    red.save(path, icc_profile=SRGB)
    np.testing.assert_allclose(pixels(path)[0][0], [200, 20, 90], atol=1)
    red.save(path, icc_profile=swapped_channels())
    np.testing.assert_allclose(pixels(path)[0][0], [90, 20, 200], atol=1)
    red.putalpha(0)
    red.save(path, icc_profile=swapped_channels())
    assert pixels(path)[0][0] == [255, 255, 255]


def test_grey_profile(path: Path) -> None:
    grey = Image.new("L", (2, 2), 128)
    grey.save(path, icc_profile=grey_profile(1.0))
    np.testing.assert_allclose(pixels(path)[0][0], [188] * 3, atol=1)  # linear half in sRGB
    grey.save(path, icc_profile=SRGB)  # a profile for other pixels is left out
    assert pixels(path)[0][0] == [128] * 3


def test_broken_profile_is_left_out(path: Path) -> None:
    for profile in (b"nonsense", SRGB[:200]):
        Image.new("RGB", (2, 2), (200, 20, 90)).save(path, icc_profile=profile)
        assert pixels(path)[0][0] == [200, 20, 90]
    assert profile_fits(SRGB, "RGBA") and profile_fits(SRGB, "P")
    assert profile_fits(grey_profile(2.2), "L") and profile_fits(grey_profile(2.2), "I;16")
    assert not profile_fits(SRGB, "L") and not profile_fits(b"nonsense", "RGB")


def test_first_frame_of_an_animation(path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "lime")]
    for kind in ("PNG", "WEBP"):
        frames[0].save(path, kind, save_all=True, append_images=frames[1:], lossless=True)
        assert pixels(path)[0][0] == [255, 0, 0]


def test_modes_without_a_range_are_refused() -> None:
    for mode in ("F", "I", "LAB"):
        with pytest.raises(ValueError, match=f"kind {mode}"):
            to_rgb(Image.new(mode, (1, 1)))


def test_what_is_said_of_bad_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        with pytest.raises(UserError) as caught:
            load_rgb(path)
        (problem,) = caught.value.problems
        assert problem.where == str(path)
        return problem.what

    assert said() == "there is no such file"
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in said()
    path.write_bytes(b"hello")
    assert "not an image" in said()
    Image.new("RGB", (4, 4)).save(path, "GIF")
    assert "its content is GIF; save it as" in said()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:3000])
    assert "cut short" in said()
    Image.fromarray(noise).save(path, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too large" in said()


def samples() -> list[bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        options = {} if kind == "BMP" else {"exif": exif, "icc_profile": SRGB}
        image.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.sampled_from(samples()),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5),
    keep=st.integers(0, 3000),
)
def test_damaged_files_give_pixels_or_a_user_error(
    path: Path, data: bytes, edits: list[tuple[int, int]], keep: int
) -> None:
    broken = bytearray(data)
    for place, value in edits:
        broken[place % len(broken)] = value
    path.write_bytes(broken[:keep])
    try:
        with open_image(path) as image:
            if image.width * image.height > 10**6:
                return
        assert load_rgb(path).mode == "RGB"
    except UserError as error:
        assert str(path) in str(error)


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 5, height))
    channels = [127 + 80 * np.sin(x + phase) * np.cos(y) for phase in (0, 1, 2)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 31), (64, 64), (40, 50)])
@pytest.mark.parametrize("bucket", [(64, 64), (96, 40), (40, 96)])
def test_to_bucket_is_scale_then_crop(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    image = smooth(*size)
    pixels_HWC = to_bucket(image, bucket)
    assert pixels_HWC.shape == (bucket[1], bucket[0], 3)
    assert pixels_HWC.dtype == np.uint8 and pixels_HWC.flags.writeable
    scaled, (left, top) = crop_box(size, bucket)
    area = (left, top, left + bucket[0], top + bucket[1])
    whole = np.asarray(image.resize(scaled, Image.Resampling.LANCZOS).crop(area)).astype(int)
    np.testing.assert_allclose(pixels_HWC, whole, atol=2)


def test_to_bucket_averages_when_it_reduces_and_copies_when_it_fits() -> None:
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(checks[..., None], 3, -1).astype(np.uint8))
    np.testing.assert_allclose(to_bucket(image, (64, 64)), 127, atol=2)
    np.testing.assert_array_equal(to_bucket(image, (512, 512)), np.asarray(image))


def test_to_bucket_of_a_very_long_image() -> None:
    assert to_bucket(Image.new("RGB", (30_000, 2)), (512, 512)).shape == (512, 512, 3)
