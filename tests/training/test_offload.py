"""The frozen base in RAM beside a card; here the card is a CPU, on which the same code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from lora_scripts import pipeline, preflight
from lora_scripts.config import read
from lora_scripts.errors import UserError
from lora_scripts.models import sharding
from lora_scripts.models.kinds import Family
from lora_scripts.processes import Processes
from tests import forked, runs, text_toys, toys
from tests.training import sharded
from tests.training.test_fsdp import ROUNDING
from tests.training.test_processes import write

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("offload")
    base = text_toys.save_model(folder / "base", tie_word_embeddings=True)
    rows = text_toys.write_jsonl(folder / "rows.jsonl")
    return runs.text_values(
        base, rows, folder, batch_size=2, epochs=2, validation_split=0.1, eval_steps=2,
        gradient_checkpointing=True, sample_prompts=["What is number 3?"], sample_steps=3,
    )  # fmt: skip


def run_without_a_card(config: str) -> None:
    """The work of a process: a run as if its CPU were a card."""
    preflight.needs_card = lambda: None
    pipeline.run(Path(config))


def both(folder: Path, values: dict[str, Any]) -> list[Path]:
    """The outputs of a run with all on the device, and of one with the base beside it."""
    pipeline.run(write(folder, "there", values))
    config = write(folder, "beside", values, offload=True)
    forked.together(1, run_without_a_card, str(config))
    return [folder / "there", folder / "beside"]


def test_models_in_ram_compute_what_they_did(bases: dict[Family, Path]) -> None:
    (parent,) = {path.parent for path in bases.values()}
    told = json.loads(forked.together(1, sharded.tell, parent, True).splitlines()[-1])
    assert [model["model"] for model in told] == list(sharded.OFFLOADED)
    for model in told:
        assert model["apart"] <= (ROUNDING if model["model"] in bases else 0), model
        assert model["share"] == pytest.approx(1.0, rel=0.1), model


def test_a_model_whose_weights_wait_names_the_card_as_its_device() -> None:
    """diffusers and transformers make tensors there; the weights lie on the CPU."""
    card = torch.device("cuda")
    unet, encoder = toys.stable_diffusion_parts()["unet"], text_toys.model("llama")
    known = [str(type(module)) for module in (unet, encoder)]
    for module in (unet, encoder):
        sharding._tell_device(module, card)
        assert module.device == card
        assert next(module.parameters()).device.type == "cpu"
    assert [str(type(module)) for module in (unet, encoder)] == known
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    assert pipeline._execution_device == card


def test_a_run_on_text_is_the_same(tmp_path: Path, texts: dict[str, Any]) -> None:
    there, beside = both(tmp_path, texts)
    found, expected = (load_file(run / "adapter_model.safetensors") for run in (beside, there))
    assert_close(found, expected, rtol=0, atol=0)
    for path in (there / "samples").iterdir():
        assert (beside / "samples" / path.name).read_bytes() == path.read_bytes()


def test_a_run_on_pictures_is_the_same(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    values = runs.values(
        sd_folder, pictures, tmp_path, batch_size=2, epochs=2, train_text_encoder=True,
        learning_rate=1e-3, output_name="lora", sample_prompts=["a square"], sample_steps=3,
    )  # fmt: skip
    there, beside = both(tmp_path, values)
    found, expected = (load_file(run / "lora.safetensors") for run in (beside, there))
    assert_close(found, expected, rtol=0, atol=1e-5)  # AdamW makes much of little
    assert len(list((beside / "samples").iterdir())) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_where_it_does_nothing_it_is_refused(tmp_path: Path, texts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="offload: found true, but no card is used"):
        pipeline.run(write(tmp_path, "auto", texts, offload=True, device="auto"))
    for changes, said in (
        ({"device": "cpu"}, "offload: found true beside device: cpu"),
        ({"quantization": "nf4"}, "offload: weights of 4 or 8 bits stay on the card"),
    ):
        config = write(tmp_path, "run", {**texts, "device": "auto"}, offload=True, **changes)
        assert [said in str(problem) for problem in read(config).problems] == [True]


def test_several_processes_that_hold_all_of_it_are_refused(
    tmp_path: Path, texts: dict[str, Any]
) -> None:
    values = {**texts, "device": "auto", "offload": True}
    several = Processes(0, 2)
    (problem,) = preflight.of_processes(read(write(tmp_path, "a", values)), several, dry=False)
    assert "offload: found true for several processes: set distributed: fsdp" in str(problem)
    spread = read(write(tmp_path, "b", values, distributed="fsdp"))
    assert preflight.of_processes(spread, several, dry=False) == []
