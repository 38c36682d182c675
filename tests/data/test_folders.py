"""Names of files as texts: what pathlib would say of them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from lora_scripts.data.folders import joined, stem_of, suffix_of, walk_files

NAMES = (
    "a.png", "sub/b.JPEG", "sub.d/c", "c.", ".png", "..png", "a.b.png", "sub/.txt", "a..",
    "sub/a b.tar.gz", ".a.png", "...", "图.webp",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_suffix_and_stem(name: str) -> None:
    assert suffix_of(name) == PurePosixPath(name).suffix
    assert stem_of(name) == name.removesuffix(PurePosixPath(name).suffix)


@pytest.mark.parametrize("folder", ["data", ".", "/data", "../data", "/", "a/b"])
@pytest.mark.parametrize("name", ["a.png", "sub/a.png"])
def test_a_name_in_a_folder(folder: str, name: str) -> None:
    assert joined(Path(folder), name) == str(Path(folder) / name)


def test_names_are_relative_to_the_folder_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "sub" / "deep").mkdir(parents=True)
    for name in ("b.png", "a.png", "sub/c.png", "sub/deep/d.png", ".hidden.png"):
        (tmp_path / "data" / name).touch()
    expected = ["a.png", "b.png", "sub/c.png", "sub/deep/d.png"]
    assert list(walk_files(tmp_path / "data", "images", [])) == expected
    monkeypatch.chdir(tmp_path / "data")
    assert list(walk_files(Path(), "images", [])) == expected
    assert list(walk_files(Path("../data"), "images", [])) == expected
