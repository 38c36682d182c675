"""What lies in a folder of images: the images themselves, caption files, masks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from lora_scripts.data.folders import joined, leads_out, stem_of, suffix_of, walk_files
from lora_scripts.data.reading import Refused, count, is_unicode, show
from lora_scripts.errors import Problem

FORMATS = {  # extension -> formats that it stands for, as Pillow names them
    ".png": ("PNG",),
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".webp": ("WEBP",),
    ".bmp": ("BMP",),
}
SUFFIXES = tuple(FORMATS)
CAPTION_SUFFIXES = (".txt", ".caption")  # the first one found beside an image is its caption
TABLE_SUFFIXES = (".csv", ".jsonl")
MASK_ENDS = ("-masklabel", "_mask")  # of the name of a mask beside its image

_UNREAD_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".psd", ".tif", ".tiff")
_KOHYAS_FOLDER = re.compile(r"(?P<repeats>[1-9]\d{0,2})_.+")


@dataclass
class ImageFolder:
    """What lies in the folder of images. Names are relative to it, with forward slashes."""

    path: Path
    images: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)  # with the suffix in lower case -> name
    tables: list[str] = field(default_factory=list)  # files that could hold captions
    dotless: list[str] = field(default_factory=list)  # `img01txt`
    refused: dict[str, Refused] = field(default_factory=dict)  # image -> why it is not used
    masks: dict[str, str] = field(default_factory=dict)  # image without its suffix -> mask
    repeats: dict[str, int] = field(default_factory=dict)  # kohya's sub-folders -> their number
    problems: list[Problem] = field(default_factory=list)

    def mask_of(self, name: str) -> str | None:
        """The mask beside an image."""
        mask = self.masks.get(stem_of(name))
        return None if mask is None else joined(self.path, mask)


def list_folder(folder: Path) -> ImageFolder:
    """Walk the folder once, in the order of names, links to folders not followed."""
    listing = ImageFolder(folder)
    if not folder.is_dir():
        found = "this is a file" if folder.exists() else "there is no such folder"
        what = f"{found}; expected the folder of images"
        listing.problems.append(Problem(str(folder), what, "error", "unreadable-folder"))
        return listing
    unread: list[str] = []
    for name in walk_files(folder, "images", listing.problems):
        suffix = suffix_of(name).lower()
        if suffix in SUFFIXES:
            _add_image(listing, name)
        elif suffix in CAPTION_SUFFIXES:
            _add_caption(listing, name, stem_of(name) + suffix)
        elif suffix in _UNREAD_IMAGES:
            unread.append(name)
        elif suffix in TABLE_SUFFIXES:
            listing.tables.append(name)
        elif not suffix and name.endswith(tuple(end[1:] for end in CAPTION_SUFFIXES)):
            listing.dotless.append(name)
    _set_masks_apart(listing)
    if unread:
        what = "of a kind that is not read; save as PNG, JPEG or WebP to use"
        found = f"{count(unread, 'image')} {what}"
        listing.problems.append(Problem(str(folder), found, "warning", "unread-format"))
    return listing


def _add_image(listing: ImageFolder, name: str) -> None:
    if not is_unicode(name):
        what = (
            "the file name is not valid UTF-8 (often from a zip made on a Chinese Windows); "
            "rename the file"
        )
        listing.refused[name] = Refused(what, "file-name")
    elif (why := leads_out(listing.path, name, "image", "images")) is not None:
        listing.refused[name] = Refused(why, "link")
    else:
        listing.images.append(name)


def _add_caption(listing: ImageFolder, name: str, key: str) -> None:
    if (why := leads_out(listing.path, name, "caption file", "images")) is None:
        listing.captions[key] = name
    else:
        listing.problems.append(Problem(show(name), why, "error", "link"))


def _set_masks_apart(listing: ImageFolder) -> None:
    """`NAME-masklabel.png` beside an image of that name is its mask, not an image to learn."""
    stems = {stem_of(name) for name in listing.images}
    for name in list(listing.images):
        for end in MASK_ENDS:
            of = stem_of(name).removesuffix(end)
            if stem_of(name).endswith(end) and of in stems:
                listing.images.remove(name)
                listing.masks[of] = name
    if listing.masks:
        what = f"{count(list(listing.masks.values()), 'file')} taken for masks, not for images"
        listing.problems.append(Problem(str(listing.path), what, "note", "masks-set-apart"))


def find_kohyas_folders(listing: ImageFolder) -> None:
    """Note the repeats of sub-folders if all images lie in such ones as kohya's scripts want."""
    found = {}
    for name in listing.images:
        match = _KOHYAS_FOLDER.fullmatch(name.split("/")[0]) if name.count("/") == 1 else None
        if match is None:
            return
        found[name.split("/")[0]] = int(match["repeats"])
    listing.repeats = found
    said = ", ".join(f"{show(folder)}: {number} times" for folder, number in found.items())
    if said:
        what = f"folders named as kohya's scripts want them; each image counts: {said}"
        listing.problems.append(Problem(str(listing.path), what, "note", "kohya-folders"))
