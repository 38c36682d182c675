"""Broken sets of pictures, each with another fault, put on a good set of four."""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

CAPTIONS = {
    "a.png": "a red house by the sea",
    "b.png": "two boats in the fog",
    "c.png": "a bridge, at night",
    "d.png": "an old street lamp",
}
Build = Callable[[Path], object]


class Broken(NamedTuple):
    """A fault.

    Attributes:
        name: What is wrong, in words.
        build: Puts it into the folder of a good set.
        kind: Of the problem; `says` is its place and a part of its text behind it, of each.
        keys: Of the config, beside the usual ones; `{data}` stands for the folder.
        runs: Where links, permissions or names of any bytes are there to be tested.
    """

    name: str
    build: Build
    kind: str
    says: Sequence[tuple[str, str]]
    severity: Literal["error", "warning", "note"] = "error"
    keys: Mapping[str, Any] = {}
    runs: bool = True


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Noise: no two seeds are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def good_set(folder: Path) -> Path:
    """Four pictures and their captions, with nothing to say of them."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(CAPTIONS):
        picture(seed).save(folder / name)
    write(folder, [f'{name},"{caption}"' for name, caption in CAPTIONS.items()])
    return folder


def write(folder: Path, rows: Sequence[str], name: str = "metadata.csv") -> None:
    (folder / name).write_text("\n".join(["file_name,text", *rows]) + "\n", encoding="utf-8")


def row(text: str) -> Build:
    """Line 3 of metadata.csv, the row of b.png, reads so."""

    def build(folder: Path) -> None:
        rows = [f'{name},"{caption}"' for name, caption in CAPTIONS.items()]
        rows[1] = text
        write(folder, rows)

    return build


def content(data: bytes) -> Build:
    return lambda folder: (folder / "metadata.csv").write_bytes(data)


def json_line(text: str) -> Build:
    """Line 2 of metadata.jsonl reads so."""

    def build(folder: Path) -> None:
        (folder / "metadata.csv").unlink()
        lines = [json.dumps({"file_name": n, "text": t}) for n, t in CAPTIONS.items()]
        lines[1] = text
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return build


def sidecars(folder: Path, leaving: str = "") -> None:
    (folder / "metadata.csv").unlink()
    for name, caption in CAPTIONS.items():
        if name != leaving:
            (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def renamed(old: str, new: str) -> Build:
    """Captions in files beside the pictures, one of them under another name."""

    def build(folder: Path) -> None:
        sidecars(folder)
        (folder / old).rename(folder / new)

    return build


def beside(name: str, data: bytes) -> Build:
    def build(folder: Path) -> None:
        sidecars(folder)
        (folder / name).write_bytes(data)

    return build


def all_without_dot(folder: Path) -> None:
    sidecars(folder)
    for path in list(folder.glob("*.txt")):
        path.rename(path.with_name(f"{path.stem}txt"))


def shared(folder: Path) -> None:
    sidecars(folder)
    picture(9).save(folder / "a.jpg")


def file(name: str, data: bytes) -> Build:
    return lambda folder: (folder / name).write_bytes(data)


def image(name: str, made: Image.Image, format: str | None = None, **options: Any) -> Build:
    return lambda folder: made.save(folder / name, format, **options)


def cut_short(name: str, made: Image.Image, **options: Any) -> Build:
    def build(folder: Path) -> None:
        made.save(folder / name, **options)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])

    return build


def as_jpeg(folder: Path) -> None:
    """b.png becomes b.jpg, cut short."""
    (folder / "b.png").unlink()
    row('b.jpg,"two boats in the fog"')(folder)
    cut_short("b.jpg", picture(1), quality=90)(folder)


def damaged(folder: Path) -> None:
    data = bytearray((folder / "b.png").read_bytes())
    data[400:420] = bytes(20)
    (folder / "b.png").write_bytes(data)


def bomb(folder: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        check_sum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check_sum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)


def text_bomb(folder: Path) -> None:
    notes = PngInfo()
    notes.add_text("prompt", "a" * 2_000_000, zip=True)
    picture(1).save(folder / "b.png", pnginfo=notes)


def animation(folder: Path) -> None:
    picture(1).save(folder / "b.png", save_all=True, append_images=[picture(8)])


def copied(name: str) -> Build:
    """b.png holds the same as a.png, in another form if `name` says so."""
    return lambda folder: (
        Image.open(folder / "a.png")
        .convert("RGB")
        .save(folder / name, **({"quality": 90} if name.endswith("jpg") else {}))
    )


def near_copy(folder: Path) -> None:
    Image.open(folder / "a.png").resize((128, 128)).save(folder / "b.png")


def held_out(folder: Path) -> None:
    good_set(folder.parent / "held")


def link(name: str, target: str) -> Build:
    def build(folder: Path) -> None:
        row(f"{name},x")(folder)
        (folder / name).symlink_to(target)

    return build


def link_to_itself(folder: Path) -> None:
    (folder / "more").symlink_to(folder)


def closed(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def only_in_heic(folder: Path) -> None:
    (folder / "e.heic").write_bytes(b"\0" * 16)


def odd_name(folder: Path) -> None:
    row('赛博.png,"x"')(folder)
    raw = os.fsencode(folder) + b"/" + "赛博".encode("gbk") + b".png"
    Path(os.fsdecode(raw)).write_bytes(b"")
    sidecars(folder)


def mask(name: str, made: Image.Image) -> Build:
    def build(folder: Path) -> None:
        (folder.parent / "masks").mkdir()
        for each in CAPTIONS:
            Image.new("L", (64, 64), 255).save(folder.parent / "masks" / each)
        if name:
            made.save(folder.parent / "masks" / name)
        else:
            (folder.parent / "masks" / "b.png").unlink()

    return build


def one_mask_beside(folder: Path) -> None:
    Image.new("L", (64, 64), 255).save(folder / "a-masklabel.png")


def kohya(folder: Path) -> None:
    (folder / "metadata.csv").unlink()
    (folder / "10_a cat").mkdir()
    (folder / "3_a dog").mkdir()
    for number, name in enumerate(CAPTIONS):
        target = "10_a cat" if number % 2 else "3_a dog"
        (folder / name).rename(folder / target / name)


def captions(text: Callable[[str], str]) -> Build:
    return lambda folder: write(folder, [f'{n},"{text(c)}"' for n, c in CAPTIONS.items()])


def another(caption: str) -> Build:
    return row(f'b.png,"{caption}"')


LINE = "metadata.csv line 3"
HEADER = "file_name,text\n"
LONG = ", ".join(f"a word number {number}" for number in range(40))
IS_POSIX = os.name != "nt"
MASKS = {"masked_loss": True, "mask_dir": "{data}/../masks"}
BOTH = {
    "train_data_dir": None,
    "datasets": [{"path": "{data}"}, {"path": "{data}/../held", "role": "validation"}],
}

SETS = [
    # --- rows of metadata.csv
    Broken(
        "an unquoted comma",
        row("b.png,two boats, fog"),
        "fields",
        [
            (
                LINE,
                "3 fields found, expected 2; a caption that holds a comma needs quotes: "
                'b.png,"two boats, fog"',
            )
        ],
    ),
    Broken("no caption", row("b.png"), "fields", [(LINE, "1 field found, expected 2")]),
    Broken("semicolons", row("b.png;two boats"), "fields", [(LINE, "found a semicolon")]),
    Broken("tabs", row("b.png\ttwo boats"), "fields", [(LINE, "found a tab")]),
    Broken(
        "a full-width comma", row("b.png，两只船"), "fields", [(LINE, "found a full-width comma")]
    ),
    Broken(
        "curly quotes",
        row("b.png,“two boats, fog”"),
        "fields",
        [(LINE, "(straight quotes, not “ ”)")],
    ),
    Broken(
        "a row narrower than the header",
        content(b"file_name,text,score\na.png,x,1\nb.png,y\n"),
        "fields",
        [(LINE, "2 fields found, expected 3 as in the header")],
    ),
    Broken(
        "a quote never closed",
        row('b.png,"two boats'),
        "quotes",
        [(LINE, "unbalanced quotes in")],
    ),
    Broken(
        "a quote never opened", row('b.png,two boats"'), "quotes", [(LINE, "unbalanced quotes")]
    ),
    Broken(
        "quotes within quotes",
        row('b.png,"two "big" boats"'),
        "quotes",
        [(LINE, 'written twice: b.png,"two ""big"" boats"')],
    ),
    Broken("no file name", row(',"two boats"'), "no-file-name", [(LINE, "the file name is empty")]),
    Broken(
        "a name twice",
        row('a.png,"again"'),
        "duplicate-name",
        [(LINE, '"a.png" was already named in metadata.csv line 2; keep one row')],
    ),
    Broken(
        "a broken character",
        json_line('{"file_name": "b.png", "text": "\\ud83d"}'),
        "broken-character",
        [("metadata.jsonl line 2", "half of a surrogate pair")],
    ),
    # --- names
    Broken(
        "a picture that is not there",
        row("blue.png,x"),
        "missing-image",
        [(LINE, '"blue.png" is not there')],
    ),
    Broken(
        "a typing mistake", row("bb.png,x"), "missing-image", [(LINE, 'the nearest is "b.png"')]
    ),
    Broken(
        "another case", row("B.PNG,x"), "missing-image", [(LINE, "upper and lower case differ")]
    ),
    Broken("another extension", row("b.jpg,x"), "missing-image", [(LINE, "the extension differs")]),
    Broken(
        "another folder",
        row("sub/b.png,x"),
        "missing-image",
        [(LINE, 'nearest is "b.png": in another folder')],
    ),
    Broken(
        "no extension",
        row("b,x"),
        "wrong-extension",
        [(LINE, "extension none, expected one of .png")],
    ),
    Broken(
        "an extension not read",
        row("b.tiff,x"),
        "wrong-extension",
        [(LINE, 'extension ".tiff", expected')],
    ),
    Broken(
        "a path upwards",
        row("../b.png,x"),
        "outside-folder",
        [(LINE, "leaves the folder of images")],
    ),
    Broken(
        "an absolute path",
        row("/etc/b.png,x"),
        "outside-folder",
        [(LINE, "leaves the folder of images")],
    ),
    Broken(
        "a drive",
        row("C:\\\\pictures\\\\b.png,x"),
        "outside-folder",
        [(LINE, "leaves the folder of images")],
    ),
    Broken(
        "a mask named as a picture",
        lambda f: (one_mask_beside(f), row("a-masklabel.png,x")(f)),
        "mask-named",
        [(LINE, "the mask of another image")],
    ),
    Broken(
        "a picture not named",
        file("e.png", b""),
        "image-not-named",
        [("metadata.csv", "1 image (e.png) in the folder not named in it")],
        "warning",
    ),
    # --- whole files of captions
    Broken("nothing in it", content(b""), "no-rows", [("metadata.csv", "there is no row in it")]),
    Broken(
        "a header only",
        content(HEADER.encode()),
        "no-rows",
        [("metadata.csv", "there is no row in it")],
    ),
    Broken(
        "UTF-16",
        content(f"{HEADER}a.png,x\n".encode("utf-16")),
        "encoding",
        [("metadata.csv", "UTF-16; save it as UTF-8")],
    ),
    Broken(
        "GBK",
        content(f"{HEADER}a.png,海边的红房子\n".encode("gbk")),
        "encoding",
        [
            (
                "metadata.csv",
                "first bad byte in line 2); it seems to be GBK, as Chinese Windows writes it",
            )
        ],
    ),
    Broken(
        "Big5",
        content(f"{HEADER}a.png,一隻貓坐在窗台上\n".encode("big5")),
        "encoding",
        [("metadata.csv", "it seems to be Big5")],
    ),
    Broken(
        "Shift-JIS",
        content(f"{HEADER}a.png,海辺の赤い家\n".encode("shift_jis")),
        "encoding",
        [("metadata.csv", "it seems to be Shift-JIS")],
    ),
    Broken(
        "Windows-1252",
        content(f"{HEADER}a.png,un café à Paris\n".encode("cp1252")),
        "encoding",
        [("metadata.csv", "it seems to be Windows-1252")],
    ),
    Broken(
        "not the file that is named",
        lambda f: None,
        "metadata-missing",
        [("{data}/captions.csv", "there is no such file. Found instead: {data}/metadata.csv")],
        keys={"metadata_path": "{data}/captions.csv"},
    ),
    Broken(
        "a workbook",
        file("captions.xlsx", b"PK"),
        "metadata-missing",
        [("{data}/captions.xlsx", "expected a .csv or a .jsonl file")],
        keys={"metadata_path": "{data}/captions.xlsx"},
    ),
    Broken(
        "a name too long",
        lambda f: None,
        "unreadable-file",
        [("x" * 300 + ".csv", "name too long")],
        keys={"metadata_path": "x" * 300 + ".csv"},
        runs=IS_POSIX,
    ),
    Broken(
        "no such column",
        lambda f: None,
        "caption-column",
        [("metadata.csv", 'no column "tags", which caption_keys needs')],
        keys={"caption_keys": ["tags"]},
    ),
    Broken(
        "a column not used",
        content(b"file_name,text,score\na.png,a house,1\nb.png,a boat,2\nc.png,c,3\nd.png,d,4\n"),
        "unused-columns",
        [("metadata.csv line 1", 'not used: "score"')],
        "warning",
    ),
    Broken(
        "an empty caption",
        row("b.png,"),
        "empty-caption",
        [(LINE, 'the caption of "b.png" is empty')],
        "warning",
    ),
    Broken(
        "not JSON",
        json_line("{'file_name': 1}"),
        "json",
        [("metadata.jsonl line 2", "not valid JSON (")],
    ),
    Broken(
        "a JSON list",
        lambda f: (json_line("{}")(f), (f / "metadata.jsonl").write_text("[]")),
        "json",
        [("metadata.jsonl", "this is one JSON list")],
    ),
    Broken(
        "no text",
        json_line('{"file_name": "b.png"}'),
        "fields",
        [("metadata.jsonl line 2", 'no "text"; found "file_name"')],
    ),
    Broken(
        "a number for a text",
        json_line('{"file_name": "b.png", "text": 3}'),
        "fields",
        [("metadata.jsonl line 2", '"text" is a number')],
    ),
    # --- captions beside the pictures
    Broken(
        "no captions",
        lambda f: (f / "metadata.csv").unlink(),
        "no-captions",
        [
            (
                "{data}",
                "no captions found: no metadata.csv, no metadata.jsonl, no .txt beside an image",
            )
        ],
    ),
    Broken(
        "the file of captions under another name",
        lambda f: (f / "metadata.csv").rename(f / "meta.csv"),
        "no-captions",
        [("{data}", '"meta.csv" is there: to read it, name it as metadata_path')],
    ),
    Broken(
        "no dot before txt",
        renamed("b.txt", "btxt"),
        "caption-without-image",
        [("btxt", 'the dot before "txt" is missing; rename it "b.txt"')],
        "warning",
    ),
    Broken("no dot anywhere", all_without_dot, "no-captions", [("{data}", "no captions found")]),
    Broken(
        "the whole name before txt",
        renamed("b.txt", "b.png.txt"),
        "caption-without-image",
        [("b.png.txt", 'rename it "b.txt"')],
        "warning",
    ),
    Broken(
        "a caption in another case",
        renamed("b.txt", "B.txt"),
        "caption-without-image",
        [("B.txt", 'the nearest is "b.png", where upper and lower case differ')],
        "warning",
        runs=sys.platform == "linux",
    ),
    Broken(
        "a caption of no picture",
        beside("boat.txt", b"x"),
        "caption-without-image",
        [("boat.txt", "none has its name")],
        "warning",
    ),
    Broken(
        "a picture without caption",
        lambda f: sidecars(f, "b.png"),
        "captions-missing",
        [("{data}", "1 image (b.png) without a .txt file")],
        "warning",
    ),
    Broken(
        "an empty file of a caption",
        beside("b.txt", b" \n"),
        "empty-caption",
        [("b.txt", "the caption is empty")],
        "warning",
    ),
    Broken(
        "a caption in GBK",
        beside("b.txt", "雾中的两只船".encode("gbk")),
        "encoding",
        [("b.txt", "GBK")],
    ),
    Broken(
        "one caption of two pictures",
        shared,
        "shared-caption",
        [("a.txt", 'belongs to "a.jpg" and to "a.png"')],
        "warning",
    ),
    Broken(
        "captions that are not read",
        lambda f: (f / "b.txt").write_text("x"),
        "caption-file-ignored",
        [
            (
                "{data}",
                "1 caption file (b.txt) beside the images not read, because the captions come "
                "from metadata.csv",
            )
        ],
        "warning",
    ),
    # --- the folder
    Broken(
        "no pictures", empty, "no-images", [("{data}", "no image found; expected files in .png")]
    ),
    Broken(
        "a kind that is not read",
        only_in_heic,
        "unread-format",
        [("{data}", "1 image (e.heic) of a kind that is not read")],
        "warning",
    ),
    Broken(
        "a link to itself",
        link("e.png", "e.png"),
        "link",
        [(LINE, "this link leads nowhere")],
        runs=IS_POSIX,
    ),
    Broken(
        "a link that leads out",
        link("e.png", "/etc/hostname"),
        "link",
        [(LINE, "this link leads out of the folder")],
        runs=IS_POSIX,
    ),
    Broken(
        "a loop of folders",
        link_to_itself,
        "linked-folder",
        [("{data}/more", "a link to another folder")],
        "warning",
        runs=IS_POSIX,
    ),
    Broken(
        "a folder that is closed",
        closed,
        "unreadable-folder",
        [("{data}/closed", "cannot be listed")],
        runs=IS_POSIX and os.geteuid() != 0,
    ),
    Broken(
        "a name in GBK",
        odd_name,
        "file-name",
        [("", "not valid UTF-8 (often from a zip made on a Chinese Windows)")],
        runs=sys.platform == "linux",
    ),
    Broken(
        "folders of kohya's",
        kohya,
        "kohya-folders",
        [("{data}", '"10_a cat": 10 times, "3_a dog": 3 times')],
        "note",
    ),
    Broken(
        "masks beside",
        one_mask_beside,
        "masks-set-apart",
        [("{data}", "1 file (a-masklabel.png) taken for masks")],
        "note",
    ),
    # --- pictures
    Broken(
        "an empty file",
        file("b.png", b""),
        "empty-file",
        [("{data}/b.png", f"the file is empty (0 bytes); replace it or remove it ({LINE})")],
    ),
    Broken(
        "a web page",
        file("b.png", b"<html>404</html>"),
        "not-an-image",
        [("{data}/b.png", "this is not an image")],
    ),
    Broken(
        "a GIF under another name",
        image("b.png", picture(1), "GIF"),
        "unread-format",
        [("{data}/b.png", "its content is GIF")],
    ),
    Broken(
        "a PNG cut short",
        cut_short("b.png", picture(1)),
        "truncated",
        [("{data}/b.png", "the file is cut short")],
    ),
    Broken("a JPEG cut short", as_jpeg, "truncated", [("{data}/b.jpg", "the file is cut short")]),
    Broken("a damaged PNG", damaged, "damaged", [("{data}/b.png", "the file is damaged")]),
    Broken("a bomb", bomb, "too-large", [("{data}/b.png", "too large to be decoded safely")]),
    Broken(
        "a bomb of text", text_bomb, "damaged", [("{data}/b.png", "Decompressed data too large")]
    ),
    Broken(
        "a JPEG named PNG",
        image("b.png", picture(1), "JPEG"),
        "content-extension",
        [("{data}/b.png", "its content is JPEG, its name ends in .png")],
        "warning",
    ),
    Broken(
        "an animation",
        animation,
        "animation",
        [("{data}/b.png", "an animation of 2 frames")],
        "warning",
    ),
    Broken(
        "nonsense for EXIF",
        lambda f: (
            row('b.webp,"x y"')(f),
            image("b.webp", picture(1), exif=b"Exif\0\0nonsense")(f),
        ),
        "exif",
        [("{data}/b.webp", "its EXIF data cannot be read")],
        "warning",
    ),
    Broken(
        "nonsense for colours",
        image("b.png", picture(1), icc_profile=b"nonsense"),
        "colour-profile",
        [("{data}/b.png", "its colour profile does not fit")],
        "warning",
    ),
    Broken(
        "a very large picture",
        image("b.png", Image.new("1", (7200, 7200))),
        "large-image",
        [("{data}/b.png", "52 megapixels")],
        "warning",
    ),
    Broken(
        "a copy",
        copied("b.png"),
        "duplicate-image",
        [("{data}/b.png", "the same image as {data}/a.png (metadata.csv line 2), byte for byte")],
        "warning",
    ),
    Broken(
        "a copy of another size",
        near_copy,
        "near-duplicate",
        [("{data}/a.png", f"nearly the same picture as b.png ({LINE})")],
        "warning",
    ),
    Broken(
        "a copy held out",
        held_out,
        "held-out-copy",
        [("{data}/../held/a.png", "one is learned and the other held out")],
        "warning",
        keys=BOTH,
    ),
    Broken(
        "too small",
        image("b.png", picture(1, (40, 30))),
        "small-image",
        [("{data}/b.png", "it has 40×30 pixels and is enlarged")],
        "warning",
    ),
    Broken(
        "a panorama",
        image("b.png", picture(1, (640, 64))),
        "cut-away",
        [
            (
                "{data}/b.png",
                "it has 640×64 pixels, and 90% of it is cut away at left and right to fit 64×64",
            )
        ],
        "warning",
    ),
    # --- captions
    Broken(
        "a caption too long",
        another(LONG),
        "caption-cut",
        [
            (
                LINE,
                "the caption has 229 tokens; 75 are read (max_caption_tokens), which leaves out "
                '"word number 14, a word number 15, a word',
            )
        ],
        "warning",
        keys={"base_model": "someone/a-model"},
    ),
    Broken(
        "a caption too long for three parts",
        another(LONG + LONG),
        "caption-cut",
        [(LINE, "225 are read (max_caption_tokens)")],
        "warning",
        keys={"base_model": "someone/a-model", "max_caption_tokens": 225},
    ),
    Broken(
        "Chinese",
        another("雾中的两只船"),
        "caption-script",
        [(LINE, "written in Chinese letters, which the text encoder (CLIP) cannot read")],
        "warning",
    ),
    Broken(
        "Japanese",
        another("霧の中の船"),
        "caption-script",
        [(LINE, "written in Japanese letters")],
        "warning",
    ),
    Broken(
        "Russian",
        another("две лодки"),
        "caption-script",
        [(LINE, "written in Cyrillic letters")],
        "warning",
    ),
    Broken(
        "no trigger word",
        captions(lambda c: c if "boat" in c else f"zwx, {c}"),
        "trigger-word",
        [(LINE, '"zwx" (trigger_word) is missing here, and stands in 3 of 4 captions')],
        "warning",
        keys={"trigger_word": "zwx"},
    ),
    Broken(
        "one caption for all",
        captions(lambda c: "a photo"),
        "repeated-caption",
        [("metadata.csv line 2", '4 of 4 captions are "a photo"')],
        "warning",
    ),
    # --- masks
    Broken(
        "no mask at all",
        lambda f: None,
        "no-mask",
        [("{config}: masked_loss", "no picture has a mask")],
        keys={"masked_loss": True},
    ),
    Broken(
        "no mask of one", mask("", picture(0)), "no-mask", [(LINE, "no mask for b.png")], keys=MASKS
    ),
    Broken(
        "a mask of another shape",
        mask("b.png", Image.new("L", (64, 32), 255)),
        "mask-shape",
        [("{data}/../masks/b.png", "this mask is 64×32, its picture 64×64")],
        keys=MASKS,
    ),
    Broken(
        "a black mask",
        mask("b.png", Image.new("L", (64, 64))),
        "black-mask",
        [("{data}/../masks/b.png", "black all over")],
        keys=MASKS,
    ),
    Broken(
        "pictures without mask",
        one_mask_beside,
        "without-mask",
        [("{config}: masked_loss", "3 pictures (b.png, c.png, d.png) without a mask")],
        "warning",
        keys={"masked_loss": True},
    ),
]
