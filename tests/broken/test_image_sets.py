"""Broken sets of pictures through `lora-scripts check` as it is typed: file, line, what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import console, runs, toys
from tests.broken.image_sets import CAPTIONS, SETS, Broken, good_set, picture, write

ROOT = Path(__file__).parents[2]
NAMES = {"error": "errors", "warning": "warnings", "note": "notes"}


def filled(value: Any, folder: Path) -> Any:
    """A value with `{data}` and `{config}` written out."""
    text = json.dumps(value).replace("{data}", str(folder / "data"))
    return json.loads(text.replace("{config}", str(folder / "my.yaml")))


def config_of(folder: Path, base: Path, broken: Broken) -> Path:
    broken.build(good_set(folder / "data"))
    values = runs.values(base, folder / "data", folder, **filled(broken.keys, folder))
    values = {key: value for key, value in values.items() if value is not None}
    return toys.write_config(folder / "my.yaml", **values)


def found_by(path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code, said = console.command("check", "--config", str(path), "--json", *more)
    return code, json.loads(said)


@pytest.mark.parametrize("broken", SETS, ids=lambda broken: broken.name.replace(" ", "-"))
def test_a_broken_set(broken: Broken, tmp_path: Path, sd_folder: Path) -> None:
    if not broken.runs:
        pytest.skip("not on this system")
    path = config_of(tmp_path, sd_folder, broken)
    code, found = found_by(path)
    assert code == bool(found["errors"]), found
    assert (found["report"] is None) == bool(found["errors"])
    these = [p for p in found[NAMES[broken.severity]] if p["kind"] == broken.kind]
    says = filled([list(each) for each in broken.says], tmp_path)
    for where, what in says:
        assert any(is_at(p["where"], where) and what in p["what"] for p in these), found
    said_code, said = console.command("check", "--config", str(path))
    assert said_code == code
    for _, what in says:
        assert what in said


def is_at(found: str, where: str) -> bool:
    """Whether a place is the one that is meant; of the config any line of it."""
    return where in ("", found, re.sub(r"my\.yaml line \d+", "my.yaml", found))


def test_each_fault_is_another_one() -> None:
    assert len(SETS) >= 45
    assert len({broken.name for broken in SETS}) == len(SETS)


def test_a_good_set_has_nothing_to_say(tmp_path: Path, sd_folder: Path) -> None:
    good = Broken("good", lambda folder: None, "", [])
    code, found = found_by(config_of(tmp_path, sd_folder, good))
    assert code == 0
    assert not found["errors"] and not found["warnings"] and not found["notes"]
    assert found["report"] == {
        "pictures": 4,
        "captions": 4,
        "roles": {"train": 4},
        "width": {"least": 64, "middle": 64, "most": 64},
        "height": {"least": 64, "middle": 64, "most": 64},
        "buckets": [{"width": 64, "height": 64, "pictures": 4}],
        # the toy's tokens are letters
        "tokens": {"least": 15, "middle": 16, "most": 17},
        "tags": {},
    }


def test_the_table_of_findings_is_whole() -> None:
    """docs/data_checks.md lists what is found, with its severity, and nothing else."""
    whole = (ROOT / "docs" / "data_checks.md").read_text(encoding="utf-8")
    text = whole.partition("## Pictures")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \| (error|warning|note) \|", text, re.MULTILINE)
    assert set(rows) == {(broken.kind, broken.severity) for broken in SETS}
    assert len(rows) == len(set(rows))


def test_faults_of_one_set_are_all_told(tmp_path: Path, sd_folder: Path) -> None:
    """Faults that do not hide each other, in one set: errors first, then warnings."""
    names = ("an empty file", "a picture not named", "a kind that is not read")
    chosen = [broken for broken in SETS if broken.name in names]

    def build(folder: Path) -> None:
        for broken in chosen:
            broken.build(folder)
        write(folder, ["a.png,", "b.png,x", "c.png,one,two", "z.png,x"])

    path = config_of(tmp_path, sd_folder, Broken("all", build, "", []))
    code, said = console.command("check", "--config", str(path), "lora_rank=0")
    assert code == 2  # the config is wrong, too
    lines = said.splitlines()
    assert lines[0] == "4 problems:" and lines[5] == "3 warnings:"
    places = [line.split(": ")[0].strip() for line in lines[1:5] + lines[6:]]
    assert places == [
        "command line",
        "metadata.csv line 4",
        "metadata.csv line 5",
        str(tmp_path / "data/b.png"),
        str(tmp_path / "data"),
        "metadata.csv line 2",
        "metadata.csv",
    ]


def test_strict_data(tmp_path: Path, sd_folder: Path) -> None:
    (fault,) = [broken for broken in SETS if broken.name == "an empty caption"]
    path = config_of(tmp_path, sd_folder, fault)
    assert console.command("check", "--config", str(path))[0] == 0
    code, found = found_by(path, "strict_data=true")
    assert code == 1 and found["report"] is None
    assert [problem["kind"] for problem in found["errors"]] == ["strict-data"]
    code, said = console.command("train", "--config", str(path), "strict_data=true")
    assert code == 1
    assert "command line: strict_data: is true, so that warnings stop the run" in said
    assert 'metadata.csv line 3: the caption of "b.png" is empty' in said


def test_notes_do_not_stop_a_strict_run(tmp_path: Path, sd_folder: Path) -> None:
    (fault,) = [broken for broken in SETS if broken.name == "masks beside"]
    code, found = found_by(config_of(tmp_path, sd_folder, fault), "strict_data=true")
    assert code == 0 and len(found["notes"]) == 1 and not found["warnings"]


def test_of_many_warnings_the_first_are_said(tmp_path: Path, sd_folder: Path) -> None:
    def build(folder: Path) -> None:
        for number in range(25):
            picture(number + 10, (32, 32)).save(folder / f"e{number:02}.png")
        rows = [f'{name},"{caption}"' for name, caption in CAPTIONS.items()]
        write(folder, [*rows, *(f"e{number:02}.png,picture {number}" for number in range(25))])

    path = config_of(tmp_path, sd_folder, Broken("many", build, "", []))
    code, said = console.command("check", "--config", str(path))
    assert code == 0
    assert said.count("is enlarged 2.0 times") == 10
    assert "Warning: … and 15 more like these; lora-scripts check --json lists all" in said
    _, found = found_by(path)
    assert len(found["warnings"]) == 25


def test_as_it_is_typed(tmp_path: Path, sd_folder: Path) -> None:
    (fault,) = [broken for broken in SETS if broken.name == "an unquoted comma"]
    path = config_of(tmp_path, sd_folder, fault)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_data.py"), "--config", str(path)],
        cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("1 problem:\n  metadata.csv line 3: 3 fields found, expected 2;")
