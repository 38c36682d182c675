"""How much memory a run takes: foretold from shapes, after one micro-step, and measured.

    python -m benchmarks.memory_estimate [--only NAME …] [--alone] [--folder DIR] [--real]

Each configuration is trained in a process of its own (load, encode, two steps, checkpoint, export,
reload) on a model of the real class with random weights; measured is the largest resident set that
the system has seen of it. The estimates come from other processes that train nothing. Rows marked †
were looked at while the constants were chosen, the others were not. `--real` adds the whole shapes
of SD1.5 at 512 pixels. `--alone` maps tensors alone, as a run does where memory is short.
`--folder` keeps the models for the next time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.children import child_of
from lora_scripts import allocator, memory
from lora_scripts.device import Compute
from lora_scripts.memory import Estimate, Peak, Phase
from lora_scripts.schema import Config

MB = 1e6
ALONE = "alone:"  # before a piece of work: with tensors mapped alone


@dataclass(frozen=True)
class Case:
    """A configuration: its base, its keys. `fitted`: the constants were chosen by it, too."""

    base: str
    keys: Mapping[str, Any]
    fitted: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=None)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--alone", action="store_true", help="tensors mapped alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        chosen = arguments.only or [n for n in CASES if arguments.real or CASES[n].base != "SD1.5"]
        print(HEAD)
        for case in chosen:
            print(line(folder, case, alone=arguments.alone), flush=True)


HEAD = """\
| configuration | imports | measured | foretold | error | beyond imports | micro-step | error |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Figures:
    """Bytes of a configuration's resident set: of the imports alone, at the peak, as foretold."""

    imports: int
    measured: int
    foretold: int
    corrected: int


def line(folder: Path, name: str, *, alone: bool) -> str:
    """A row of the table."""
    found = figures(folder, name, alone=alone)
    imports, measured = found.imports, found.measured
    beyond = (found.foretold - imports) / (measured - imports) - 1
    return (
        f"| {name}{' †' * CASES[name].fitted} | {imports / MB:.0f} MB | {measured / MB:.0f} MB "
        f"| {found.foretold / MB:.0f} MB | {found.foretold / measured - 1:+.1%} | {beyond:+.1%} "
        f"| {found.corrected / MB:.0f} MB | {found.corrected / measured - 1:+.1%} |"
    )


def figures(folder: Path, name: str, *, alone: bool = False) -> Figures:
    """Foretell, take a micro-step, train: each in a process of its own."""
    config = write_config(folder, CASES[name], base_of(folder, CASES[name].base))
    way = ALONE if alone else ""
    estimate = estimate_of(json.loads(call(f"{way}foretell", str(config))))
    peak = Peak(**json.loads(call(f"{way}step", str(config))))
    shutil.rmtree(folder / "output", ignore_errors=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    found = json.loads(call(f"{way}train", str(config)))
    corrected = memory.corrected(estimate, peak).peak_ram
    return Figures(found["imports"], found["peak"], estimate.peak_ram, corrected)


def base_of(folder: Path, name: str) -> Path:
    """The model of a name in `BASES`, made if need be."""
    base = folder / "bases" / name.replace(" ", "_").lower()
    if not base.is_dir():
        half = base.with_suffix(".half")
        call("base", name, str(half))
        half.rename(base)
    return base


def estimate_of(told: Mapping[str, Any]) -> Estimate:
    """An estimate as it was printed."""
    phases = [Phase(**phase) for phase in told["phases"]]
    return Estimate(phases, told["batch"], told["later"])


def call(*arguments: str) -> str:
    """Run `child` in a process of its own; the last line of what it says."""
    return child_of("memory_estimate", *arguments)


def write_config(folder: Path, case: Case, base: Path) -> Path:
    """The config of a case, its data made if need be."""
    keys = {**COMMON, **case.keys, "base_model": str(base)}
    keys |= {"output_dir": str(folder / "output" / "run"), "cache_dir": str(folder / "cache")}
    if keys.get("task_type") == "text-generation":
        keys["train_data_dir"] = str(save_texts(folder / f"texts-{keys.pop('words')}", case))
    else:
        side = keys.get("resolution", 512)
        keys["train_data_dir"] = str(save_pictures(folder / f"pictures-{side}", side))
    path = folder / "run.yaml"
    path.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in keys.items()), encoding="utf-8")
    return path


def save_pictures(folder: Path, side: int) -> Path:
    """Eight squares of noise."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = ["file_name,text"]
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        rows.append(f"{number}.png,noise {number}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def save_texts(folder: Path, case: Case) -> Path:
    """Conversations whose answers are of unequal lengths, around `words` words."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = []
    for number in range(16):
        count = int(case.keys["words"] * random.uniform(0.5, 1.0))
        answer = " ".join(str(n) for n in random.integers(0, 1000, count))
        turns = [{"role": "user", "content": f"Number {number}?"}]
        rows.append({"messages": [*turns, {"role": "assistant", "content": answer}]})
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "data.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


