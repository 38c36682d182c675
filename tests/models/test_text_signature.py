"""What a language model's `base_model` is told to be, and every refusal by its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from lora_scripts.errors import UserError
from lora_scripts.models.gguf_header import read_gguf_header
from lora_scripts.models.text_signature import read_text_signature
from tests import base_toys, text_toys


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model of each layout."""
    root = tmp_path_factory.mktemp("models")
    text_toys.save_model(root / "llama")
    base_toys.save_chatglm(root / "glm4", "glm4")
    base_toys.save_gguf(root / "base.gguf", "MOSTLY_Q8_0")
    return root


def copied(made: Path, target: Path) -> Path:
    """A copy of the toy folder that a test may damage."""
    target.mkdir()
    for file in (made / "llama").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_text_signature(path)
    return str(caught.value)


def test_the_three_layouts(made: Path) -> None:
    folder = read_text_signature(made / "llama")
    assert (folder.layout, folder.config["model_type"]) == ("transformers", "llama")
    assert [path.name for path in folder.weights] == ["model.safetensors"]
    assert not folder.own_code
    glm = read_text_signature(made / "glm4")
    assert glm.layout == "chatglm" and glm.own_code
    assert len(glm.weights) == 2
    single = read_text_signature(made / "base.gguf")
    assert (single.layout, single.config["general.architecture"]) == ("gguf", "llama")
    assert single.weights == [made / "base.gguf"]


# --- folders --------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def put(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8") and None


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def rename_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def lose_a_shard(folder: Path) -> None:
    rename_shard(folder)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    content = json.dumps({"weight_map": {"a": names[0], "b": names[1]}})
    put("model.safetensors.index.json", content)(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (put("model_index.json", "{}"), "a diffusers folder, a model for images: set task_type: "),
        (
            put("adapter_config.json", '{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}'),
            "this is a LoRA, not a base model; its base is 'Qwen/Qwen3-0.6B'",
        ),
        (remove("config.json"), "this folder has no config.json. For task_type: text-generation"),
        (put("config.json", "{"), "config.json: the file cannot be read as JSON"),
        (put("config.json", "[]"), "config.json: the file should hold one JSON object"),
        (to_pickle, "there is only pytorch_model.bin, a Python pickle, which can run any code"),
        (remove("model.safetensors"), "there are no .safetensors weights; fetch the folder whole"),
        (lose_a_shard, "there is no model-00002-of-00002.safetensors; fetch the folder whole"),
        (rename_shard, "there is no model.safetensors (nor model.safetensors.index.json)"),
        (put("model.safetensors.index.json", "{}"), "there is no weight_map in it"),
        (cut_short, "A download that was cut short looks like this: fetch it again"),
        (pointer, "it is a Git LFS pointer"),
        (remove("tokenizer.json"), "there is no tokenizer (none of tokenizer.json, "),
    ],
)
def test_folders_that_are_refused(
    damage: Callable[[Path], None], said: str, made: Path, tmp_path: Path
) -> None:
    folder = copied(made, tmp_path / "模型 base")
    damage(folder)
    assert said in refusal(folder)
    assert str(folder) in refusal(folder)


def test_every_damaged_file_is_named(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "base")
    cut_short(folder)
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_text_signature(folder)
    assert [Path(p.where).name for p in caught.value.problems] == [
        "model.safetensors", "more.safetensors"
    ]  # fmt: skip


def test_an_empty_folder_and_one_of_ggufs(made: Path, tmp_path: Path) -> None:
    assert "this folder has no config.json. For task_type" in refusal(tmp_path)
    (tmp_path / "b.Q4_K_M.gguf").touch()
    (tmp_path / "a.Q8_0.gguf").touch()
    assert f"; name the file: {tmp_path / 'a.Q8_0.gguf'}. For" in refusal(tmp_path)


def test_a_checkpoint_of_stable_diffusion_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "v1-5.safetensors").touch()
    assert "this folder has no config.json" in refusal(tmp_path)


def test_without_weights_only_the_small_files_are_looked_at(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "base")
    remove("model.safetensors")(folder)
    assert read_text_signature(folder, with_weights=False).layout == "transformers"
    remove("tokenizer.json")(folder)
    with pytest.raises(UserError, match="there is no tokenizer"):
        read_text_signature(folder, with_weights=False)


# --- files ----------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    assert "nothing is there. For task_type: text-generation name" in refusal(tmp_path / "gone")


def test_a_file_of_a_folder(made: Path) -> None:
    weights = made / "llama" / "model.safetensors"
    assert f"this is no GGUF file; name the folder: {made / 'llama'}." in refusal(weights)


@pytest.mark.parametrize("content", [b"", b"<html>", b"GGU"])
def test_a_gguf_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "this is no GGUF file, or a download that was cut short" in refusal(path)


@pytest.mark.parametrize("kept", [4, 20, 300, 9000])
def test_a_gguf_whose_header_is_cut(kept: int, made: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes((made / "base.gguf").read_bytes()[:kept])
    assert "the file is damaged or was cut short; fetch it again" in refusal(path)


@pytest.mark.parametrize("lost", [40, 9000])  # the writer fills up the last tensor's last bytes
def test_a_gguf_whose_tensors_are_cut(lost: int, made: Path, tmp_path: Path) -> None:
    content = (made / "base.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[:-lost])
    said = refusal(path)
    assert "the file is damaged: its header describes" in said
    assert f"there are {len(content) - lost:,}. A download that was cut short" in said


def write_gguf(path: Path, change: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.add_type("adapter"), "holds no whole model (its type is 'adapter')"),
        (lambda w: w.add_type("mmproj"), "holds no whole model (its type is 'mmproj')"),
        (lambda w: w.add_uint16("split.count", 3), "one part of several; join them"),
        (lambda w: w.add_type("model"), "this .gguf file holds no tokenizer"),
    ],
)
def test_ggufs_that_are_refused(
    change: Callable[[gguf.GGUFWriter], None], said: str, tmp_path: Path
) -> None:
    assert said in refusal(write_gguf(tmp_path / "x.gguf", change))


def test_another_version_of_gguf(made: Path, tmp_path: Path) -> None:
    content = (made / "base.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[:4] + b"\0\0\0\3" + content[8:])  # big-endian
    assert "its header cannot be read" in refusal(tmp_path / "x.gguf")


def test_a_header_is_what_gguf_py_reads(made: Path) -> None:
    header = read_gguf_header(made / "base.gguf")
    reader = gguf.GGUFReader(made / "base.gguf")
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    expected = {
        f"{key}#" if isinstance(value, list) else key: len(value)
        if isinstance(value, list)
        else value
        for key, value in fields.items()
    }
    assert dict(header.facts) == expected
    assert header.tensors == len(reader.tensors)


def test_lists_of_every_kind_are_passed_over(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_array("a.numbers", [1, 2, 3])
        writer.add_array("a.truths", [True, False])
        writer.add_array("a.texts", ["天", ""])
        writer.add_array("a.floats", [0.5])
        writer.add_float64("b", 0.25)
        writer.add_string("c", "天气")

    facts = read_gguf_header(write_gguf(tmp_path / "x.gguf", change)).facts
    assert facts == {
        "general.architecture": "llama", "a.numbers#": 3, "a.truths#": 2, "a.texts#": 2,
        "a.floats#": 1, "b": 0.25, "c": "天气",
    }  # fmt: skip


def test_without_gguf_the_error_says_what_to_install(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install gguf" in refusal(made / "base.gguf")
