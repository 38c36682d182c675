"""What is foretold from shapes, against the real modules of the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_scripts.config import read
from lora_scripts.device import Compute, choose
from lora_scripts.memory import Estimate, Phase, fakes, foretell, imagined
from lora_scripts.memory.heaviest import Pictures
from lora_scripts.memory.tracker import bytes_of, tensors_of
from lora_scripts.models import lora
from lora_scripts.preflight import inputs
from lora_scripts.processes import Processes
from lora_scripts.schema import Config, ImageConfig
from tests import runs, text_toys, toys

KINDS = ("pictures", "captions")
CARD = Compute(torch.device("cuda"), "bf16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_stable_diffusion(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_pictures(tmp_path_factory.mktemp("data"), count=8)


@pytest.fixture(scope="module")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_toys.save_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    text_toys.write_jsonl(folder / "data.jsonl")
    return folder


def told(folder: Path, values: dict[str, Any], compute: Compute | None = None) -> Estimate:
    """The estimate of a run with these keys."""
    config, rows = prepared(folder, values)
    return foretell(config, rows, compute or choose(config.device, config.mixed_precision))


def prepared(folder: Path, values: dict[str, Any]) -> tuple[Config, list[Any]]:
    draft = read(toys.write_config(folder / "run.yaml", **values))
    rows, _ = inputs(draft)
    return draft.checked(), rows


def step_of(estimate: Estimate) -> Phase:
    return phase_of(estimate, "training step")


def phase_of(estimate: Estimate, name: str) -> Phase:
    (phase,) = (phase for phase in estimate.phases if phase.name == name)
    return phase


def test_weights_and_adapters_are_those_of_the_loaded_task(
    tmp_path: Path, base: Path, pictures: Path
) -> None:
    estimate = told(tmp_path, runs.values(base, pictures, tmp_path))
    parts = step_of(estimate).ram
    task, _, _ = runs.task(base, pictures, tmp_path)
    trained = bytes_of(lora.trainable(task.family.adapted["unet"]).values())
    whole = bytes_of(tensors_of(task.family.adapted["unet"]))
    modules = task.family.parts()
    assert parts["unet weights"] == whole - trained
    assert parts["adapters"] == trained
    assert not {"vae weights", "text_encoder weights"} & parts.keys()  # at rest
    encoding, captions = (phase_of(estimate, f"encoding of the {p}").ram for p in KINDS)
    assert encoding["vae weights"] == bytes_of(tensors_of(modules["vae"]))
    assert captions["text_encoder weights"] == bytes_of(tensors_of(modules["text_encoder"]))
    layers = len(lora.trainable(task.family.adapted["unet"]))
    assert parts["optimizer"] == 2 * trained + 4 * layers


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_family_is_foretold(tmp_path: Path, pictures: Path, family: Any) -> None:
    other = toys.FAMILIES[family][0](tmp_path / "base")
    values = runs.values(other, pictures, tmp_path, train_text_encoder=True, lora_type="dora")
    parts = step_of(told(tmp_path, values)).ram
    assert parts["activations"] > 0
    assert ("text_encoder_2 weights" in parts) == (family == "sdxl")


def test_activations_follow_batch_and_resolution(
    tmp_path: Path, base: Path, pictures: Path
) -> None:
    def activations(**changes: Any) -> int:
        values = runs.values(base, pictures, tmp_path, **changes)
        return step_of(told(tmp_path, values)).ram["activations"]

    one = activations(batch_size=1)
    assert 1.9 < activations(batch_size=2) / one < 2.1
    assert 3.5 < activations(batch_size=1, resolution=128) / one < 5.0
    assert activations(batch_size=1, gradient_checkpointing=True) < 0.7 * one


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_the_sampler_takes_no_more_than_one_of_training(
    tmp_path: Path, base: Path, pictures: Path, checkpointing: bool
) -> None:
    """So it is passed over where a micro-batch is as large."""
    values = runs.values(base, pictures, tmp_path, gradient_checkpointing=checkpointing)
    config, _ = prepared(tmp_path, values)
    assert isinstance(config, ImageConfig)
    cpu = choose("cpu", "no")
    fake, mode = fakes.images(config, cpu), FakeTensorMode(allow_non_fake_inputs=True)
    fakes.pretend(fake.parts.values(), mode)
    two, one = (Pictures(count, 64, 64, 1) for count in (2, 1))
    trained = imagined.image_step(fake, two, config, cpu, mode, text_too=False)
    assert 0 < imagined.sampler_step(fake, two, cpu, mode).peak <= trained.peak
    assert two.fits_into(two) and one.fits_into(two) and not two.fits_into(one)


def test_what_training_keeps_is_named(tmp_path: Path, base: Path, pictures: Path) -> None:
    values = runs.values(
        base, pictures, tmp_path, gradient_accumulation_steps=2, ema_decay=0.9, optimizer="lion"
    )
    estimate = told(tmp_path, values)
    adapters = step_of(estimate).ram["adapters"]
    assert estimate.later == {"gradients": adapters, "optimizer": adapters, "average": adapters}
    assert step_of(estimate).ram["gradients"] == adapters


def test_a_spread_base_is_a_share_of_it_and_the_block_at_work_twice(
    tmp_path: Path, base: Path, pictures: Path, text_base: Path, texts: Path
) -> None:
    spread = Compute(torch.device("cpu"), "no", Processes(0, 4), sharded=True)
    values = runs.text_values(text_base, texts, tmp_path)
    whole = step_of(told(tmp_path, values)).ram
    parts = step_of(told(tmp_path, values, spread)).ram
    assert parts["model weights"] == whole["model weights"] // 4
    model = text_toys.model("llama")
    pieces = [*model.model.layers, model.model.embed_tokens]
    assert parts["gathered weights"] == 2 * max(bytes_of(p.parameters()) for p in pieces)
    assert "gathered weights" not in {name for name, size in whole.items() if size}
    values = runs.values(base, pictures, tmp_path)
    whole = step_of(told(tmp_path, values)).ram
    parts = step_of(told(tmp_path, values, spread)).ram
    assert parts["unet weights"] == whole["unet weights"] // 4
    assert 0 < parts["gathered weights"] < whole["unet weights"]


def test_a_base_beside_the_card_is_in_ram_and_the_block_at_work_on_the_card(
    tmp_path: Path, base: Path, pictures: Path, text_base: Path, texts: Path
) -> None:
    beside = replace(CARD, sharded=True, offloaded=True)
    for name, values in (
        ("model", runs.text_values(text_base, texts, tmp_path)),
        ("unet", runs.values(base, pictures, tmp_path)),
    ):
        there = told(tmp_path, values, CARD)
        waiting = told(tmp_path, values, beside)
        weights = step_of(there).gpu[f"{name} weights"]
        assert step_of(waiting).ram[f"{name} weights"] == weights
        assert f"{name} weights" not in step_of(there).ram
        assert all(f"{name} weights" not in phase.gpu for phase in waiting.phases)
        assert 0 < step_of(waiting).gpu["gathered weights"] < 2 * weights
        assert step_of(waiting).gpu["CUDA itself"] == step_of(there).gpu["CUDA itself"]


def test_rows_decide_by_their_real_lengths(tmp_path: Path, text_base: Path, texts: Path) -> None:
    values = runs.text_values(text_base, texts, tmp_path, batch_size=3)
    estimate = told(tmp_path, values)
    task, config, _ = runs.text_task(text_base, texts, tmp_path, batch_size=3)
    lengths = task.data.encoding.lengths()
    keys = [runs.Key(config.seed, "train", epoch) for epoch in range(config.epochs)]
    most = max(int(lengths[list(b)].sum()) for key in keys for b in task.plan(key))
    assert estimate.batch == f"3 rows, {most:,} tokens"


def test_logits_grow_with_the_vocabulary(tmp_path: Path, texts: Path) -> None:
    def logits(words: int) -> int:
        base = text_toys.save_model(tmp_path / f"base-{words}", vocab_size=words)
        return step_of(told(tmp_path, runs.text_values(base, texts, tmp_path))).ram["logits"]

    assert 1.9 < logits(8000) / logits(4000) < 2.1


def test_padding_is_foretold_too(tmp_path: Path, text_base: Path, texts: Path) -> None:
    def activations(**changes: Any) -> int:
        values = runs.text_values(text_base, texts, tmp_path, **changes)
        return step_of(told(tmp_path, values)).ram["activations"]

    assert activations(packing=False) > 0
    assert activations(gradient_checkpointing=True) < 0.8 * activations()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma2", "lfm2", "gpt2"])
def test_other_language_models_are_foretold(tmp_path: Path, texts: Path, model_type: str) -> None:
    base = text_toys.save_model(tmp_path / "base", model_type)
    estimate = told(tmp_path, runs.text_values(base, texts, tmp_path))
    model = text_toys.model(model_type)
    assert step_of(estimate).ram["model weights"] >= bytes_of(model.parameters())


def test_what_is_used_in_every_step_is_there_in_every_step(
    tmp_path: Path, base: Path, pictures: Path
) -> None:
    live = {"cache_latents": False, "shuffle_tags": True}
    values = runs.values(base, pictures, tmp_path, **live)
    step = step_of(told(tmp_path, values))
    assert {"vae weights", "text_encoder weights"} <= step.ram.keys()
    step = step_of(told(tmp_path, values, CARD))
    assert {"vae weights", "text_encoder weights"} <= step.gpu.keys()


def test_a_card_holds_the_model_and_the_encoders_for_their_visits(
    tmp_path: Path, base: Path, pictures: Path
) -> None:
    """No card is needed to foretell what one will hold."""
    values = runs.values(base, pictures, tmp_path, mixed_precision="bf16")
    estimate = told(tmp_path, values, CARD)
    step = step_of(estimate)
    assert "unet weights" in step.gpu and "unet weights" not in step.ram
    assert "vae weights" not in {*step.ram, *step.gpu}
    assert "activations" in step.gpu and "activations" not in step.ram
    guests = {p.name: {n for n in p.gpu if n.endswith("weights")} - {"unet weights"}
              for p in estimate.phases}  # fmt: skip
    assert guests["encoding of the pictures"] == {"vae weights"}
    assert guests["encoding of the captions"] == {"text_encoder weights"}
    assert guests["training step"] == set()
    assert guests["export"] == {"text_encoder weights"}


def test_four_bits_are_a_little_more_than_half_a_byte(
    tmp_path: Path, text_base: Path, texts: Path
) -> None:
    def weights(**changes: Any) -> int:
        values = runs.text_values(text_base, texts, tmp_path, mixed_precision="bf16", **changes)
        return step_of(told(tmp_path, values, CARD)).gpu["model weights"]

    model = text_toys.model("llama")
    numbers = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    saved = weights() - weights(quantization="nf4")
    assert saved == pytest.approx(numbers * (2 - 0.5 - 1 / 64), rel=0.01)


def test_the_table_names_every_part(tmp_path: Path, base: Path, pictures: Path) -> None:
    lines = told(tmp_path, runs.values(base, pictures, tmp_path, sample_prompts=["a"])).table()
    assert lines[0].startswith("RAM: about ")
    for part in ("imports", "unet weights", "adapters", "optimizer", "activations"):
        assert f"{part} " in lines[0] + lines[1]
    assert "loading" in lines[1] and "samples" in " ".join(lines)
