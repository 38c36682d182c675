"""The names of what a run leaves in its output folder."""

from __future__ import annotations

from pathlib import Path

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
INVENTORY = "data.jsonl.gz"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
SYSTEM_PROMPT = "lora_scripts.system_prompt"  # key in the header of ADAPTER_NAME
TEXT_NAMES = (
    ADAPTER_NAME,
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
NAMES = (
    METRICS,
    CHECKPOINTS,
    INVENTORY,
    DIFFUSERS_NAME,
    *TEXT_NAMES,
    "tensorboard",
    "samples",
    "run.log",
    "run.json",
    "config.yaml",
    "README.md",
    "loss.svg",
)
OVERWRITTEN = ("config.yaml", "README.md", "loss.svg", "run.json", *TEXT_NAMES)


def holds_a_run(folder: Path) -> bool:
    """Whether a run has been in `folder`, finished or not."""
    return (folder / METRICS).is_file() or (folder / CHECKPOINTS).is_dir()


def foreign(folder: Path) -> str | None:
    """A file of somebody else's that a run would overwrite: one of its names, but no run."""
    if not folder.is_dir() or holds_a_run(folder):
        return None
    return next((name for name in OVERWRITTEN if (folder / name).exists()), None)


def of_run(folder: Path, output_name: str) -> list[Path]:
    """What a run has left in `folder`, and nothing else that lies there."""
    names = (*NAMES, f"{output_name}.safetensors")
    return [folder / name for name in names if (folder / name).exists()]
