"""The parts of an image model by name, each read from the base's files when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lora_scripts.device import Compute
from lora_scripts.errors import WorkError
from lora_scripts.models import components, schedule, vae_file
from lora_scripts.models.encoders import Encoders
from lora_scripts.models.family import Options
from lora_scripts.models.json_file import read_model_config
from lora_scripts.models.signature import Signature
from lora_scripts.models.single_file import Checkpoint

Stamp = list[tuple[Path, int, int]]  # files, bytes, nanoseconds
CLASSES: Mapping[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
}


def load(
    found: Signature, compute: Compute, options: Options, *, resting: bool
) -> tuple[dict[str, Any], Encoders]:
    """All parts of a base model under diffusers' names, on the CPU. No network, no pickle.

    The encoders come first: if they rest, they are gone again when the denoiser, whose files lie
    in memory beside its weights while it is read, comes.

    Args:
        found: A diffusers folder or an original single file.
        compute: The denoiser gets its precision, the rest is float32.
        options: As the config says.
        resting: Whether the encoders' weights lie in memory only while they are needed.

    Raises:
        UserError: if files are missing, damaged or do not fit.
    """
    source = _Source(found, options)
    parts = source.others()
    encoders = Encoders(compute.device, source.tensors if resting else None)
    for name in source.names:
        is_denoiser = name == "unet"
        parts[name] = source.part(name, compute.dtype if is_denoiser else torch.float32)
        if not is_denoiser:
            encoders.add(name, parts[name])
    return parts, encoders


class _Source:
    """Where the parts of a base model lie."""

    def __init__(self, found: Signature, options: Options) -> None:
        self.is_xl = found.family == "sdxl"
        self.names = [name for name in CLASSES if self.is_xl or name != "text_encoder_2"]
        self._found = found
        self._file = Checkpoint(found) if found.layout == "ldm" else None
        self._other_vae = vae_file.find_vae(options.vae).path if options.vae is not None else None
        self._stamps: dict[str, Stamp] = {}

    def part(self, name: str, dtype: torch.dtype) -> Any:
        """A component with its weights, on the CPU, in evaluation mode."""
        self._stamps[name] = self._stamp(name)
        if name == "vae" and self._other_vae is not None:
            return vae_file.load_vae(self._other_vae, self._own_vae_config())
        if self._file is not None:
            return self._file.part(name, dtype)
        read = components.read_unet if name == "unet" else components.read_part
        return read(CLASSES[name], self._found.path / name, self._found.variant, dtype)

    def tensors(self, name: str, like: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The weights of an encoder once more, in float32. `like`: of their names and shapes.

        Raises:
            WorkError: if its files are not those that were read before.
        """
        if self._stamp(name) != self._stamps[name]:
            changed = f"{self._place(name)}: these files have changed since the run began"
            raise WorkError(f"{changed}; put back what was there, then the same command goes on")
        is_other_vae = name == "vae" and self._other_vae is not None
        found: Mapping[str, torch.Tensor] | None = None
        if self._file is not None and not is_other_vae:
            found = self._file.tensors(name)
        elif not is_other_vae:
            place, variant = self._place(name), self._found.variant
            found = components.plain_tensors(place, variant, like, torch.float32)
        if found is None:
            module: nn.Module = self.part(name, torch.float32)
            found = module.state_dict()
        return found

    def _place(self, name: str) -> Path:
        """The file or folder of a component."""
        if name == "vae" and self._other_vae is not None:
            return self._other_vae
        return self._found.path if self._file is not None else self._found.path / name

    def _stamp(self, name: str) -> Stamp:
        """By what a change of a component's files is noticed: their names, sizes and times."""
        place = self._place(name)
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def _own_vae_config(self) -> Mapping[str, Any]:
        """Of the base's VAE, of which no weight is read where another takes its place."""
        if self._file is not None:
            return self._file.config("vae")
        config = read_model_config(self._found.path / "vae" / "config.json")
        with torch.device("meta"):
            own: Mapping[str, Any] = AutoencoderKL.from_config(config).config
        return own

    def others(self) -> dict[str, Any]:
        """Tokenizers and scheduler."""
        if self._file is not None:
            return self._file.others()
        path = self._found.path
        tokenizers = ["tokenizer", "tokenizer_2"] if self.is_xl else ["tokenizer"]
        return {
            **{name: components.read_clip_tokenizer(path / name) for name in tokenizers},
            "scheduler": schedule.read(path / "scheduler"),
        }
