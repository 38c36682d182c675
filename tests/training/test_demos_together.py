"""Both demos, their own data, models and configs, by one process and by two: the same LoRA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_scripts import pipeline
from lora_scripts.config import load
from tests.training.test_processes import forked_run, same

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="torchrun needs libuv on Windows"),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["demo_image", "demo_text"])
def test_two_processes_train_a_demo_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In float32, with the samples of a step that the config asks for."""
    monkeypatch.chdir(ROOT)
    config = ROOT / "configs" / f"{name}.yaml"
    asked = load(config)
    if not Path(asked.base_model).exists():
        pytest.skip("`make demo-text` fetches the model")
    assert asked.gradient_accumulation_steps == 1 and asked.batch_size != "auto"
    common = [
        f"batch_size={asked.batch_size // 2}", "mixed_precision=no", "max_train_steps=4",
        "eval_steps=4", "sample_prompts=[]", f"cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    if name == "demo_image":
        common.append("output_name=lora")
    alone = [*common, f"output_dir={tmp_path / 'alone'}", "gradient_accumulation_steps=2"]
    assert pipeline.run(config, alone) == pipeline.EXIT_DONE
    forked_run(config, 2, *common, f"output_dir={tmp_path / 'together'}")
    same(tmp_path / "alone", tmp_path / "together")
