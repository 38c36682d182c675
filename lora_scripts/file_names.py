"""Names that become files on every system that people have: Windows takes fewer than Linux."""

from __future__ import annotations

import re

# Devices on Windows, with any extension and in any folder.
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_DEVICE = re.compile(r"(?:con|prn|aux|nul|(?:com|lpt)[0-9¹²³])(?:\..*)?", re.IGNORECASE)
_BAD = re.compile(r'[\\/:*?"<>|\x00-\x1f\x7f]')


def trouble(name: str) -> str | None:
    """Why a name cannot be that of a file, its extension yet to come; None if it can."""
    if _BAD.search(name):
        return r'must be without \ / : * ? " < > | and control characters'
    if not name.strip(" .") or name[-1] in " ." or name[0] == " ":
        return "must not be dots alone, begin with a blank, or end with a blank or a dot"
    if _DEVICE.fullmatch(name):
        return "is the name of a device on Windows, where no file can have it"
    return None