# --- in a process of its own ----------------------------------------------------------------------


def child(what: str, *arguments: str) -> None:
    """One piece of work; the last line of the output is its result."""
    work: dict[str, Callable[..., None]] = {
        "base": make_base, "foretell": foretell, "step": step, "train": train,
    }  # fmt: skip
    if what.startswith(ALONE):
        assert allocator.map_alone()
    work[what.removeprefix(ALONE)](*arguments)


def make_base(name: str, folder: str) -> None:
    """Save the model of this name."""
    BASES[name](Path(folder))


def foretell(config_path: str) -> None:
    """Print what is foretold."""
    print(json.dumps(asdict(memory.foretell(*prepared(config_path)))))


def step(config_path: str) -> None:
    """Print what a micro-step takes."""
    from lora_scripts.tasks import build

    config, rows, compute = prepared(config_path)
    task = build.build(config, rows, compute)
    task.encode(lambda what, done, total: None)
    task.attach()
    print(json.dumps(asdict(memory.micro_step(task, config, compute))))


def prepared(config_path: str) -> tuple[Config, list[Any], Compute]:
    """The config, its data and the device."""
    from lora_scripts import config as config_file
    from lora_scripts import device, preflight
    from lora_scripts.logs import quiet_libraries

    quiet_libraries()
    draft = config_file.read(Path(config_path))
    rows, _ = preflight.inputs(draft)
    config = draft.checked()
    return config, rows, device.choose(config.device, config.mixed_precision)


