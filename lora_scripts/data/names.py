"""The names in a metadata file, and the images of the folder that they mean."""

from __future__ import annotations

import difflib
import re
import unicodedata

from lora_scripts.data.folders import stem_of, suffix_of
from lora_scripts.data.image_folder import SUFFIXES, ImageFolder
from lora_scripts.data.reading import Refused, plain, show

_KINDS = ", ".join(SUFFIXES)
_GUESSES = 20  # fuzzy matching costs milliseconds for each missing name in a large folder


class Names:
    """Finds the file that a name in the metadata means; remembers which were named, and where."""

    def __init__(self, listing: ImageFolder) -> None:
        self.seen: dict[str, str] = {}
        what = "by its name this is the mask of another image; rename it to use it as an image"
        is_mask = Refused(what, "mask-named")
        self._refused = listing.refused | dict.fromkeys(listing.masks.values(), is_mask)
        self._exact = {unicodedata.normalize("NFC", name): name for name in listing.images}
        self._folded = {name.casefold(): name for name in listing.images}
        self._stems = {stem_of(name).casefold(): name for name in listing.images}
        self._bases = {name.rpartition("/")[2].casefold(): name for name in listing.images}
        self._guesses_left = _GUESSES

    def find(self, typed: str, where: str) -> str:
        """The file's name in the folder. Raises `Refused` if it cannot be used."""
        if not typed.strip():
            what = "the file name is empty; expected the name of an image"
            raise Refused(what, "no-file-name")
        name = self._inside(typed)
        if (why := self._refused.get(name)) is not None:
            raise Refused(f"{show(typed)}: {why}", why.kind)
        known = self._exact.get(unicodedata.normalize("NFC", name))
        if known is None:
            raise Refused(f"{show(typed)} is not there{self._hint(name)}", "missing-image")
        if known in self.seen:
            what = f"{show(typed)} was already named in {self.seen[known]}; keep one row"
            raise Refused(what, "duplicate-name")
        self.seen[known] = where
        return known

    def _inside(self, typed: str) -> str:
        name = typed.replace("\\", "/")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
            what = "leaves the folder of images; expected a name relative to it"
            raise Refused(f"{show(typed)} {what}", "outside-folder")
        named = "/".join(parts)
        suffix = suffix_of(named)
        if suffix.lower() not in SUFFIXES:
            found = f'"{plain(suffix)}"' if suffix else "none"
            hint = self._hint(named)
            what = f"{show(typed)}: extension {found}, expected one of {_KINDS}{hint}"
            raise Refused(what, "wrong-extension")
        return named

    def _hint(self, name: str) -> str:
        folded = name.casefold()
        if folded in self._folded:
            near, why = self._folded[folded], ": upper and lower case differ"
        elif folded in self._stems:
            near, why = self._stems[folded], ": with its extension"
        elif stem_of(folded) in self._stems:
            near, why = self._stems[stem_of(folded)], ": the extension differs"
        elif (base := folded.rpartition("/")[2]) in self._bases:
            near, why = self._bases[base], ": in another folder"
        elif (guess := self._guess(folded)) is not None:
            near, why = guess, ""
        else:
            return ""
        return f"; the nearest is {show(near)}{why}"

    def _guess(self, folded: str) -> str | None:
        if self._guesses_left == 0:
            return None
        self._guesses_left -= 1
        close = difflib.get_close_matches(folded, self._folded, n=1, cutoff=0.75)
        return self._folded[close[0]] if close else None
