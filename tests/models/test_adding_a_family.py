"""docs/adding_a_family.md holds: a family in one file, and one `case` where families are chosen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_scripts import disk, memory_check
from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.memory import Estimate
from lora_scripts.models import signature
from lora_scripts.models.family import ImageFamily, Options
from lora_scripts.models.signature import Signature
from lora_scripts.tasks import build
from tests import runs
from tests.models import toy_family

CPU = Compute(torch.device("cpu"), "no")
GUIDE = Path("docs/adding_a_family.md")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy's folder, in a program that knows the family: the two `case`s of the guide."""
    torch.manual_seed(0)
    toy_family.ToyFamily(toy_family.Denoiser(), CPU).save(tmp_path / "base")
    load_others, recognise_others = build.load_family, signature.read_signature

    def recognise(path: Path) -> Signature:
        if (path / toy_family.WEIGHTS).is_file():
            toy: Any = "toy"
            return Signature(path, toy, "diffusers", 0)
        return recognise_others(path)

    def load(
        found: Signature, compute: Compute, options: Options | None = None, *, resting: bool = False
    ) -> ImageFamily:
        match str(found.family):
            case "toy":
                return toy_family.load(found, compute, options or Options())
            case _:
                return load_others(found, compute, options, resting=resting)

    monkeypatch.setattr(signature, "read_signature", recognise)
    monkeypatch.setattr(build, "read_signature", recognise)
    monkeypatch.setattr(build, "load_family", load)
    # memory and disk are foretold from the family's modules: a `case` each, docs/adding_a_family.md
    monkeypatch.setattr(disk, "check", lambda config, rows: None)
    monkeypatch.setattr(memory_check, "before", lambda *run: Estimate([], "", {}))
    monkeypatch.setattr(memory_check, "after", lambda *run: None)
    return tmp_path / "base"


def test_a_new_family_is_trained_exported_and_read_back(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    code, output = runs.run(
        base, pictures, tmp_path, epochs=30, save_steps=None, resolution=64,
        sample_steps=90, sample_prompts=["a square"], random_flip=True, validation_split=0.34,
    )  # fmt: skip
    assert code == 0
    losses = [row["eval_loss"] for row in runs.metrics(output) if "eval_loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    tensors = load_file(output / "toy.safetensors")
    assert {name.split(".")[0] for name in tensors} == {
        "lora_denoiser_body_read", "lora_denoiser_body_think", "lora_denoiser_body_write",
    }  # fmt: skip
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["largest_difference_after_reload"] < 1e-5
    bare, family = (build.load_family(build.find_base(str(base)), CPU) for _ in range(2))
    family.load_file(output)
    assert (family.probe() - bare.probe()).abs().max() > 1e-2
    drawn = next((output / "samples").rglob("*.png"))
    assert Image.open(drawn).size == (64, 64)


def test_all_the_ways_of_feeding_it_work(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Pixels and tokens in each step, in place of cached latents and prompts."""
    code, output = runs.run(
        base, pictures, tmp_path, max_train_steps=4, save_steps=None, lora_targets=["body.think"],
        random_crop=True, shuffle_tags=True, noise_offset=0.05, min_snr_gamma=5,
    )  # fmt: skip
    assert code == 0
    names = {name.split(".")[0] for name in load_file(output / "toy.safetensors")}
    assert names == {"lora_denoiser_body_think"}


def test_what_it_cannot_do_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CLIP and no VAE"):
        runs.run(base, pictures, tmp_path, clip_skip=2)


def test_the_guide_names_every_method_and_only_files_that_are_there() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    offered = {name for name in vars(ImageFamily) if not name.startswith("_")}
    missing = [name for name in sorted(offered) if f"`{name}" not in guide]
    assert not missing
    for path in re.findall(r"`((?:lora_scripts|tests|docs|configs)/[\w/.]+)`", guide):
        assert Path(path).exists(), path
