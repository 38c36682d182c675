"""A picture decoded once in full, and what that shows: whether it can be used, and what it is like.

Done as the training does it (`pixels.load_rgb`), so that what passes here is not refused there. The
result is a function of the file's bytes alone and is remembered (`picture_memory`).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import PIL
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from lora_scripts.data import pixels
from lora_scripts.data.buckets import Size
from lora_scripts.data.picture_memory import PictureMemory
from lora_scripts.data.spool import Stored
from lora_scripts.errors import UserError
from lora_scripts.files import AnyPath, file_hash

DECODER = f"Pillow {PIL.__version__}"  # other versions may judge otherwise
LARGE = 50  # megapixels that are remarked on; Pillow refuses more than 179
COLOURS = 8  # side of the tiny copy that keeps a picture's colours
_AT_ONCE = 512  # pictures that are asked for in the memory in one go
_CHUNK = 64  # pictures between two writes to the memory
_PATTERN_SIDE = 128  # the perceptual hash looks at 32 x 32 points; more than this changes nothing

Progress = Callable[[int, int], None]  # done, of how many
Finding = tuple[str, str]  # the kind of a problem, and what the user is told


@dataclass(frozen=True)
class Look:
    """What a file is.

    Attributes:
        content: SHA-256 of its bytes; "" if they cannot be read.
        size: (width, height) in pixels, upright.
        format: As Pillow names it; a JPEG with further pictures is an "MPO".
        pattern: ImageHash's `phash`, 64 bits: pictures alike differ in a few of them.
        colours: A copy of 8 x 8 pixels, RGB, as bytes in hexadecimal digits.
        remarks: What is odd about it.
        error: Why it cannot be used; then only `content` is told besides.
    """

    content: str
    size: Size = (0, 0)
    format: str = ""
    pattern: int = 0
    colours: str = ""
    remarks: tuple[Finding, ...] = ()
    error: Finding | None = None

    def to_text(self) -> str:
        """As JSON, without the content's hash."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "content"})

    @classmethod
    def from_text(cls, content: str, text: str) -> Self:
        """The reverse of `to_text`."""
        values = json.loads(text)
        return cls(
            content,
            size=(values["size"][0], values["size"][1]),
            format=values["format"],
            pattern=values["pattern"],
            colours=values["colours"],
            remarks=tuple((kind, what) for kind, what in values["remarks"]),
            error=tuple(values["error"]) if values["error"] else None,
        )


class Looks(Stored[Look]):
    """Looks at pictures, on disk."""

    def add(self, look: Look) -> None:
        """Put one at the end."""
        self._values.append([look.content, look.to_text()])

    def _made(self, value: Any) -> Look:
        return Look.from_text(*value)


