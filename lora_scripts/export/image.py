"""The files of an image run: the ready file in a checkpoint, the finished pair, and the proof.

The proof is a fresh model, read from the base again, with the file loaded by diffusers' own
reader: its output must be the trained model's with the adapters as the file has them.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path

import torch
from torch import nn

from lora_scripts import allocator
from lora_scripts.device import Compute
from lora_scripts.export import files
from lora_scripts.export.protocol import Finished, proved
from lora_scripts.models import lora, sharding
from lora_scripts.models.family import ImageFamily
from lora_scripts.run_files import DIFFUSERS_NAME
from lora_scripts.schema import ImageConfig
from lora_scripts.tasks import build
from lora_scripts.tasks.diffusion import DiffusionTask
from lora_scripts.training.checkpoint import Position

USAGE = """\
| program | how |
|---|---|
| AUTOMATIC1111, Forge, SD.Next | copy `{name}.safetensors` to `models/Lora`; \
`<lora:{name}:0.8>` in the prompt |
| ComfyUI | copy `{name}.safetensors` to `models/loras`; Load LoRA node |
| diffusers | `pipeline.load_lora_weights("{folder}")` |"""
# Programs differ in how they apply DoRA's magnitudes (docs/decisions.md, 31).
DORA_USAGE = """\
| program | how |
|---|---|
| diffusers | `pipeline.load_lora_weights("{folder}")`: exactly as trained |
| ComfyUI, Forge (since mid-2025) | `{name}.safetensors`: close to what was trained; they divide \
by the norm of the base's weights where the method divides by that of the sum |
| AUTOMATIC1111, older versions | not as trained: they take the norms the other way round |

The same everywhere: `lora-scripts export --lora {folder} --merge --single-file` makes one \
checkpoint with the LoRA in it."""
TOLERANCE = 1e-5  # of the output's largest value: the same operations on the same values


class ImageExport:
    """The LoRA files of an image run."""

    def __init__(
        self, task: DiffusionTask, config: ImageConfig, compute: Compute, began: float
    ) -> None:
        self.task = task
        self.config = config
        self.compute = compute
        self.began = began

    def checkpoint_files(self, folder: Path, position: Position) -> list[Path]:
        return write_checkpoint_file(self.task, self.config, self.began, folder, position)

    def finish(self, position: Position) -> Finished:
        paths = write_finished(self.task, self.config, self.began, position)
        reference, found = self._outputs(self.config.output_dir)
        difference = proved(reference, found, TOLERANCE, self.config.output_dir, "diffusers")
        return Finished(paths, difference, "diffusers")

    def follow(self) -> None:
        self._outputs(None)

    def card_usage(self) -> str:
        folder = self.config.output_dir.as_posix()
        usage = DORA_USAGE if self.config.lora_type == "dora" else USAGE
        return usage.format(name=self.config.output_name, folder=folder)

    def hints(self) -> list[str]:
        if self.config.lora_type == "dora":
            return [
                f"{DIFFUSERS_NAME} is for diffusers, {self.config.output_name}.safetensors for "
                "ComfyUI and Forge, which come close; AUTOMATIC1111 applies DoRA otherwise",
                f"exact everywhere: lora-scripts export --lora {self.config.output_dir} --merge "
                "--single-file",
            ]
        return [
            f"in a WebUI prompt: <lora:{self.config.output_name}:0.8>; "
            f"in diffusers: load_lora_weights({str(self.config.output_dir)!r})"
        ]

    def _outputs(self, folder: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the trained model, then those of a fresh one with the files of `folder`."""
        reference = reference_output(self.task.family, files.DTYPES[self.config.save_dtype])
        components = list(self.task.adapted)
        self.task.release()
        gc.collect()
        allocator.give_back()
        fresh = build.load_family(
            build.find_base(self.config.base_model),
            self.compute,
            build.options_of(self.config),
            resting=not self.compute.sharded,  # what is spread must be there
        )
        if folder is not None:
            fresh.load_file(folder)
        if self.compute.sharded:
            for component in components:
                sharding.shard(fresh.adapted[component], fresh.units(component), self.compute)
        return reference, output_on_fixed_inputs(fresh)


