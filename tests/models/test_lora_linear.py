"""The linear layer with its LoRA in one operation, against PEFT's layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lora_scripts.models import lora
from lora_scripts.models.lora.linear import OneStepLinear

Changed = Callable[[nn.Module], object]
NAMES = ["query", "key", "value"]
WIDTH = 16
Numbers = dict[str, torch.Tensor]


class Attention(nn.Module):
    """Three layers with the same input, and what stands before them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, 24)

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        x_BTI = self.norm(x_BTI)
        query_BTI, key_BTI = self.query(x_BTI).tanh(), self.key(x_BTI)
        found: torch.Tensor = (query_BTI * key_BTI).sum(-1, keepdim=True) * self.value(x_BTI)
        return found


def trained(kind: lora.Kind = "lora", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    module = Attention()
    lora.attach(module, NAMES, rank=4, alpha=6, dropout=dropout, seed=1, kind=kind)
    for parameter in lora.trainable(module).values():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return module.train()


def pefts(module: nn.Module) -> nn.Module:
    """The same, computed by PEFT's own layers."""
    twin = copy.deepcopy(module)
    for layer in twin.modules():
        if isinstance(layer, OneStepLinear):
            layer.__class__ = OneStepLinear.__base__
    return twin


def learned(module: nn.Module, around: AbstractContextManager[Any] | None = None) -> Numbers:
    """Output and gradients for an input that learns, too."""
    torch.manual_seed(3)
    x_BTI = torch.randn(2, 5, WIDTH, requires_grad=True)
    with around or nullcontext():
        output = module(x_BTI)
    output.float().square().mean().backward()
    gradients = {name: p.grad for name, p in lora.trainable(module).items()}
    return {"output": output.detach().float(), "input": x_BTI.grad, **gradients}  # type: ignore[dict-item]


def distance(found: Numbers, exact: Numbers) -> float:
    """The largest difference, each as a share of its tensor's largest number."""
    assert found.keys() == exact.keys() and len(exact) == 8
    return max(
        float((found[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact
    )


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_it_is_pefts_layer_in_float32(kind: lora.Kind) -> None:
    module = trained(kind)
    assert sum(isinstance(layer, OneStepLinear) for layer in module.modules()) == 3
    assert distance(learned(module), learned(pefts(module))) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_no_further_from_the_exact_result(dtype: torch.dtype) -> None:
    module = trained()
    exact = learned(pefts(module))
    ours = learned(copy.deepcopy(module), torch.autocast("cpu", dtype))
    theirs = learned(pefts(module), torch.autocast("cpu", dtype))
    assert distance(ours, exact) < 1.2 * distance(theirs, exact)
    assert all(p.grad.dtype == torch.float32 for p in lora.trainable(module).values() if p.grad)


def kept_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """What the layers' own graph keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf_BTI = torch.randn(2, 50, WIDTH, requires_grad=True)
    x_BTI = 1.0 * leaf_BTI  # autocast itself keeps casts of leaves
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.autocast("cpu", dtype), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs = [module.get_submodule(name)(x_BTI) for name in NAMES]
    assert all(output.requires_grad for output in outputs)
    return sum(size for place, size in storages.items() if place not in weights)


def test_layers_of_one_input_keep_it_once() -> None:
    module = trained()
    one_input = 2 * 50 * WIDTH * 2  # bytes in bfloat16
    hidden = 3 * 2 * 50 * 4 * 2
    assert kept_bytes(module, torch.bfloat16) == one_input + hidden
    assert kept_bytes(pefts(module), torch.bfloat16) > 3 * one_input + hidden


def test_an_input_that_was_changed_in_place_is_cast_anew() -> None:
    module = trained()
    x_BTI = torch.randn(2, 5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        first = module.get_submodule("query")(x_BTI)
        x_BTI.mul_(2)
        second = module.get_submodule("query")(x_BTI)
        expected = pefts(module).get_submodule("query")(x_BTI)
    torch.testing.assert_close(second, expected, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(first, second, rtol=2e-2, atol=2e-2)


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    class Again(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = checkpoint(self.inner, x_BTI, use_reentrant=False)
            return found

    module = trained()
    plain = learned(copy.deepcopy(module))
    again = learned(Again(module))
    for (name, expected), found in zip(plain.items(), again.values(), strict=True):
        assert torch.equal(found, expected), name


def given() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))


def second_adapter(module: nn.Module) -> None:
    lora.put(module, "other", lora.layers(module))
    lora.set_strengths(module, {lora.ADAPTER: 1.0, "other": 0.5})
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name and ".other." not in name)


@pytest.mark.parametrize(
    "made",
    [lambda: trained("dora"), lambda: trained(dropout=0.5)],
    ids=["DoRA", "dropout"],
)
def test_all_else_is_pefts_way(made: Callable[[], nn.Module]) -> None:
    module = made()
    twin = pefts(module)
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for way, kept in ((module, found), (twin, expected)):
        x_BTI = given()
        torch.manual_seed(5)
        kept.append(way(x_BTI).detach())
    assert torch.equal(found[0], expected[0])


def test_two_adapters_act_together() -> None:
    module = trained()
    second_adapter(module)
    x_BTI = given()
    twin = pefts(module)
    assert torch.equal(module(x_BTI).detach(), twin(x_BTI).detach())
    lora.set_strengths(module, {lora.ADAPTER: 1.0})
    assert not torch.equal(module(x_BTI).detach(), twin(x_BTI).detach())


def test_a_merged_or_frozen_one_is_pefts_way() -> None:
    module = trained()
    twin = pefts(module)
    x_BTI = given()
    with torch.no_grad():
        assert torch.equal(module(x_BTI), twin(x_BTI))
    lora.merge_into(module)
    lora.merge_into(twin)
    assert not any(isinstance(layer, OneStepLinear) for layer in module.modules())
    assert torch.equal(module(x_BTI).detach(), twin(x_BTI).detach())