def train(config_path: str) -> None:
    """Train; print the peak, and what the imports alone took."""
    from lora_scripts import pipeline
    from lora_scripts.memory import room
    from lora_scripts.tasks import diffusion

    import_all(config_path)
    imports = room.resident()
    diffusion.MEASURED_VIEWS = 1  # forward passes that take time and little memory
    peaks, ended = [0], threading.Event()

    def watch() -> None:  # the run itself lets the system forget its peak
        while not ended.wait(0.02):
            peaks[0] = max(peaks[0], room.peak_resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert pipeline.run(Path(config_path)) == 0
    ended.set()
    watcher.join()
    print(json.dumps({"imports": imports, "peak": max(peaks[0], room.peak_resident())}))


def import_all(config_path: str) -> None:
    """Everything that a run of this kind imports."""
    import peft
    import tensorboard
    import transformers

    from lora_scripts.models import causal_lm, sd, sdxl
    from lora_scripts.training import loop

    del peft, tensorboard, transformers, causal_lm, sd, sdxl, loop, config_path


# --- the models -----------------------------------------------------------------------------------


def save_sd(
    family: Any, unet: Mapping[str, Any], width: int, layers: int
) -> Callable[[Path], None]:
    """A diffusers folder in float16: the family's UNet with changes, its VAE, smaller encoders."""

    def save(folder: Path) -> None:
        import torch

        from benchmarks import image_shapes

        text = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width,
                "num_attention_heads": width // 64, "num_hidden_layers": layers}  # fmt: skip
        changes = {"unet": unet} | ({"text_encoder": text} if width else {})
        published = image_shapes.packaged_config
        image_shapes.packaged_config = lambda f, part: published(f, part) | changes.get(part, {})
        torch.manual_seed(0)
        image_shapes.save_base(folder, family)

    return save


def save_lm(dtype: str, **settings: Any) -> Callable[[Path], None]:
    """A transformers folder of a Llama, with the tests' tokenizer."""

    def save(folder: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from tests import text_toys

        tokenizer = text_toys.chatml_tokenizer()
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model("llama", **settings, **ids)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save


SMALL = {"block_out_channels": [160, 320, 640, 640], "cross_attention_dim": 384}
SMALL_XL = {
    "block_out_channels": [128, 256, 512],
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 4],
    "cross_attention_dim": 2048,
}
BASES: dict[str, Callable[[Path], None]] = {
    "SD small": save_sd("sd1", SMALL, 384, 6),
    "SD1.5": save_sd("sd1", {}, 0, 0),
    "SDXL small": save_sd("sdxl", SMALL_XL, 0, 0),
    "Llama 110M": save_lm(
        "float32",
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=16000,
    ),
    "Llama 250M": save_lm(
        "bfloat16",
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=64000,
    ),
}  # fmt: skip
COMMON = {"epochs": 1, "max_train_steps": 2, "mixed_precision": "no", "resume": "never"}
TEXT = {"task_type": "text-generation", "gradient_accumulation_steps": 1, "validation_split": 0}
FITTED: dict[str, tuple[str, dict[str, Any]]] = {
    "SD small, 256², batch 2": ("SD small", {"resolution": 256, "batch_size": 2}),
    "SD small, 256², batch 4, bf16": (
        "SD small", {"resolution": 256, "batch_size": 4, "mixed_precision": "bf16"}
    ),
    "SD small, 512², batch 1, checkpointing": (
        "SD small", {"resolution": 512, "batch_size": 1, "gradient_checkpointing": True}
    ),
    "SD small, 384², batch 2 accumulated, all layers, rank 32": (
        "SD small",
        {"resolution": 384, "batch_size": 2, "lora_targets": "all", "lora_rank": 32,
         "gradient_accumulation_steps": 2},
    ),
    "SD small, 256², batch 4, text encoder, adafactor": (
        "SD small",
        {"resolution": 256, "batch_size": 4, "train_text_encoder": True, "optimizer": "adafactor"},
    ),
    "SD small, 384², a sample drawn": (
        "SD small", {"resolution": 384, "sample_prompts": [{"prompt": "noise", "steps": 2}]}
    ),
    "SDXL small, 512², batch 1, bf16": (
        "SDXL small", {"resolution": 512, "batch_size": 1, "mixed_precision": "bf16"}
    ),
    "Llama 110M, packed, 4 rows": ("Llama 110M", {**TEXT, "batch_size": 4, "words": 150}),
    "Llama 110M, packed, 2 long rows": (
        "Llama 110M", {**TEXT, "batch_size": 2, "words": 400, "max_seq_length": 1024}
    ),
    "Llama 110M, padded, 4 rows": (
        "Llama 110M", {**TEXT, "batch_size": 4, "words": 150, "packing": False}
    ),
    "Llama 110M, packed, 8 long rows, checkpointing": (
        "Llama 110M",
        {**TEXT, "batch_size": 8, "words": 400, "max_seq_length": 1024,
         "gradient_checkpointing": True, "optimizer": "prodigy"},
    ),
    "Llama 250M, 64,000 tokens known, bf16": (
        "Llama 250M", {**TEXT, "batch_size": 4, "words": 200, "mixed_precision": "bf16"}
    ),
    "SD small, 256², batch 6, accumulated": (
        "SD small", {"resolution": 256, "batch_size": 6, "gradient_accumulation_steps": 2}
    ),
    "Llama 250M, packed, 2 rows, accumulated": (
        "Llama 250M",
        {**TEXT, "batch_size": 2, "words": 120, "gradient_accumulation_steps": 2},
    ),
}  # fmt: skip
PROOF: dict[str, tuple[str, dict[str, Any]]] = {
    "SD small, 320², batch 3, bf16": (
        "SD small", {"resolution": 320, "batch_size": 3, "mixed_precision": "bf16"}
    ),
    "SD small, 448², batch 1, linear layers, lion": (
        "SD small", {"resolution": 448, "lora_targets": "linear", "optimizer": "lion"}
    ),
    "SD small, 384², batch 2, DoRA": (
        "SD small", {"resolution": 384, "batch_size": 2, "lora_type": "dora"}
    ),
    "SD small, 512², batch 2, checkpointing, bf16": (
        "SD small",
        {"resolution": 512, "batch_size": 2, "gradient_checkpointing": True,
         "mixed_precision": "bf16"},
    ),
    "Llama 110M, packed, 3 rows, bf16": (
        "Llama 110M", {**TEXT, "batch_size": 3, "words": 250, "mixed_precision": "bf16"}
    ),
    "Llama 110M, packed, 6 short rows, attention only": (
        "Llama 110M", {**TEXT, "batch_size": 6, "words": 60, "lora_targets": "attention"}
    ),
    "Llama 250M, packed, 4 rows, checkpointing, bf16": (
        "Llama 250M",
        {**TEXT, "batch_size": 4, "words": 250, "gradient_checkpointing": True,
         "mixed_precision": "bf16"},
    ),
    "SD small, 320², batch 2, accumulated": (
        "SD small", {"resolution": 320, "batch_size": 2, "gradient_accumulation_steps": 3}
    ),
    "Llama 110M, packed, 3 rows, accumulated": (
        "Llama 110M",
        {**TEXT, "batch_size": 3, "words": 120, "gradient_accumulation_steps": 2},
    ),
    "SD1.5, 512², batch 1, bf16": ("SD1.5", {"resolution": 512, "mixed_precision": "bf16"}),
}  # fmt: skip
CASES = {
    **{name: Case(base, keys, fitted=True) for name, (base, keys) in FITTED.items()},
    **{name: Case(base, keys) for name, (base, keys) in PROOF.items()},
}


if __name__ == "__main__":
    main()
