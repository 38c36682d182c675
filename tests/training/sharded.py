"""What each process of `test_fsdp.py` does: models computed whole, then spread over all.

The first one prints as JSON what each has found of each model: how far losses, gradients and
outputs are from those of the whole model, and which share of the bytes it holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_scripts.device import Compute
from lora_scripts.memory.tracker import bytes_of
from lora_scripts.models import causal_lm, head, lora, sharding
from lora_scripts.models.family import Options
from lora_scripts.models.head import Learned
from lora_scripts.processes import Processes, joined
from lora_scripts.tasks import build
from tests import text_toys

STEPS = 2
OFFLOADED = ("llama dora", "gpt2 lora", "sdxl")  # models that are tried in RAM


def frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def held(modules: list[nn.Module], compute: Compute) -> int:
    """Bytes of the frozen weights that lie in this process; all of them are spread."""
    found = [p for module in modules for p in frozen(module).values()]
    assert all(isinstance(p, DTensor) for p in found)
    units: Any = [m for whole in modules for m in whole.modules() if isinstance(m, FSDPModule)]
    groups = [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group)]
    assert {p.offload_to_cpu for group in groups for p in group.fsdp_params} == {compute.offloaded}
    return bytes_of(p.to_local() for p in found)  # type: ignore[attr-defined]


def with_lora(module: nn.Module, targets: Any, kind: Any) -> None:
    lora.attach(module, targets, rank=2, alpha=2, dropout=0, seed=0, kind=kind)
    source = torch.Generator().manual_seed(0)
    for name, parameter in lora.trainable(module).items():
        if "magnitude" not in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=source)


def learned(modules: list[nn.Module], loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Losses and gradients of some steps."""
    found = []
    for _ in range(STEPS):
        total = loss()
        total.backward()  # type: ignore[no-untyped-call]
        found.append(total.detach())
        for module in modules:
            found += [p.grad for p in lora.trainable(module).values() if p.grad is not None]
            module.zero_grad()
    return found


def text(model_type: str, compute: Compute, *, tied: bool, kind: str) -> Any:
    """Outputs of a language model, and the bytes of its weights before and after."""
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # GPT-2's dropout
    model = text_toys.model(model_type, tie_word_embeddings=tied, **without).to(compute.dtype)
    with_lora(model, causal_lm.targets(model, "linear").adapted, kind)
    if tied:
        causal_lm.checkpoint_gradients(model)
    in_parts = head.may_come_in_parts(model)
    whole = bytes_of(frozen(model).values())
    if compute.sharded:
        causal_lm.shard(model, compute)
    assert head.looks_plain(model) >= in_parts
    ids_BT = torch.arange(3, 21).view(2, 9)
    row_N, columns_C = torch.tensor([0, 1, 1]), torch.tensor([2, 6])
    batch = Learned(columns_C, row_N, torch.tensor([0, 0, 1]), torch.tensor([5, 6, 7]))

    def loss() -> torch.Tensor:
        with compute.autocast():
            return head.loss(model.train(), {"input_ids": ids_BT}, batch, in_parts=in_parts)

    found = learned([model], loss)
    tokenizer = text_toys.chatml_tokenizer()
    answer = causal_lm.generate(
        model.eval(), tokenizer, [5, 6, 7], stop_ids=[tokenizer.eos_token_id], max_new_tokens=5,
        temperature=1.0, seed=3,
    )  # fmt: skip
    found += [causal_lm.probe(model), torch.tensor([1.0, *map(ord, answer)])]
    return found, whole, held([model], compute) if compute.sharded else whole


def images(base: Path, compute: Compute, *, clip_skip: int | None, kind: str) -> Any:
    """The same of an image model, its text encoders trained, too."""
    family = build.load_family(build.find_base(str(base)), compute, Options(clip_skip=clip_skip))
    targets, modules = family.targets("all"), list(family.adapted.values())
    for component, module in family.adapted.items():
        with_lora(module, targets[component], kind)
    family.checkpoint_gradients()
    whole = bytes_of(p for module in modules for p in frozen(module).values())
    if compute.sharded:
        for component, module in family.adapted.items():
            sharding.shard(module, family.units(component), compute)
    noisy_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = [family.tokenize("a b c"), family.tokenize("d e")]

    def loss() -> torch.Tensor:
        for module in modules:
            module.train()
        with compute.autocast():
            told = {**family.encode_tokens(tokens), "time_ids": torch.ones(2, 6)}
            output = family.predict(noisy_BCHW, torch.tensor([10, 500]), told)
        return output.float().square().sum()

    found = learned(modules, loss)
    with torch.no_grad():
        found.append(family.probe())
    return found, whole, held(modules, compute) if compute.sharded else whole


def main(folder: Path, processes: Processes, *, offloaded: bool) -> list[Any]:
    all_found = []

    def told(name: str, precision: Any, work: Callable[[Compute], Any]) -> None:
        if offloaded and name not in OFFLOADED:
            return
        alone = Compute(torch.device("cpu"), precision)
        together = Compute(
            torch.device("cpu"), precision, processes, sharded=True, offloaded=offloaded
        )
        (expected, whole, _), (found, _, share) = work(alone), work(together)
        wanted_N, found_N = (
            torch.cat([t.flatten().double() for t in ts]) for ts in (expected, found)
        )
        apart = float((found_N - wanted_N).norm() / wanted_N.norm())
        all_found.append({"model": name, "apart": apart, "share": share / whole})

    for tied, kind, precision in ((False, "lora", "no"), (True, "dora", "bf16")):
        for name in ("llama", "gemma2", "qwen3_moe"):
            told(f"{name} {kind}", precision, partial(text, name, tied=tied, kind=kind))
    told("gpt2 lora", "no", partial(text, "gpt2", tied=True, kind="lora"))
    for name, clip_skip, kind in (
        ("sd1", 2, "lora"),
        ("sd2", None, "dora"),
        ("sdxl", None, "lora"),
    ):
        told(name, "no", partial(images, folder / name, clip_skip=clip_skip, kind=kind))
    return all_found


def tell(folder: Path, offloaded: bool) -> None:
    """The work of a process. `folder`: holds a base model of each family."""
    with joined() as here:
        every = here.gathered(main(folder, here, offloaded=offloaded))
        if here.is_first:
            print(json.dumps([one for found in every for one in found]))
