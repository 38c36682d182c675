"""Files spoilt by chance: bytes, lines, values inside JSON; the same chance, the same files."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

Files = dict[str, bytes]  # name in the input's folder -> content

# What breaks readers: marks of the formats, of encodings, numbers without end, and what editors
# leave behind.
BITS = (
    b'"', b"'", b",", b"\n", b"\r", b"\r\n", b"\0", b"\\", b"{", b"}", b"[", b"]", b":", b": ",
    b"- ", b"#", b"|\n", b">\n", b"\t", b"&a ", b"*a", b"!!python/object/apply:os.system [id]",
    b"!!binary ", b"!<x> ", b"<<: *a\n", b"%YAML 9.9\n", b"---\n", b"...\n", b"? ", b"@", b"`",
    b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc4\xe3\xba\xc3", b"\x80", b"\xed\xa0\x80",
    b"\\ud800", b"\\u0000", b"\\x00", b"null", b"~", b"NaN", b".nan", b"1e999", b"-.inf", b"-",
    b"0x", b"0o777", b"012", b"no", b"2e-4", b"../", b"C:\\", b"/etc/passwd", b"a.png", b"~/",
    b"$HOME", b"{{ 1 }}", b"<script>", b" ", b"  ", "“”".encode(), "，".encode(), "图".encode(),
    "\u2028".encode(), "\x85".encode(), "\u202e".encode(), "😀".encode(), b"file_name", b"text",
    b"9" * 5000, b"[" * 3000, b"{a: " * 300, b"a" * 70000, b"- " * 500, b"\n" * 300,
)  # fmt: skip
# Values of any kind for any place in a JSON object.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308,
    float("inf"), float("nan"), "", "a", "0", "-1", "../..", "/etc/passwd", "CON", "a\0b", "\ud800",
    "图" * 300, "x" * 70000, "{{ 7*7 }}", "F32", "I64", [], [0], [[]], [-1], [None], [2**62, 2**62],
    ["a", 1], [1, 2, 3, 4, 5, 6, 7, 8], {}, {"": None}, {"a": {"a": {}}}, [{}], {"__class__": "x"},
)  # fmt: skip


def spoil(chance: random.Random, content: bytes, donor: bytes = b"") -> bytes:
    """Bytes with one to six changes: some cut out, doubled, flipped, moved, or something put in."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        content = chance.choice(_CHANGES)(chance, content, donor or content)
    return content


def spoil_lines(chance: random.Random, content: bytes, donor: bytes = b"") -> bytes:
    """Text with lines left out, doubled, moved, indented otherwise, or taken from another text."""
    lines = content.split(b"\n")
    others = (donor or content).split(b"\n")
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(lines))
        match chance.randrange(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, chance.choice(lines))
            case 2:
                other = chance.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = b" " * chance.randint(1, 9) + lines[at]
            case 4:
                lines.insert(at, chance.choice(others))
            case 5:
                key, mark, _ = lines[at].partition(b":")
                lines[at] = key + mark + b" " + chance.choice(BITS)
        lines = lines or [b""]
    return b"\n".join(lines)


def spoil_json(chance: random.Random, content: bytes, donor: bytes = b"") -> bytes:
    """A JSON text with one to three of its values replaced, left out, doubled or moved.

    One in four is then spoilt as bytes, too; what is no JSON is spoilt as bytes only.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return spoil(chance, content, donor)
    changed = spoil_value(chance, value)
    text = json.dumps(changed, ensure_ascii=chance.random() < 0.5)
    found = text.encode("utf-8", "surrogatepass")
    return spoil(chance, found) if chance.random() < 0.25 else found


def spoil_value(chance: random.Random, value: Any) -> Any:
    """A copy of a JSON value, changed in one to three places."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(chance.choice(VALUES))
        holder, key = chance.choice(places)
        match chance.randrange(7):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[f"{key}x"] = holder.pop(key)
            case 1:
                holder.insert(key, holder[key])
            case 2:
                other, other_key = chance.choice(places)
                holder[key] = json.loads(json.dumps(other[other_key]))
            case 3 if isinstance(holder[key], int | float):
                holder[key] = _near(chance, holder[key])
            case 4:
                holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(chance.choice(VALUES))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place inside a JSON value: the object or list, and the key in it."""
    if isinstance(value, dict):
        found = [(value, key) for key in value]
    elif isinstance(value, list):
        found = [(value, index) for index in range(len(value))]
    else:
        return []
    return found + [place for holder, key in list(found) for place in _places(holder[key])]


def _near(chance: random.Random, number: float) -> float:
    return chance.choice((number + 1, number - 1, -number, number * 2, number * 10**6, 0))


# --- changes of bytes -----------------------------------------------------------------------------


def _flip(chance: random.Random, content: bytes, donor: bytes) -> bytes:
    if not content:
        return b"\0"
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def _cut(chance: random.Random, content: bytes, donor: bytes) -> bytes:
    at, end = _span(chance, content)
    return content[:at] + content[end:]


def _double(chance: random.Random, content: bytes, donor: bytes) -> bytes:
    at, end = _span(chance, content)
    return content[:end] + content[at:end] * chance.choice((1, 1, 5, 50)) + content[end:]


def _put_in(chance: random.Random, content: bytes, donor: bytes) -> bytes:
    at, end = _span(chance, content)
    new = chance.choice((*BITS, chance.randbytes(4), chance.randbytes(1)))
    return content[:at] + new + content[at if chance.random() < 0.5 else end :]


def _truncate(chance: random.Random, content: bytes, donor: bytes) -> bytes:
    return content[: chance.randint(0, len(content))]


def _splice(chance: random.Random, content: bytes, donor: bytes) -> bytes:
    at, end = _span(chance, content)
    start, stop = _span(chance, donor)
    return content[:at] + donor[start:stop] + content[end:]


def _numbers(chance: random.Random, content: bytes, donor: bytes) -> bytes:
    """Eight, four, two or one byte made the smallest, largest or a near number, as in headers."""
    size = chance.choice((1, 2, 4, 8))
    at = chance.randrange(max(1, len(content) - size))
    limit = 256**size
    number = chance.choice(
        (0, 1, 2, limit - 1, limit // 2, limit // 2 - 1, chance.randrange(limit))
    )
    order = chance.choice(("little", "big"))
    return content[:at] + number.to_bytes(size, order) + content[at + size :]


def _span(chance: random.Random, content: bytes) -> tuple[int, int]:
    at = chance.randint(0, len(content))
    return at, min(len(content), at + chance.choice((0, 1, 2, 4, 16, 200)))


_CHANGES = (_flip, _flip, _cut, _double, _put_in, _put_in, _truncate, _splice, _numbers)
