"""Files that fuzzing found to be answered with an exception, in silence, or after too long."""

from __future__ import annotations

import gzip
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_scripts import caption_store, inspect_lora, inventory, run_folder, run_lock
from lora_scripts.data import chat
from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.label import journal
from lora_scripts.models import causal_lm, foreign, lora
from lora_scripts.models.gguf_header import read_gguf_header
from lora_scripts.models.header import read_header
from lora_scripts.models.signature import read_signature
from lora_scripts.models.text_signature import read_text_signature
from lora_scripts.tasks import build
from lora_scripts.training import checkpoint, contents, log
from tests import base_toys, text_toys, toys
from tests.fuzz import targets_runs

CPU = Compute(torch.device("cpu"), "no")
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def refused(read: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    return str(caught.value)


def change(path: Path, **values: Any) -> None:
    """Other values in a JSON file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, **values}), encoding="utf-8")


# --- LoRAs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
])  # fmt: skip
def test_numbers_in_a_header_beyond_all_measure(tmp_path: Path, entry: dict[str, Any]) -> None:
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    refused(read_header, path)


@pytest.mark.parametrize("changes", [{"lora_alpha": []}, {"r": "x"}, {"rank_pattern": {"(": 1}},
                                     {"rank_pattern": 7}])  # fmt: skip
def test_settings_of_a_lora_of_the_wrong_kind(tmp_path: Path, changes: dict[str, Any]) -> None:
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    settings = json.dumps({"unet.r": 2, "unet.lora_alpha": 2,
                           **{f"unet.{key}": value for key, value in changes.items()}})  # fmt: skip
    path = tmp_path / "a.safetensors"
    save_file({"unet.q.lora_A.weight": down, "unet.q.lora_B.weight": up}, path,
              metadata={"lora_adapter_metadata": settings})  # fmt: skip
    assert "are damaged" in refused(inspect_lora.inspect, path)


def test_matrices_without_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    halves = (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight")
    save_file({name: torch.tensor(1.0) for name in halves}, path)
    assert "damaged" in refused(inspect_lora.inspect, path)


def test_alphas_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{KOHYA}.lora_down.weight": torch.ones(2, 4), f"{KOHYA}.alpha": torch.ones(3),
               f"{KOHYA}.lora_up.weight": torch.ones(4, 2)}, path)  # fmt: skip
    assert ".alpha has the shape [3]" in refused(inspect_lora.inspect, path)


# --- models ---------------------------------------------------------------------------------------


def test_what_libraries_raise_is_said(tmp_path: Path) -> None:
    class Panic(BaseException):
        """As Rust's: no `Exception`."""

    Panic.__module__ = "pyo3_runtime"
    for error in (Panic("range end\nmore"), Exception("range end"), AttributeError("range end")):
        said = pytest.raises(UserError, match=r"this file cannot be read .*: range end")
        with said, foreign.reading(tmp_path, "this file"):
            raise error
    for passed in (KeyboardInterrupt(), MemoryError(), RuntimeError("CUDA out of memory")):
        with pytest.raises(type(passed)), foreign.reading(tmp_path, "this file"):
            raise passed


@pytest.mark.parametrize(("file", "changes"), [
    ("config.json", {"hidden_size": "32"}),
    ("config.json", {"model_type": ["llama"]}),
    ("tokenizer.json", {"model": {"type": "Nothing"}}),
    ("tokenizer_config.json", {"model_max_length": "many"}),
])  # fmt: skip
def test_language_models_with_odd_files(tmp_path: Path, file: str, changes: dict[str, Any]) -> None:
    folder = text_toys.save_model(tmp_path / "m")
    change(folder / file, **changes)
    refused(lambda: causal_lm.load(read_text_signature(folder), CPU))


def test_chatglm_with_odd_numbers(tmp_path: Path) -> None:
    folder = base_toys.save_chatglm(tmp_path / "m")
    change(folder / "config.json", num_attention_heads="4")
    assert "expected a count" in refused(causal_lm.load_config, read_text_signature(folder))


def test_a_unet_whose_channels_are_a_list(tmp_path: Path, sd_folder: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("model_index.json", "unet/config.json"):
        (tmp_path / name).write_bytes((sd_folder / name).read_bytes())
    change(tmp_path / "unet" / "config.json", in_channels=[4])
    assert "without 4 input channels" in refused(read_signature, tmp_path)


def test_weights_that_are_missing_are_not_drawn_by_chance(tmp_path: Path) -> None:
    folder = toys.save_stable_diffusion(tmp_path / "sd")
    text = text_toys.save_model(tmp_path / "text")
    for path in (folder / "text_encoder" / "model.safetensors", text / "model.safetensors"):
        tensors = load_file(path)
        del tensors[next(name for name in tensors if "norm" in name)]
        save_file(tensors, path, metadata={"format": "pt"})
    what = "1 weights of the model are not in its files"
    assert what in refused(build.load_family, read_signature(folder), CPU)
    assert what in refused(lambda: causal_lm.load(read_text_signature(text), CPU))


def gguf(*facts: bytes, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(facts)) + b"".join(facts) + tensors


def fact(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize("content", [
    gguf(fact("a", 9, struct.pack("<IQ", 6, 2**63))),  # a list beyond the end of all files
    gguf(fact("a", 9, struct.pack("<IQ", 9, 5) * 4000)),  # lists in lists
    gguf(fact("general.alignment", 4, struct.pack("<I", 0)), count=1,
         tensors=struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 1, 0, 0)),
    gguf(fact("general.alignment", 8, struct.pack("<Q", 1) + b"x")),
    gguf(count=1, tensors=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 10**6) + bytes(8 << 20)),
])  # fmt: skip
def test_gguf_headers_beyond_all_measure(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert re.search("cannot be read|is damaged", refused(read_gguf_header, path))


# --- what a run leaves ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    targets_runs._runs(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("changes", [
    {"position": {"step": "4"}}, {"position": {"step": -4, "samples": 0}}, {"config": []},
    {"sha256": 7}, {"sha256": {"../run.json": "x"}}, {"scaler": None}, {"total_steps": [8]},
])  # fmt: skip
def test_a_state_with_values_of_the_wrong_kind(run: Path, changes: dict[str, Any]) -> None:
    path = run / targets_runs.STATE
    change(path, **changes)
    path.write_bytes(targets_runs._summed(path.read_bytes()))
    assert "does not hold what it must" in refused(checkpoint.read_state, path.parent)
    path.write_text("[1]", encoding="utf-8")
    assert "does not hold what it must" in refused(checkpoint.read_state, path.parent)