def look_at_all(
    paths: Iterable[AnyPath],
    total: int,
    memory: PictureMemory,
    progress: Progress,
    folder: Path | None = None,
) -> Looks:
    """What each file is. Only files that are not remembered are read, and decoded in threads.

    `total`: how many paths there are; `folder`: near which the looks are put on disk.
    """
    looks, left = Looks(folder), iter(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while some := list(itertools.islice(left, _AT_ONCE)):
            known = recall(some, memory)
            unknown = [path for path in dict.fromkeys(some) if path not in known]
            done = len(looks) + len(some) - len(unknown)
            for chunk in _chunks(unknown):
                known |= _look_at_chunk(chunk, memory, pool)
                done += len(chunk)
                progress(done, total)
            for path in some:
                looks.add(known[path])
    return looks


def recall(paths: Sequence[AnyPath], memory: PictureMemory) -> dict[AnyPath, Look]:
    """What is remembered of files that have not changed since; reads none of them."""
    contents = memory.contents(paths)
    texts = memory.looks(set(contents.values()), DECODER)
    return {
        path: Look.from_text(content, texts[content])
        for path, content in contents.items()
        if content in texts
    }


def contents_and_sizes(
    paths: Sequence[AnyPath], memory: PictureMemory
) -> tuple[list[str], list[Size]]:
    """SHA-256 and upright size of each file; of those not remembered the header is read.

    Raises:
        UserError: naming every file whose header cannot be read.
    """
    known = recall(paths, memory)
    unknown = [path for path in dict.fromkeys(paths) if path not in known]
    with ThreadPoolExecutor() as pool:
        contents = dict(zip(unknown, pool.map(file_hash, unknown), strict=True))
        found = dict(zip(unknown, pool.map(_header, unknown), strict=True))
    errors = [size for size in found.values() if isinstance(size, UserError)]
    if errors:
        raise UserError([problem for error in errors for problem in error.problems])
    sizes = {path: size for path, size in found.items() if not isinstance(size, UserError)}
    contents |= {path: look.content for path, look in known.items()}
    sizes |= {path: look.size for path, look in known.items()}
    return [contents[path] for path in paths], [sizes[path] for path in paths]


def look(path: AnyPath) -> Look:
    """Read and decode one file."""
    try:
        return _decoded(path, file_hash(path))
    except OSError as error:
        return _unreadable(error)


# --- one chunk ------------------------------------------------------------------------------------


def _chunks(paths: Sequence[AnyPath]) -> Iterator[Sequence[AnyPath]]:
    for start in range(0, len(paths), _CHUNK):
        yield paths[start : start + _CHUNK]


def _look_at_chunk(
    paths: Sequence[AnyPath], memory: PictureMemory, pool: ThreadPoolExecutor
) -> dict[AnyPath, Look]:
    """Hash the files; decode those whose bytes are not known under another name or time."""
    marks = {path: memory.mark(path) for path in paths}
    hashed = dict(zip(paths, pool.map(_hash, paths), strict=True))
    texts = memory.looks({each for each in hashed.values() if isinstance(each, str)}, DECODER)

    def judge(path: AnyPath) -> Look:
        content = hashed[path]
        if isinstance(content, OSError):
            return _unreadable(content)
        if content in texts:
            return Look.from_text(content, texts[content])
        return _decoded(path, content)

    looks = dict(zip(paths, pool.map(judge, paths), strict=True))
    whole = {path: look for path, look in looks.items() if look.content}
    memory.keep_looks({look.content: look.to_text() for look in whole.values()}, DECODER)
    memory.keep_contents({path: (marks[path], look.content) for path, look in whole.items()})
    return looks


def _hash(path: AnyPath) -> str | OSError:
    try:
        return file_hash(path)
    except OSError as error:
        return error


def _unreadable(error: OSError) -> Look:
    if isinstance(error, FileNotFoundError):
        return Look("", error=("unreadable-file", "there is no such file"))
    return Look("", error=("unreadable-file", f"the file cannot be read ({error.strerror})"))


def _header(path: AnyPath) -> Size | UserError:
    try:
        with pixels.open_image(path) as image:
            return pixels.upright_size(image)
    except UserError as error:
        return error


# --- one picture ----------------------------------------------------------------------------------


def _decoded(path: AnyPath, content: str) -> Look:
    try:
        with pixels.open_image(path) as image:
            remarks, format = tuple(_remarks(image)), image.format or ""
        upright = pixels.load_rgb(path)
    except UserError as error:
        (problem,) = error.problems
        return Look(content, error=(problem.kind, problem.what))
    pattern, colours = _fingerprint(upright)
    return Look(content, upright.size, format, pattern, colours, remarks)


def _remarks(image: ImageFile.ImageFile) -> Iterator[Finding]:
    if isinstance(image, PngImageFile | WebPImageFile) and image.is_animated:
        yield (
            "animation",
            f"this is an animation of {image.n_frames} frames; only the first is used",
        )
    if pixels.orientation(image) is None:
        yield "exif", "its EXIF data cannot be read; the image is taken as upright"
    profile = image.info.get("icc_profile")
    if profile and not pixels.profile_fits(profile, image.mode):
        what = "its colour profile does not fit or cannot be read; its colours are taken as sRGB"
        yield "colour-profile", what
    if (million := image.width * image.height / 1e6) > LARGE:
        what = f"it has {million:.0f} megapixels, which takes long to read; a few are enough"
        yield "large-image", what


def _fingerprint(picture: Image.Image) -> tuple[int, str]:
    """The perceptual hash and the colours of an upright RGB picture."""
    import imagehash

    small = picture.reduce(max(1, min(picture.size) // _PATTERN_SIDE))
    bits = "".join("1" if bit else "0" for bit in imagehash.phash(small).hash.flatten())
    tiny = small.resize((COLOURS, COLOURS), Image.Resampling.BOX)
    return int(bits, 2), tiny.tobytes().hex()
