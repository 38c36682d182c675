"""What a run on a card of 12 GiB or less will hold there, foretold from shapes: no card is needed.

    python -m benchmarks.budgets

The models have their published shapes in files that take no room (sparse: all zeros), as the
estimate reads their headers alone. Every phase counts: encoding, captions, training step, samples,
export.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu
from lora_scripts import memory, preflight
from lora_scripts.config import read
from lora_scripts.device import Compute
from lora_scripts.logs import quiet_libraries
from lora_scripts.memory import Estimate
from lora_scripts.models.kinds import Family
from lora_scripts.models.packaged import END, ZERO, clip_tokenizer, packaged_config

GIB = 2**30
CARD = Compute(torch.device("cuda"), "bf16")
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Budget:
    """A run, and the bytes on the card that it may take."""

    base: str
    keys: Mapping[str, Any]
    limit: int


PROMPT = {"sample_prompts": [{"prompt": "a lighthouse"}]}
TEXT = {
    "task_type": "text-generation", "max_seq_length": gpu.TOKENS, "batch_size": 1,
    "validation_split": 0,
}  # fmt: skip
BUDGETS = {
    "SD1.5, 512², batch 4": Budget("sd1", {"resolution": 512, "batch_size": 4, **PROMPT}, 10 * GIB),
    "SDXL, 1024², batch 1, checkpointing": Budget(
        "sdxl",
        {"resolution": 1024, "batch_size": 1, "gradient_checkpointing": True, **PROMPT},
        10 * GIB,
    ),
    "Llama 8B, NF4, 2,048 tokens, checkpointing": Budget(
        "llama-8b",
        {**TEXT, "quantization": "nf4", "gradient_checkpointing": True, **PROMPT},
        12 * GIB,
    ),
    "SDXL, 1024², batch 1, checkpointing, offload": Budget(
        "sdxl",
        {
            "resolution": 1024,
            "batch_size": 1,
            "gradient_checkpointing": True,
            "offload": True,
            **PROMPT,
        },
        6 * GIB,
    ),
    "Llama 8B, bf16, 2,048 tokens, checkpointing, offload": Budget(
        "llama-8b",
        {**TEXT, "gradient_checkpointing": True, "offload": True, **PROMPT},
        8 * GIB,
    ),
}
HEAD = """\
| run | foretold on the card | in | of it | limit |
|---|---|---|---|---|"""


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        print(HEAD)
        for budget in BUDGETS:
            print(line(Path(name), budget), flush=True)


def line(folder: Path, name: str) -> str:
    """A row of the table."""
    most = max(foretold(folder, name).phases, key=lambda phase: sum(phase.gpu.values()))
    largest = sorted(most.gpu.items(), key=lambda part: part[1], reverse=True)[:3]
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in largest)
    return (
        f"| {name} | {sum(most.gpu.values()) / GIB:.2f} GiB | {most.name} | {parts} "
        f"| {BUDGETS[name].limit / GIB:.0f} GiB |"
    )


def foretold(folder: Path, name: str) -> Estimate:
    """The estimate of a run, on a card that need not be there."""
    budget = BUDGETS[name]
    base = folder / budget.base
    if not base.is_dir():
        make = hollow_language_model if budget.base in gpu.LLAMA else hollow_images
        make(base)
    keys = {
        **budget.keys, "base_model": str(base), "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"), "lora_rank": gpu.RANK, "epochs": 1,
        "train_data_dir": str(gpu.make_data(folder, budget.keys)),
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in keys.items()), encoding="utf-8")
    draft = read(path)
    rows, _ = preflight.inputs(draft)
    config = draft.checked()
    compute = replace(CARD, sharded=config.offload, offloaded=config.offload)
    return memory.foretell(config, rows, compute)


# --- models without bytes -------------------------------------------------------------------------


def hollow_images(folder: Path) -> None:
    """A diffusers folder of a family's shapes; its name is the family's."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    family: Family = folder.name  # type: ignore[assignment]
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    encoders: dict[str, Any] = {"text_encoder": CLIPTextModel}
    if family == "sdxl":
        encoders["text_encoder_2"] = CLIPTextModelWithProjection
    index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' * (family == 'sdxl')}Pipeline"}
    for name, kind in {**kinds, **encoders}.items():
        config = packaged_config(family, name)
        with torch.device("meta"):
            module = (
                kind(CLIPTextConfig(**config)) if name in encoders else kind.from_config(config)
            )
        part = folder / name
        module.half()
        if name in kinds:
            module.save_config(part)
        else:
            module.config.save_pretrained(part)
        stem = "model" if name in encoders else "diffusion_pytorch_model"
        write_hollow(part / f"{stem}.safetensors", module)
        index[name] = ["diffusers" if name in kinds else "transformers", kind.__name__]
    for number, name in enumerate(encoders):
        tokenizer = name.replace("text_encoder", "tokenizer")
        clip_tokenizer(ZERO if number else END).save_pretrained(folder / tokenizer)
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    schedule = packaged_config(family, "scheduler")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule), "utf-8")
    index["scheduler"] = ["diffusers", schedule.get("_class_name", "DDIMScheduler")]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def hollow_language_model(folder: Path) -> None:
    """A transformers folder of a Llama's shapes, with the tests' tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests import text_toys

    tokenizer = text_toys.chatml_tokenizer()
    config = AutoConfig.for_model("llama", **gpu.LLAMA[folder.name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_hollow(folder / "model.safetensors", model)


def write_hollow(path: Path, module: torch.nn.Module) -> None:
    """A .safetensors file of a module on `meta`: its header, and zeros that take no room."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in module.state_dict().items():
        kind = NAMES.get(tensor.dtype, "F32" if tensor.is_floating_point() else "I64")
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    said = json.dumps(header).encode("utf-8")
    said += b" " * (-len(said) % 8)
    with path.open("wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        file.truncate(8 + len(said) + place)


if __name__ == "__main__":
    main()