def test_a_checkpoints_config_without_its_name(run: Path) -> None:
    path = run / targets_runs.STATE
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    del config["output_name"]
    change(path, config=config)
    path.write_bytes(targets_runs._summed(path.read_bytes()))
    assert "is not one of this program" in refused(run_folder.decide, targets_runs._config(run))


def test_a_checkpoints_file_with_an_endless_name(run: Path) -> None:
    path = run / targets_runs.STATE
    change(path, sha256={"a" * 5000: "x"})
    path.write_bytes(targets_runs._summed(path.read_bytes()))
    assert "is missing" in refused(checkpoint.read_state, path.parent)


def test_an_optimizers_state_of_another_form(run: Path) -> None:
    folder = (run / targets_runs.STATE).parent
    parameters = targets_runs._parameters()
    optimizer = targets_runs._optimizer(parameters)
    for value in ({"state": {}, "groups": []}, {"state": 7, "groups": [{}]}, {}):
        change(folder / "state.json", optimizer=value)
        (folder / "state.json").write_bytes(
            targets_runs._summed((folder / "state.json").read_bytes())
        )
        state = checkpoint.read_state(folder)
        tensors = contents.read_tensors(folder)
        refused(contents.unpack, folder, tensors, state, parameters, optimizer)


@pytest.mark.parametrize("text", ["[]", "{", '{"steps": 4}', '{"steps": 4, "files": [7]}'])
def test_a_damaged_record_of_a_run(run: Path, text: str) -> None:
    (run / "run.json").write_text(text, encoding="utf-8")
    assert "run.json: is damaged; remove it" in refused(
        run_folder.decide, targets_runs._config(run)
    )


def test_metrics_with_rows_of_the_wrong_kind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"step": 1, "loss": 0.5}', b"[1]", b'{"loss": 1}', b'{"step": "2"}', b"\xff\xfe",
            b'{"step": 2, "loss": "x"}', '{"step": 3}'.encode("utf-16-be"),
            b"[" * 3000, b'{"step": 9, "loss": 1}']  # fmt: skip
    path.write_bytes(b"\n".join(rows))
    log.cut_back(path, 9)
    assert path.read_bytes() == rows[0] + b"\n"
    path.write_text('{"step": 1, "a\x85": 1}\n', encoding="utf-8")
    log.cut_back(path, 9)
    assert log.read_metrics(tmp_path) == [{"step": 1, "a\x85": 1}]


def test_no_matrices_for_a_peft_folder(tmp_path: Path) -> None:
    layers = [lora.AdaptedLayer("q_proj", torch.ones(2, 8), torch.ones(8, 2), 2.0)]
    lora.write_peft(tmp_path, layers, "some/base")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "lora_A" in name}, path)
    assert "lacks the second matrix" in refused(lora.read_peft, tmp_path)


def test_nesting_without_end(tmp_path: Path) -> None:
    """Python's JSON reader answers it with a RecursionError."""
    deep = "[" * 100_000
    (tmp_path / "store.json").write_text(deep, encoding="utf-8")
    assert "no edit that this version can take back" in refused(
        caption_store.load, tmp_path / "store.json"
    )
    with gzip.open(tmp_path / inventory.INVENTORY, "wt", encoding="utf-8") as stream:
        stream.write(deep + "\n")
    assert inventory.changes(tmp_path, [("a.png", "hash")]) == ""
    assert inspect_lora._tags({"ss_tag_frequency": deep}) == []
    (tmp_path / "holder.json").write_text(deep, encoding="utf-8")
    assert run_lock._read(tmp_path / "holder.json") is None
    assert not journal._is_object(deep.encode())
    call = {"name": "look", "arguments": deep}
    assert "the arguments of a call of look are not valid JSON" in refused(chat._with_object, call)
