"""PEFT directories: which layers they name, and that they read back as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lora_scripts.errors import UserError, WorkError
from lora_scripts.models import causal_lm, lora
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
    other = [*written[:2], AdaptedLayer("x", written[2].down, written[2].up, 1.5)]
    assert not lora.same(written, other)
    assert not lora.same(written, [*written[:2], lora.read_peft(tmp_path, 0.5)[2]])


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    layer = AdaptedLayer("model.layers.0.mlp.up_proj", torch.ones(2, 7), torch.ones(48, 2), 2.0)
    lora.write_peft(tmp_path, [layer], "a/base")
    with pytest.raises(UserError, match=r"up_proj is 32 → 48 in the model, 7 → 48 here"):
        lora.with_adapters(text_toys.model("llama"), [(tmp_path, 1.0)])


# --- on a language model --------------------------------------------------------------------------


def random_adapter(
    folder: Path, targets: list[str] | str, rank: int, alpha: float, seed: int
) -> list[AdaptedLayer]:
    """A PEFT directory as a run writes it: its file by `peft_tensors`, its config by the module."""
    model = text_toys.model("llama")
    paths = causal_lm.targets(model, targets).adapted
    lora.attach(model, paths, rank=rank, alpha=alpha, dropout=0, seed=seed)
    torch.manual_seed(seed)
    for parameter in lora.trainable(model).values():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    folder.mkdir()
    layers = lora.layers(model)
    save_file(lora.peft_tensors(layers, torch.float32), folder / "adapter_model.safetensors")
    lora.write_peft_config(folder, model, "a/base")
    return layers


def added_by_hand(model: nn.Module, layers: list[AdaptedLayer], scale: float) -> None:
    modules = dict(model.named_modules())
    for layer in layers:
        update = layer.alpha / layer.down.shape[0] * layer.up @ layer.down
        modules[layer.path].weight.data += scale * update


def test_two_adapters_add_the_sum_of_their_updates(tmp_path: Path) -> None:
    first = random_adapter(tmp_path / "a", "linear", 4, 8, 1)
    second = random_adapter(tmp_path / "b", ["q_proj", "down_proj"], 2, 3, 2)
    assert lora.same(lora.read_peft(tmp_path / "a"), first)
    folders = [(tmp_path / "a", 0.7), (tmp_path / "b", -0.4)]
    adapted = lora.with_adapters(text_toys.model("llama"), folders)
    expected = text_toys.model("llama")
    added_by_hand(expected, first, 0.7)
    added_by_hand(expected, second, -0.4)
    logits = causal_lm.probe(expected)
    torch.testing.assert_close(causal_lm.probe(adapted), logits, atol=1e-4, rtol=0)
    assert (logits - causal_lm.probe(text_toys.model("llama"))).abs().max() > 0.1
    lora.set_strengths(adapted, {"adapter_0": 0.0, "adapter_1": 0.0})
    bare = causal_lm.probe(text_toys.model("llama"))
    torch.testing.assert_close(causal_lm.probe(adapted), bare)
    lora.set_strengths(adapted, {"adapter_0": 0.7, "adapter_1": -0.4})
    merged = lora.merge(adapted)
    assert type(merged) is type(expected)
    torch.testing.assert_close(causal_lm.probe(merged), logits, atol=1e-4, rtol=0)


def test_layers_of_one_block_alone_are_named_in_full(tmp_path: Path) -> None:
    """`q_proj` would mean the other block's, too; PEFT's own reader puts it in its place."""
    layers = random_adapter(tmp_path / "a", ["layers.1.self_attn.q_proj"], 2, 4, 1)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    adapted = PeftModel.from_pretrained(text_toys.model("llama"), str(tmp_path / "a"))
    expected = text_toys.model("llama")
    added_by_hand(expected, layers, 1.0)
    torch.testing.assert_close(
        causal_lm.probe(adapted), causal_lm.probe(expected), atol=1e-4, rtol=0
    )


def test_an_adapter_whose_file_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    random_adapter(tmp_path / "a", ["q_proj"], 2, 4, 1)
    file = tmp_path / "a/adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if ".layers.1." not in name}
    save_file(kept, file)
    with pytest.raises(UserError, match=r"no matrices for model\.layers\.1\.self_attn\.q_proj"):
        lora.with_adapters(text_toys.model("llama"), [(tmp_path / "a", 1.0)])


@pytest.mark.parametrize(
    ("key", "value"), [("layer_replication", [[0, 1]]), ("modules_to_save", ["lm_head"])]
)
def test_what_is_no_lora_is_refused(tmp_path: Path, key: str, value: object) -> None:
    random_adapter(tmp_path / "a", ["q_proj"], 2, 4, 1)
    path = tmp_path / "a/adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=f"uses {key}, which is not LoRA, rsLoRA or DoRA"):
        lora.read_peft(tmp_path / "a")


def test_a_merged_weight_that_is_not_finite_fails(tmp_path: Path) -> None:
    layers = random_adapter(tmp_path / "a", ["q_proj"], 2, 4, 1)
    first = AdaptedLayer(layers[0].path, layers[0].down * torch.inf, layers[0].up, 4)
    lora.write_peft(tmp_path / "b", [first, *layers[1:]], "a/base")
    adapted = lora.with_adapters(text_toys.model("llama"), [(tmp_path / "b", 1.0)])
    with pytest.raises(WorkError, match="NaN"):
        lora.merge(adapted)


def test_another_base_is_written_in_and_all_else_stays(tmp_path: Path) -> None:
    random_adapter(tmp_path / "a", "linear", 4, 8, 1)
    path = tmp_path / "a/adapter_config.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    lora.name_base(tmp_path / "a", "其他/base")
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after.pop("base_model_name_or_path") == "其他/base"
    assert before.pop("base_model_name_or_path") == "a/base"
    before["target_modules"].sort()
    after["target_modules"].sort()
    assert before == after


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_other_kinds_are_written_as_peft_names_them(tmp_path: Path, kind: lora.Kind) -> None:
    """Written, then read by PEFT: the logits of the model that was trained."""
    model = text_toys.model("llama")
    paths = causal_lm.targets(model, ["q_proj", "down_proj"]).adapted
    lora.attach(model, paths, rank=4, alpha=6, dropout=0, seed=1, kind=kind)
    torch.manual_seed(2)
    for parameter in lora.trainable(model).values():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    layers = lora.layers(model)
    save_file(lora.peft_tensors(layers, torch.float32), tmp_path / "adapter_model.safetensors")
    config = json.loads(lora.write_peft_config(tmp_path, model, "a/base").read_text("utf-8"))
    assert (config["lora_alpha"], config[f"use_{kind}"]) == (6, True)
    adapted = lora.with_adapters(text_toys.model("llama"), [(tmp_path, 1.0)])
    bare = causal_lm.probe(text_toys.model("llama"))
    assert (causal_lm.probe(adapted) - bare).abs().max() > 0.1
    torch.testing.assert_close(causal_lm.probe(adapted), causal_lm.probe(model), rtol=0, atol=1e-5)
    assert lora.same(lora.read_peft(tmp_path), layers)