def metadata(
    task: DiffusionTask, config: ImageConfig, position: Position, started: float
) -> dict[str, str]:
    """The header of a LoRA file, in the field names that the WebUIs show and search."""
    return {
        **task.metadata(),
        "ss_output_name": config.output_name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.lora_rank),
        "ss_network_alpha": str(config.lora_alpha),
        "ss_network_args": json.dumps(_network_args(config)),
        "ss_network_dropout": str(config.lora_dropout),
        "ss_learning_rate": str(config.learning_rate),
        "ss_unet_lr": str(config.learning_rate),
        "ss_text_encoder_lr": (
            str(config.text_encoder_learning_rate) if config.train_text_encoder else "None"
        ),
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_optimizer": config.optimizer,
        "ss_batch_size_per_device": str(config.micro_batch),
        "ss_gradient_accumulation_steps": str(config.gradient_accumulation_steps),
        "ss_steps": str(position.step),
        "ss_max_train_steps": str(config.max_train_steps or position.step),
        "ss_num_epochs": str(config.epochs),
        "ss_epoch": str(position.epochs_done),
        "ss_seed": str(config.seed),
        "ss_min_snr_gamma": str(config.min_snr_gamma),
        "ss_mixed_precision": config.mixed_precision,
        "ss_training_started_at": str(int(started)),
        "ss_training_finished_at": str(int(time.time())),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.output_name,
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        "modelspec.trigger_phrase": config.trigger_word or "",
    }


def _network_args(config: ImageConfig) -> dict[str, str]:
    """What is not plain LoRA on attention, in kohya's words where it has them."""
    args = {"lora_type": config.lora_type, "lora_targets": str(config.lora_targets)}
    if config.lora_targets == "all":
        args |= {"conv_dim": str(config.lora_rank), "conv_alpha": str(config.lora_alpha)}
    return args


def write_checkpoint_file(
    task: DiffusionTask, config: ImageConfig, started: float, folder: Path, position: Position
) -> list[Path]:
    """The adapter as it is, ready to be tried in any program: `NAME-000100.safetensors`."""
    path = folder / f"{config.output_name}-{position.step:06d}.safetensors"
    files.write_lora(
        path,
        {name: lora.layers(module) for name, module in task.adapted.items()},
        task.family.webui_name,
        files.DTYPES[config.save_dtype],
        metadata(task, config, position, started)
        | {"ss_output_name": path.stem, "modelspec.title": path.stem},
    )
    return [path]


def write_finished(
    task: DiffusionTask, config: ImageConfig, started: float, position: Position
) -> list[Path]:
    """The finished LoRA under its two names."""
    return files.write_finished(
        config.output_dir,
        config.output_name,
        {name: lora.layers(module) for name, module in task.adapted.items()},
        task.family.webui_name,
        files.DTYPES[config.save_dtype],
        metadata(task, config, position, started),
    )


def reference_output(family: ImageFamily, dtype: torch.dtype) -> torch.Tensor:
    """The model's outputs on fixed inputs, with the adapters as the file has them.

    `dtype`: of the file. Rounds the adapters; nothing must be trained with them afterwards.
    """
    for module in family.adapted.values():
        lora.round_to(module, dtype)
        lora.scale_as_written(module)
    return output_on_fixed_inputs(family)


def output_on_fixed_inputs(family: ImageFamily) -> torch.Tensor:
    """One forward pass on small fixed inputs, each module wholly in its base's precision.

    A copy in float32 would not fit beside anything where the model is large.
    """
    for module in family.adapted.values():
        module.to(_base_dtype(module)).eval()
    with torch.no_grad():
        return family.probe().float().cpu()


def _base_dtype(module: nn.Module) -> torch.dtype:
    """The type of a module's own weights."""
    return next(p.dtype for name, p in module.named_parameters() if ".lora_" not in name)
