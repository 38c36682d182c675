"""Configs, captions, texts and pictures."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from lora_scripts import caption_store, config, yaml_source
from lora_scripts.data import conversations, looking, records
from lora_scripts.errors import Problem, UserError
from tests.data.test_readers_hypothesis import GOOD_ROWS
from tests.fuzz.mutation import BITS, Files, spoil, spoil_json, spoil_lines
from tests.fuzz.trial import Target

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = (
    "lora_rank=8", "learning_rate=2e-4", "datasets=[{path: a}]", "sample_prompts=[a, {prompt: b}]",
    "base_model=a/b", "epochs=1", "resume=never", "task_type=text-generation", "lora_rank",
)  # fmt: skip
NAMES = ("a.png", "b.jpg", "图.webp")
PIXEL = Image.new("RGB", (8, 8), "red")
# What grows: aliases of aliases, and nesting.
BOMBS = (
    b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(97, 110)),
    b"sample_prompts: " + b"[" * 5000 + b"]" * 5000,
    b"datasets:\n" + b"".join(b" " * n + b"- \n" for n in range(400)),
    b"lora_rank: &a\n  x: *a\n",
    b"lora_rank: " + b"9" * 50000,
    b"? {a: b}\n: c\n",
    b"output_name: !!python/object/apply:os.system ['echo no']\n",
    b"output_name: !!binary AAAA\nseed: !!timestamp 2001-01-01\n",
)  # fmt: skip


def _told(problems: Sequence[Problem]) -> None:
    """Problems are as good as an error, and are looked at as one."""
    if any(problem.severity == "error" for problem in problems):
        raise UserError(problems)


def _either(chance: random.Random, seeds: Sequence[Files], rate: float = 0.5) -> Files:
    """One of the seeds, each of its files spoilt with this probability, one at least."""
    files = dict(chance.choice(seeds))
    donor = chance.choice(list(chance.choice(seeds).values()))
    certain = chance.choice(list(files))
    for name in files:
        if name == certain or chance.random() < rate:
            way = chance.choice((spoil, spoil_json, spoil_lines))
            files[name] = way(chance, files[name], donor)
    return files


# --- configs --------------------------------------------------------------------------------------


def _configs(work: Path) -> list[Files]:
    texts = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    return [{"run.yaml": text, "overrides": b""} for text in texts] + [
        {"run.yaml": bomb, "overrides": b""} for bomb in BOMBS
    ]


def _spoil_config(chance: random.Random, seeds: Sequence[Files]) -> Files:
    text, donor = (chance.choice(seeds)["run.yaml"] for _ in range(2))
    if chance.random() < 0.9:
        text = chance.choice((spoil, spoil_lines, spoil_lines))(chance, text, donor)
    overrides = b""
    if chance.random() < 0.3:
        overrides = spoil(chance, chance.choice(OVERRIDES).encode(), chance.choice(BITS))
    return {"run.yaml": text, "overrides": overrides}


def _read_config(folder: Path) -> None:
    text = (folder / "overrides").read_bytes().decode("utf-8", "replace")
    draft = config.read(folder / "run.yaml", [text] if text else [])
    again = folder / "again.yaml"
    again.write_text(config.dump(draft.checked()), encoding="utf-8")
    assert config.load(again) == draft.checked()


def _overrides(work: Path) -> list[Files]:
    return [{"value": text.partition("=")[2].encode()} for text in OVERRIDES]


def _read_value(folder: Path) -> None:
    yaml_source.parse_value((folder / "value").read_bytes().decode("utf-8", "replace"), "a key")


# --- captions -------------------------------------------------------------------------------------


def _captions(name: str, rows: str) -> list[Files]:
    pictures = {}
    for picture in NAMES:
        stream = io.BytesIO()
        PIXEL.save(stream, {"png": "PNG", "jpg": "JPEG", "ebp": "WEBP"}[picture[-3:]])
        pictures[picture] = stream.getvalue()
    return [{name: rows.encode("utf-8"), **pictures}]


def _captions_csv(work: Path) -> list[Files]:
    rows = (
        'file_name,text,more\na.png,"a red, ""big"" car",7\nb.jpg,一只猫,\n图.webp,"two\nlines",9\n'
    )
    return _captions("metadata.csv", rows)


def _captions_jsonl(work: Path) -> list[Files]:
    rows = [{"file_name": name, "text": f"{name} “红”", "n": 1} for name in NAMES]
    return _captions("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _spoil_first(chance: random.Random, seeds: Sequence[Files]) -> Files:
    """The file of rows, as bytes or as rows; the pictures stay."""
    name, *rest = chance.choice(seeds)
    seed = seeds[0]
    content = seed[name]
    if name.endswith(".jsonl") and chance.random() < 0.5:
        lines = content.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = spoil_json(chance, lines[at])
        content = b"\n".join(lines)
    else:
        content = chance.choice((spoil, spoil_lines))(chance, content)
        if chance.random() < 0.1:
            encoding = chance.choice(("utf-16", "utf-8-sig", "gb18030"))
            content = content.decode("utf-8", "replace").encode(encoding, "replace")
    return {name: content, **{other: seed[other] for other in rest}}


def _read_captions(folder: Path) -> None:
    found, problems = records.read_images(folder, None)
    for record in found:
        assert Path(record.file).resolve().is_relative_to(folder.resolve())
    _told(problems)


def _sidecars(work: Path) -> list[Files]:
    pictures = _captions("x", "")[0]
    del pictures["x"]
    beside = {"a.txt": b"a cat", "b.caption": "一只猫\n".encode(), "图.txt": b"two\r\nlines"}
    return [{**beside, **pictures}]


def _spoil_sidecars(chance: random.Random, seeds: Sequence[Files]) -> Files:
    files = dict(seeds[0])
    for name in ("a.txt", "b.caption", "图.txt"):
        content = spoil(chance, files.pop(name))
        at = chance.choice(("", "", "", "10_x/", ".hidden/", "sub/"))
        files[at + chance.choice((name, name, name.replace(".", ".png."), name.upper()))] = content
    return files


def _undo(work: Path) -> list[Files]:
    file = {"name": "metadata.csv", "before": "file_name,text\n", "after_sha256": "0" * 64}
    stored = {"format_version": 1, "files": [file]}
    return [
        {".captions.undo.json": json.dumps(stored).encode(), "metadata.csv": b"file_name,text\n"}
    ]


def _read_undo(folder: Path) -> None:
    for stored in caption_store.load(folder / ".captions.undo.json"):
        assert stored.path.resolve().is_relative_to(folder.resolve())
        stored.state()


# --- texts ----------------------------------------------------------------------------------------


def _texts_jsonl(work: Path) -> list[Files]:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in GOOD_ROWS]
    return [{"x.jsonl": "".join(lines).encode()}, *({"x.jsonl": line.encode()} for line in lines)]


def _texts_json(work: Path) -> list[Files]:
    return [{"x.json": json.dumps(GOOD_ROWS, ensure_ascii=False, indent=1).encode()}]


def _texts_csv(work: Path) -> list[Files]:
    header = 'prompt,completion,history\n"one, two",three,"[[""a"", ""b""]]"\nvier,"fünf\n六",\n'
    return [{"x.csv": header.encode()}, {"x.csv": b'a question,"an answer"\n' * 3}]


def _raw_texts(work: Path) -> list[Files]:
    return [{"a.txt": "第一章\r\n\r\nIt was dark.".encode(), "b.md": b"# A title\n\nand text\n"}]


def _parquet(work: Path) -> list[Files]:
    import pyarrow as pa
    from pyarrow import parquet

    found = []
    for rows in ([GOOD_ROWS[0]] * 3, [GOOD_ROWS[2]] * 2, [{"text": "a raw text"}] * 5):
        stream = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), stream)
        found.append({"x.parquet": stream.getvalue()})
    return found


def _spoil_texts(chance: random.Random, seeds: Sequence[Files]) -> Files:
    files = dict(chance.choice(seeds))
    ((name, content),) = chance.sample(list(files.items()), 1)
    donor = chance.choice(list(chance.choice(seeds).values()))
    if name.endswith("l") and chance.random() < 0.6:
        lines = content.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = spoil_json(chance, lines[at], donor)
        files[name] = b"\n".join(lines)
    elif name.endswith(".json") and chance.random() < 0.6:
        files[name] = spoil_json(chance, content, donor)
    else:
        files[name] = spoil(chance, content, donor)
    return files


def _spoil_bytes(chance: random.Random, seeds: Sequence[Files]) -> Files:
    return {name: spoil(chance, content) for name, content in chance.choice(seeds).items()}


def _read_texts(folder: Path) -> None:
    found = conversations.read_texts(folder, None)
    for record in found.records:
        json.dumps([record.messages, record.tools, record.text], ensure_ascii=False).encode("utf-8")
    _told(found.problems)


# --- pictures -------------------------------------------------------------------------------------


def _pictures(work: Path) -> list[Files]:
    random_HWC = np.random.default_rng(0).integers(0, 255, (24, 40, 4), np.uint8)
    rgba = Image.fromarray(random_HWC)
    found: list[Files] = []

    def add(name: str, picture: Image.Image, **options: object) -> None:
        stream = io.BytesIO()
        picture.save(stream, **options)  # type: ignore[arg-type]
        found.append({name: stream.getvalue()})

    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a cat" * 40, zip=True)
    text.add_itxt("note", "图" * 40, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    add("a.png", rgba, format="PNG", pnginfo=text, exif=exif)
    add("p.png", rgba.convert("P"), format="PNG", transparency=3)
    add("i.png", Image.fromarray(random_HWC[..., 0].astype(np.uint16) * 257), format="PNG")
    add("b.jpg", rgba.convert("RGB"), format="JPEG", exif=exif)
    add("c.jpg", rgba.convert("CMYK"), format="JPEG", progressive=True)
    add("w.webp", rgba, format="WEBP", lossless=True, exif=exif)
    add("v.webp", rgba.convert("RGB"), format="WEBP")
    add("x.bmp", rgba.convert("RGB"), format="BMP")
    add("g.png", rgba.convert("P"), format="GIF")
    frames = [rgba.rotate(90 * n) for n in range(3)]
    add("n.png", frames[0], format="PNG", save_all=True, append_images=frames[1:])
    add("m.webp", frames[0], format="WEBP", save_all=True, append_images=frames[1:])
    return found


def _read_picture(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        look = looking.look(path)
        if look.error is not None:
            raise UserError([Problem(str(path), look.error[1], "error", look.error[0])])


TARGETS = (
    Target("config", 180, _configs, _spoil_config, _read_config),
    Target("override", 40, _overrides, _spoil_bytes, _read_value),
    Target("captions-csv", 80, _captions_csv, _spoil_first, _read_captions),
    Target("captions-jsonl", 80, _captions_jsonl, _spoil_first, _read_captions),
    Target("captions-beside", 20, _sidecars, _spoil_sidecars, _read_captions),
    Target("captions-undo", 10, _undo, _either, _read_undo),
    Target("texts-jsonl", 80, _texts_jsonl, _spoil_texts, _read_texts),
    Target("texts-json", 30, _texts_json, _spoil_texts, _read_texts),
    Target("texts-csv", 30, _texts_csv, _spoil_texts, _read_texts),
    Target("texts-raw", 10, _raw_texts, _spoil_texts, _read_texts),
    Target("texts-parquet", 20, _parquet, _spoil_bytes, _read_texts),
    Target("pictures", 80, _pictures, _spoil_bytes, _read_picture),
)  # fmt: skip
