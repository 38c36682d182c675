"""The files of a text run: a PEFT directory with its tokenizer, and the proof that it reads back.

The proof is a fresh model, read from the base again, with the adapter loaded by PEFT's own reader:
its logits must be the trained model's.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch

from lora_scripts import allocator
from lora_scripts.device import Compute
from lora_scripts.export import files
from lora_scripts.export.protocol import Finished, proved
from lora_scripts.models import causal_lm, lora, packing
from lora_scripts.run_files import ADAPTER_NAME
from lora_scripts.schema import TextConfig
from lora_scripts.tasks import build
from lora_scripts.tasks.language import LanguageTask
from lora_scripts.training.checkpoint import Position

TOLERANCE = 1e-3  # of the largest logit; both are computed in the run's precision
USAGE = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, "{folder}")
```
{note}
Talk to it: `lora-scripts chat --lora {folder}`. One model without PEFT:
`lora-scripts export --lora {folder} --merge`. For llama.cpp and Ollama:
`lora-scripts export --lora {folder} --format gguf`."""
CONVERTED = """
The base was `{base_model}`, which transformers does not read in these two lines as it stands:
`lora-scripts export --lora {folder} --base` writes it once as a folder that it reads.
"""


class TextExport:
    """The PEFT directory of a text run."""

    def __init__(
        self, task: LanguageTask, config: TextConfig, compute: Compute, began: float
    ) -> None:
        self.task = task
        self.config = config
        self.compute = compute
        self.began = began
        self.is_converted = task.base.found.layout != "transformers"

    def checkpoint_files(self, folder: Path, position: Position) -> list[Path]:
        return self._write(folder, position)

    def finish(self, position: Position) -> Finished:
        paths = self._write(self.config.output_dir, position)
        paths += save_tokenizer(self.task, self.config.output_dir)
        reference, found = self._outputs(self.config.output_dir)
        difference = proved(reference, found, TOLERANCE, self.config.output_dir, "PEFT")
        return Finished(paths, difference, "PEFT")

    def follow(self) -> None:
        self._outputs(None)

    def card_usage(self) -> str:
        folder, base_model = self.config.output_dir.as_posix(), self.config.base_model
        base = f"{folder}/base" if self.is_converted else base_model
        values = {"base": f'"{base}"', "base_model": base_model, "folder": folder}
        note = CONVERTED.format(**values) if self.is_converted else ""
        if self.config.system_prompt:
            note += f"\nTrained with the system message: `{self.config.system_prompt}`\n"
        return USAGE.format(**values, note=note)

    def hints(self) -> list[str]:
        folder = self.config.output_dir
        return [
            f"talk to it: lora-scripts chat --lora {folder}",
            f"in Python: PeftModel.from_pretrained(model, {str(folder)!r})",
        ]

    def _write(self, folder: Path, position: Position) -> list[Path]:
        """adapter_model.safetensors and adapter_config.json, the former read back and compared."""
        model = self.task.base.model
        path = folder / ADAPTER_NAME
        tensors = lora.peft_tensors(lora.layers(model), files.DTYPES[self.config.save_dtype])
        files.write_tensors(path, tensors, self._metadata(position))
        return [path, lora.write_peft_config(folder, model, self.config.base_model)]

    def _metadata(self, position: Position) -> dict[str, str]:
        return {
            **self.task.metadata(),
            "lora_scripts.name": self.config.output_name,
            "lora_scripts.steps": str(position.step),
            "lora_scripts.seed": str(self.config.seed),
            "lora_scripts.started_at": str(int(self.began)),
            "lora_scripts.finished_at": str(int(time.time())),
        }

    def _outputs(self, folder: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the trained model, then those of a fresh one with the files of `folder`."""
        reference = self._reference()
        self.task.release()
        gc.collect()
        allocator.give_back()
        return reference, self._reload(folder)

    def _reference(self) -> torch.Tensor:
        """Logits of the trained model, its adapters rounded to the file's precision."""
        model = self.task.base.model
        lora.round_to(model, files.DTYPES[self.config.save_dtype])
        with packing.attention(model, self.task.own_attention), self.compute.autocast():
            return causal_lm.probe(model.eval())

    def _reload(self, folder: Path | None) -> torch.Tensor:
        fresh = build.load_text(self.config, self.compute).model
        adapted = lora.with_adapters(fresh, [(folder, 1.0)]) if folder else fresh
        if self.compute.sharded:
            causal_lm.shard(fresh, self.compute)
        with self.compute.autocast():
            return causal_lm.probe(adapted)


def save_tokenizer(task: LanguageTask, folder: Path) -> list[Path]:
    """The tokenizer with the chat template that was trained with."""
    tokenizer = task.base.tokenizer
    tokenizer.chat_template = task.format.template
    return [Path(name) for name in tokenizer.save_pretrained(folder) if Path(name).is_file()]
