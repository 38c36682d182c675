"""PEFT directories: which layers they name, and that they read back as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_scripts.errors import UserError
from lora_scripts.models import lora
from lora_scripts.models.lora import AdaptedLayer
from tests import text_toys


class _Two(nn.Module):
    """A decoder and a tower whose layers have the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "up_proj": nn.Linear(4, 8)})
        self.tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("adapted", "named"),
    [
        (["decoder.up_proj"], ["up_proj"]),
        (["decoder.q_proj"], ["decoder.q_proj"]),  # q_proj would mean the tower's as well
        (["decoder.q_proj", "tower.q_proj"], ["q_proj"]),
    ],
)
def test_short_names_where_they_mean_the_same(
    tmp_path: Path, adapted: list[str], named: list[str]
) -> None:
    module = _Two()
    lora.attach(module, adapted, rank=2, alpha=4, dropout=0, seed=0)
    path = lora.write_peft_config(tmp_path, module, "a/base")
    config = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(config["target_modules"]) == named
    assert (config["r"], config["lora_alpha"]) == (2, 4)


def test_adapters_read_back_with_their_own_ranks_and_alphas(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    written = [
        AdaptedLayer(
            f"model.layers.{number}.q_proj",
            torch.randn(rank, 4, generator=generator),
            torch.randn(6, rank, generator=generator),
            alpha,
        )
        for number, (rank, alpha) in enumerate([(2, 4.0), (2, 4.0), (3, 1.5)])
    ]
    lora.write_peft(tmp_path, written, "a/base")
    assert lora.same(lora.read_peft(tmp_path), written)
    halved = lora.read_peft(tmp_path, 0.5)
    assert [layer.alpha for layer in halved] == [2.0, 2.0, 0.75]


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    layer = AdaptedLayer("model.layers.0.mlp.up_proj", torch.ones(2, 7), torch.ones(48, 2), 2.0)
    lora.write_peft(tmp_path, [layer], "a/base")
    with pytest.raises(UserError, match=r"up_proj is 32 → 48 in the model, 7 → 48 here"):
        lora.with_adapters(text_toys.model("llama"), [(tmp_path, 1.0)])
