"""No code of strangers is run: each way in is attempted."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_scripts import config
from lora_scripts.device import choose
from lora_scripts.errors import UserError
from lora_scripts.models import causal_lm, lora
from lora_scripts.models.header import read_header
from lora_scripts.models.signature import read_signature
from lora_scripts.models.text_signature import read_text_signature
from lora_scripts.models.vae_signature import read_vae
from tests import text_toys
from tests.safety.attempts import SOURCES, refused


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_no_source_reads_what_can_hold_code() -> None:
    """Nothing calls a reader of pickles, evaluates text, or runs a shell."""
    forbidden = re.compile(
        r"pickle|marshal|joblib|dill|shelve|\btorch\.load\b|allow_pickle=True|np\.load\b"
        r"|shell=True|os\.system|yaml\.load\b|unsafe_load"
    )
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names]  # fmt: skip
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found = [text for text in names + calls if forbidden.search(text) and "raise" not in text]
        found = [text for text in found if not text.startswith(("user_error(", "refuse"))]
        assert not found, (path, found)
        bare = [node.func.id for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]  # fmt: skip
        assert not {"eval", "exec", "compile", "__import__"} & set(bare), path


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl", ".safetensors"])
def test_pickles_are_refused_by_name_and_by_content(tmp_path: Path, suffix: str) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    assert "pickle" in refused(lambda: read_signature(path))
    assert "pickle" in refused(lambda: read_vae(path))
    if suffix == ".safetensors":
        torch.save({"a": torch.ones(1)}, path)
        assert "zip archive, as PyTorch's pickles are" in refused(lambda: read_header(path))
    assert not mark.exists()


def test_a_folder_with_pickles_alone_is_refused(tmp_path: Path, sd_folder: Path) -> None:
    text = text_toys.save_model(tmp_path / "text")
    (text / "model.safetensors").unlink()
    (text / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert "pytorch_model.bin, a Python pickle" in refused(lambda: read_text_signature(text))
    adapter = tmp_path / "adapter"
    lora.write_peft(adapter, [lora.AdaptedLayer("q", torch.ones(1, 2), torch.ones(2, 1), 1.0)], "a")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises((UserError, OSError)):
        lora.read_peft(adapter)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.mkdir ['MARK']", "!!python/name:os.system", "!!binary aGk=",
     "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['MARK']", "!!python/module:os"],
)  # fmt: skip
def test_yaml_builds_no_objects(tmp_path: Path, value: str) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "my.yaml"
    path.write_text(f"output_name: {value.replace('MARK', str(mark))}\n", encoding="utf-8")
    assert "is not allowed" in refused(lambda: config.load(path))
    assert "is not allowed" in refused(lambda: config.load(path, [f"seed={value}"]))
    assert not mark.exists()


EVIL = "import os\nos.mkdir({mark!r})\nclass Evil: pass\n"


def evil_folder(folder: Path, file: str, **changes: Any) -> tuple[Path, Path]:
    """A toy whose `file` names classes in Python code that lies beside it."""
    text_toys.save_model(folder)
    mark = folder.with_name("mark")
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)), encoding="utf-8")
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**values, **changes}), encoding="utf-8")
    return folder, mark


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    own = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    folder, mark = evil_folder(tmp_path / "m", "config.json", auto_map=own, model_type="evil")
    found = read_text_signature(folder)
    assert "not run unless the config says trust_remote_code" in refused(
        lambda: causal_lm.load(found, choose("cpu", "no"))
    )
    assert not mark.exists()


def test_known_types_ignore_their_code(tmp_path: Path) -> None:
    own = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    folder, mark = evil_folder(tmp_path / "m", "config.json", auto_map=own)
    causal_lm.load(read_text_signature(folder), choose("cpu", "no"))
    assert not mark.exists()


def test_a_tokenizers_own_code_is_not_run(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    folder, mark = evil_folder(tmp_path / "m", "tokenizer_config.json", **own)
    try:
        causal_lm.read_tokenizer(folder)
    except UserError as error:
        assert "tokenizer" in str(error)
    assert not mark.exists()


def test_peft_imports_no_module_that_an_adapter_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(mark)), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    layers = [lora.AdaptedLayer("model.layers.0.self_attn.q_proj", torch.ones(2, 32),
                                torch.ones(32, 2), 2.0)]  # fmt: skip
    lora.write_peft(tmp_path / "a", layers, "some/base")
    path = tmp_path / "a" / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"megatron_config": {"a": 1}, "megatron_core": "evil"}
    path.write_text(json.dumps(values), encoding="utf-8")
    model = text_toys.model("llama")
    assert "uses megatron_config" in refused(
        lambda: lora.with_adapters(model, [(tmp_path / "a", 1.0)])
    )
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rank_pattern": {"(a+)+$": 2}}, "could take hours to match"),
        ({"target_modules": "(.*)*(.*)*x"}, "could take hours to match"),
        ({"r": 10**9}, "its largest rank is 2"),
        ({"peft_type": "PREFIX_TUNING"}, "only LORA is read"),
        ({"layer_replication": [[0, 10**9]]}, "uses layer_replication"),
    ],
)
def test_an_adapters_settings_are_bounded(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    layers = [lora.AdaptedLayer("q_proj", torch.ones(2, 8), torch.ones(8, 2), 2.0)]
    lora.write_peft(tmp_path, layers, "some/base")
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")
    assert what in refused(lambda: lora.read_peft(tmp_path))


def test_kernels_of_the_hub_are_not_fetched(tmp_path: Path) -> None:
    folder, _ = evil_folder(tmp_path / "m", "config.json", _attn_implementation="evil/kernel")
    assert "compiled code from the hub" in refused(lambda: read_text_signature(folder))
