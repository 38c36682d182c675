"""LoRA layers on plain modules: the kinds, several at once, put on, taken off, merged."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lora_scripts.models import lora

PATHS = ["block.linear", "block.conv"]
KINDS: list[lora.Kind] = ["lora", "dora", "rslora"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.linear = nn.Linear(5, 6)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(self.conv(pixels_BCHW).movedim(1, -1))
        return found


def toy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Module()
    module.block = Block()
    return module.eval().requires_grad_(False)


def output(module: nn.Module) -> torch.Tensor:
    torch.manual_seed(9)
    with torch.no_grad():
        found: torch.Tensor = module.block(torch.randn(2, 3, 4, 4))
    return found


def trained(kind: lora.Kind, rank: int = 2, alpha: float = 3.0, seed: int = 1) -> nn.Module:
    module = toy()
    lora.attach(module, PATHS, rank=rank, alpha=alpha, dropout=0, seed=seed, kind=kind)
    torch.manual_seed(seed)
    for parameter in lora.trainable(module).values():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_changes_nothing_yet(kind: lora.Kind) -> None:
    module = toy()
    before = output(module)
    lora.attach(module, PATHS, rank=2, alpha=3, dropout=0, seed=1, kind=kind)
    torch.testing.assert_close(output(module), before, rtol=0, atol=1e-6)
    per_layer = 3 if kind == "dora" else 2
    assert len(lora.trainable(module)) == per_layer * len(PATHS)
    assert lora.kind_of(module) == kind


def test_dora_starts_from_the_exact_norms_of_a_bf16_base() -> None:
    module = toy().to(torch.bfloat16)
    lora.attach(module, PATHS, rank=2, alpha=3, dropout=0, seed=1, kind="dora")
    for layer in lora.layers(module):
        weight = module.get_submodule(layer.path).base_layer.weight
        expected = weight.double().flatten(1).norm(dim=1).float()
        torch.testing.assert_close(layer.magnitude, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind: lora.Kind) -> None:
    """Against the papers' formula, written out for the linear layer."""
    module = trained(kind, rank=4, alpha=3)
    layer = next(layer for layer in lora.layers(module) if layer.path == "block.linear")
    base = toy().block.linear
    scale = 3 / math.sqrt(4) if kind == "rslora" else 3 / 4
    assert layer.alpha / layer.rank == pytest.approx(scale)
    weight = base.weight + scale * layer.up @ layer.down
    if layer.magnitude is not None:
        weight = weight * (layer.magnitude / weight.norm(dim=1))[:, None]
    torch.manual_seed(3)
    inputs = torch.randn(7, 5)
    found = module.block.linear(inputs)
    torch.testing.assert_close(found, inputs @ weight.T + base.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_lora_is_put_on_another_model(kind: lora.Kind) -> None:
    module = trained(kind)
    fresh = toy()
    lora.put(fresh, "a", lora.layers(module))
    lora.set_strengths(fresh, {"a": 1.0})
    torch.testing.assert_close(output(fresh), output(module), rtol=0, atol=1e-5)
    lora.set_strengths(fresh, {})
    assert torch.equal(output(fresh), output(toy()))
    assert not lora.trainable(fresh)


def test_ranks_and_alphas_may_differ_by_layer() -> None:
    two, five = lora.layers(trained("lora", rank=2)), lora.layers(trained("lora", rank=5, alpha=1))
    fresh, expected = toy(), toy()
    lora.put(fresh, "a", [two[0], five[1]])
    lora.set_strengths(fresh, {"a": 1.0})
    for layer in (two[0], five[1]):
        weight = expected.get_submodule(layer.path).weight
        update = layer.up.flatten(1) @ layer.down.flatten(1)
        weight.data += (layer.alpha / layer.rank) * update.reshape(weight.shape)
    torch.testing.assert_close(output(fresh), output(expected), rtol=0, atol=1e-5)
    assert [layer.rank for layer in lora.layers(fresh, "a")] == [two[0].rank, five[1].rank]


def test_several_act_together_each_at_its_strength() -> None:
    first, second = lora.layers(trained("lora", seed=1)), lora.layers(trained("lora", seed=2))
    together, expected = toy(), toy()
    lora.put(together, "a", first)
    lora.put(together, "b", second)
    lora.set_strengths(together, {"a": 0.5, "b": -1.5})
    for layers, strength in ((first, 0.5), (second, -1.5)):
        for layer in layers:
            weight = expected.get_submodule(layer.path).weight
            update = layer.up.flatten(1) @ layer.down.flatten(1)
            weight.data += strength * layer.alpha / layer.rank * update.reshape(weight.shape)
    torch.testing.assert_close(output(together), output(expected), rtol=0, atol=1e-5)


def test_one_file_may_hold_dora_and_plain_layers() -> None:
    plain, dora = lora.layers(trained("lora")), lora.layers(trained("dora"))
    mixed = [layer for layer in plain if layer.path == "block.conv"]
    mixed += [layer for layer in dora if layer.path == "block.linear"]
    fresh = toy()
    lora.put(fresh, "a", mixed)
    lora.set_strengths(fresh, {"a": 1.0})
    found = {layer.path: layer.magnitude is not None for layer in lora.layers(fresh, "a")}
    assert found == {"block.conv": False, "block.linear": True}


@pytest.mark.parametrize("kinds", [("lora", "dora"), ("dora", "rslora"), ("dora", "dora")])
def test_kinds_side_by_side_are_merged_as_they_act(kinds: tuple[lora.Kind, lora.Kind]) -> None:
    module = toy()
    for seed, kind in enumerate(kinds):
        lora.put(module, f"{seed}", lora.layers(trained(kind, seed=seed)))
    lora.set_strengths(module, {"0": 0.7, "1": 0.5})
    expected = output(module)
    assert (expected - output(toy())).abs().max() > 0.1
    lora.merge_into(module)
    torch.testing.assert_close(output(module), expected, rtol=0, atol=1e-5)


def test_at_no_strength_not_even_magnitudes_act() -> None:
    module = toy()
    lora.put(module, "a", lora.layers(trained("dora")))
    lora.set_strengths(module, {"a": 0.0})
    assert torch.equal(output(module), output(toy()))


@pytest.mark.parametrize("kind", KINDS)
def test_removed_and_merged_modules_have_no_trace_of_peft(kind: lora.Kind) -> None:
    fresh = toy()
    names = list(fresh.state_dict())
    lora.put(fresh, "a", lora.layers(trained(kind)))
    lora.set_strengths(fresh, {"a": 0.7})
    merged = copy.deepcopy(fresh)
    expected = output(fresh)
    lora.remove(fresh, "a")
    assert list(fresh.state_dict()) == names
    assert torch.equal(output(fresh), output(toy()))
    lora.merge_into(merged)
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(output(merged), expected, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    layer = lora.AdaptedLayer("block.linear", torch.ones(2, 4), torch.ones(6, 2), 2.0)
    with pytest.raises(
        ValueError, match=r"block.linear is \[6, 5\] here, the LoRA is for \[6, 4\]"
    ):
        lora.put(toy(), "a", [layer])
    elsewhere = lora.AdaptedLayer("block.other", torch.ones(2, 4), torch.ones(6, 2), 2.0)
    with pytest.raises(ValueError, match=r"no layer block.other"):
        lora.put(toy(), "a", [elsewhere])


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_a_finished_lora(kind: lora.Kind) -> None:
    """With another alpha the update is still the same; a layer it lacks starts afresh."""
    finished = trained(kind, alpha=3)
    module = toy()
    lora.attach(module, PATHS, rank=2, alpha=8, dropout=0, seed=5, kind=kind)
    assert lora.initialise(module, lora.layers(finished)) == []
    torch.testing.assert_close(output(module), output(finished), rtol=0, atol=1e-5)
    module = toy()
    lora.attach(module, PATHS, rank=2, alpha=8, dropout=0, seed=5, kind=kind)
    part = [layer for layer in lora.layers(finished) if layer.path == "block.conv"]
    assert lora.initialise(module, part) == ["block.linear"]


def test_another_rank_kind_or_layer_cannot_be_gone_on_from() -> None:
    module = toy()
    lora.attach(module, ["block.linear"], rank=2, alpha=2, dropout=0, seed=5)
    with pytest.raises(ValueError, match="has the rank 4, not 2"):
        layers = lora.layers(trained("lora", rank=4))
        lora.initialise(module, [layer for layer in layers if layer.path == "block.linear"])
    with pytest.raises(ValueError, match="DoRA"):
        layers = lora.layers(trained("dora"))
        lora.initialise(module, [layer for layer in layers if layer.path == "block.linear"])
    with pytest.raises(ValueError, match=r"block\.conv"):
        lora.initialise(module, lora.layers(trained("lora")))
