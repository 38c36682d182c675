"""The base spread over two processes: the run of one, with half of the base in each."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lora_scripts import pipeline
from lora_scripts.config import read
from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.models.kinds import Family
from lora_scripts.processes import Processes
from tests import forked, runs, text_toys
from tests.training import sharded
from tests.training.test_processes import same, trained, write

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.name != "posix", reason="torchrun needs libuv on Windows"),
]

ROUNDING = 1e-6  # convolutions choose their kernel by where the weights lie
PROMPTS = ["What is number 3?", {"prompt": "And?", "max_new_tokens": 6, "temperature": 0}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def texts(folder: Path) -> dict[str, Any]:
    """Rows of unequal lengths, held-out ones, dropout; embeddings that are the head."""
    base = text_toys.save_model(folder / "base", tie_word_embeddings=True)
    rows = text_toys.write_jsonl(folder / "rows.jsonl")
    return runs.text_values(
        base, rows, folder, batch_size=1, gradient_accumulation_steps=2, epochs=2,
        validation_split=0.1, eval_steps=2, lora_dropout=0.1, save_steps=2,
        sample_prompts=PROMPTS, sample_steps=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def together(folder: Path, texts: dict[str, Any]) -> Path:
    """The output of a run of two processes, each with half of the base."""
    said = trained(write(folder, "together", texts, distributed="fsdp"), 2)
    assert said.count("Done in") == 1
    return folder / "together"


@pytest.fixture(scope="module")
def alone(folder: Path, texts: dict[str, Any]) -> Path:
    """The output of one process with twice the accumulation."""
    pipeline.run(write(folder, "alone", texts, gradient_accumulation_steps=4))
    return folder / "alone"


def stopped_after(step: int, whole: Path, copy: Path) -> Path:
    """A copy of a run as it stood after this step."""
    shutil.copytree(whole, copy)
    for path in copy.iterdir():
        if path.name not in ("checkpoints", "metrics.jsonl", "data.jsonl.gz", "tensorboard"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return copy


def test_two_processes_with_half_the_base_each_train_on_text_as_one_does(
    alone: Path, together: Path
) -> None:
    same(alone, together)
    samples = [row["samples"] for row in runs.metrics(alone) if "loss" in row]
    assert (samples[2] - samples[1]) % 2 == 1, "the epoch ends with one process idle"
    drawn = sorted(path.name for path in (alone / "samples").iterdir())
    assert len(drawn) == 3 * len(PROMPTS)
    for name in drawn:
        assert (together / "samples" / name).read_bytes() == (alone / "samples" / name).read_bytes()


def test_it_goes_on_to_the_same_bits(folder: Path, texts: dict[str, Any], together: Path) -> None:
    stopped_after(2, together, folder / "parts")
    said = trained(write(folder, "parts", texts, distributed="fsdp"), 2)
    assert "step-000002" in said
    found, expected = (
        load_file(run / "adapter_model.safetensors") for run in (folder / "parts", together)
    )
    assert_close(found, expected, rtol=0, atol=0)


def test_one_process_goes_on_from_it(folder: Path, texts: dict[str, Any], together: Path) -> None:
    stopped_after(4, together, folder / "rest")
    pipeline.run(write(folder, "rest", texts, gradient_accumulation_steps=4))
    rows = [row for row in runs.metrics(folder / "rest") if "loss" in row]
    before = [row for row in runs.metrics(together) if "loss" in row]
    assert rows[:4] == before[:4]
    assert rows[4]["samples"] == before[4]["samples"], "steps of as many samples"
    assert rows[-1]["samples"] == before[-1]["samples"]


def test_pictures_with_text_encoders_trained_too(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    values = runs.values(
        sd_folder, pictures, tmp_path, batch_size=1, gradient_accumulation_steps=2, epochs=2,
        train_text_encoder=True, learning_rate=1e-3, output_name="lora", validation_split=0.2,
        clip_skip=2, gradient_checkpointing=True, sample_prompts=["a square"], sample_steps=3,
    )  # fmt: skip
    pipeline.run(write(tmp_path, "alone", values, gradient_accumulation_steps=4))
    trained(write(tmp_path, "together", values, distributed="fsdp"), 2)
    same(tmp_path / "alone", tmp_path / "together")
    steps = [row["samples"] for row in runs.metrics(tmp_path / "alone") if "loss" in row]
    assert steps == [4, 5, 9, 10], "an epoch ends with one process idle"
    assert len(list((tmp_path / "together" / "samples").iterdir())) == 3


def test_a_spread_model_computes_what_it_did_with_half_its_bytes_in_each(
    bases: dict[Family, Path],
) -> None:
    (parent,) = {path.parent for path in bases.values()}
    told = json.loads(forked.together(2, sharded.tell, parent, False).splitlines()[-1])
    assert len(told) == 2 * 10, "each process tells of each model"
    for model in told:
        assert model["apart"] <= (ROUNDING if model["model"] in bases else 0), model
        assert model["share"] == pytest.approx(0.5, rel=0.1), model


def test_it_needs_several_processes(tmp_path: Path, texts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="distributed: found fsdp, but this is one process"):
        pipeline.run(write(tmp_path, "run", texts, distributed="fsdp"))


def test_weights_of_four_bits_cannot_be_spread(tmp_path: Path, texts: dict[str, Any]) -> None:
    config = write(tmp_path, "run", texts, distributed="fsdp", quantization="nf4")
    (problem,) = read(config).problems
    assert "distributed: fsdp cannot spread weights of 4 or 8 bits" in str(problem)


@pytest.mark.parametrize("items", range(8))
def test_all_do_as_many_passes(items: int) -> None:
    size = 3
    shares = [
        Compute(torch.device("cpu"), "no", Processes(rank, size), sharded=True).share(range(items))
        for rank in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(item for share in shares for item, counts in share if counts) == [*range(items)]
    plain = Compute(torch.device("cpu"), "no", Processes(1, size)).share(range(items))
    assert plain == [pair for pair in shares[1] if pair[1]]
