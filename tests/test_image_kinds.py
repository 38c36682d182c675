"""Every kind of LoRA × layers × family: trained, then read from the run's files by two readers.

diffusers' own pipeline reads the folder; our reader of LoRA files reads the WebUI's file. Both must
give the trained model, and the LoRA must have changed it. A third of all, in which every two of
these meet, is tried at every change; the rest are slow.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_scripts.device import Compute
from lora_scripts.models import lora, lora_file
from lora_scripts.models.family import ImageFamily
from lora_scripts.tasks import build
from tests import runs, toys

CPU = Compute(torch.device("cpu"), "no")
LAYERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "all": {"lora_targets": "all"},
    "text encoders": {"train_text_encoder": True, "lora_targets": "linear"},
}
KINDS = ("lora", "rslora", "dora")


def every_three() -> list[Any]:
    """Family, kind, layers: a Latin square of them, and the others marked slow."""
    ways = product(enumerate(toys.FAMILIES), enumerate(KINDS), enumerate(LAYERS))
    return [
        pytest.param(family, kind, layers, marks=[pytest.mark.slow] * bool((i + j + k) % 3))
        for (i, family), (j, kind), (k, layers) in ways
    ]


@pytest.mark.parametrize(("family", "kind", "layers"), every_three())
def test_the_files_of_a_run_give_the_trained_model(
    bases: dict[str, Path], pictures: Path, tmp_path: Path, family: str, kind: str, layers: str
) -> None:
    code, output = runs.run(
        bases[family], pictures, tmp_path,
        lora_type=kind, lora_alpha=6, max_train_steps=2, save_steps=None, **LAYERS[layers],
    )  # fmt: skip
    assert code == 0
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["largest_difference_after_reload"] < 1e-4
    bare = bare_outputs(bases[family])
    ours = with_our_reader(bases[family], output / "toy.safetensors").probe()
    theirs = with_diffusers(bases[family], output, toys.FAMILIES[family][1])
    assert (ours - bare).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@cache
def bare_outputs(base: Path) -> torch.Tensor:
    """What a base gives without a LoRA."""
    return family_of(base).probe()


def family_of(base: Path) -> ImageFamily:
    return build.load_family(build.find_base(str(base)), CPU)


def with_our_reader(base: Path, file: Path) -> ImageFamily:
    family = family_of(base)
    for component, adapters in lora_file.read(file, family).items():
        lora.put(family.adapted[component], "read", adapters)
        lora.set_strengths(family.adapted[component], {"read": 1.0})
    return family


def with_diffusers(base: Path, folder: Path, pipeline_class: Any) -> torch.Tensor:
    """The outputs of a model whose parts come out of a stock pipeline that has read the folder."""
    pipeline = pipeline_class.from_pretrained(str(base))
    pipeline.load_lora_weights(str(folder))
    family: Any = family_of(base)
    for component in family.adapted:
        part = getattr(pipeline, component)
        setattr(family, component, part)
    family.adapted = {component: getattr(pipeline, component) for component in family.adapted}
    found: torch.Tensor = family.probe()
    return found
