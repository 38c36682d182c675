"""A family in one file, as docs/adding_a_family.md tells it: a toy that paints by pixel.

Its latents are pictures at an eighth of their size, its prompts counts of letters, its denoiser
three linear layers. Tensor suffixes: B batch, C channels, H height, W width, D width of a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL.Image import Image, fromarray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from lora_scripts.device import Compute
from lora_scripts.errors import user_error
from lora_scripts.models import lora, schedule
from lora_scripts.models.components import content_id
from lora_scripts.models.family import (
    Conditioning,
    DrawRequest,
    Encoder,
    Framing,
    Options,
    Prediction,
    Preset,
)
from lora_scripts.models.signature import Signature

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIDE_FACTOR = 8
WEIGHTS = "toy.safetensors"


class Denoiser(nn.Module):
    """Each pixel by itself: its colour, the time and the prompt in, a colour out."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "read": nn.Linear(3 + 1 + len(LETTERS), width),
                "think": nn.Linear(width, width),
                "write": nn.Linear(width, 3),
            }
        )

    def forward(
        self, noisy_BCHW: torch.Tensor, timesteps_B: torch.Tensor, prompt_BD: torch.Tensor
    ) -> torch.Tensor:
        pixels_BHWC = noisy_BCHW.permute(0, 2, 3, 1)
        told_BD = torch.cat([timesteps_B[:, None] / 1000, prompt_BD], dim=1)
        told_BHWD = told_BD[:, None, None].expand(*pixels_BHWC.shape[:3], -1)
        state = functional.silu(self.body["read"](torch.cat([pixels_BHWC, told_BHWD], dim=-1)))
        output_BHWC: torch.Tensor = self.body["write"](functional.silu(self.body["think"](state)))
        return output_BHWC.permute(0, 3, 1, 2)


class ToyFamily:
    """A toy model in memory."""

    prediction: Prediction = "epsilon"
    native_size = 64
    pixel_multiple = SIDE_FACTOR

    def __init__(self, denoiser: Denoiser, compute: Compute) -> None:
        self.denoiser = denoiser.to(compute.device).requires_grad_(False).eval()
        self.compute = compute
        self.adapted: Mapping[str, nn.Module] = {"denoiser": self.denoiser}
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.alphas_cumprod_T = schedule.alphas_cumprod(self.scheduler)

    @cached_property
    def denoiser_id(self) -> str:
        return content_id(self.denoiser)

    @property
    def image_encoder_id(self) -> str:
        return f"a {SIDE_FACTOR}th"

    @property
    def text_encoder_id(self) -> str:
        return f"counts of {LETTERS}"

    def targets(self, chosen: Preset | Sequence[str]) -> Mapping[str, Sequence[str]]:
        linear = [p for p, m in self.denoiser.named_modules() if isinstance(m, nn.Linear)]
        if isinstance(chosen, str):
            return {"denoiser": linear}
        unknown = [name for name in chosen if name not in linear]
        if unknown:
            what = f"found {', '.join(unknown)}; this model's layers are {', '.join(linear)}"
            raise user_error("lora_targets", what)
        return {"denoiser": list(chosen)}

    def visiting(self, encoder: Encoder) -> AbstractContextManager[None]:
        return nullcontext()

    def keep_on_device(self, encoder: Encoder) -> None:
        pass

    def encode_image(self, pixels_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small_CHW = functional.avg_pool2d(pixels_CHW, SIDE_FACTOR).cpu()
        return small_CHW, torch.zeros_like(small_CHW)

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        counts = [float(prompt.lower().count(letter)) for letter in LETTERS]
        return {"prompt": torch.tensor(counts)}

    def tokenize(self, prompt: str) -> dict[str, torch.Tensor]:
        return {name: tensor[None].long() for name, tensor in self.encode_prompt(prompt).items()}

    def encode_tokens(self, prompts: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        counts_BD = torch.cat([prompt["prompt"] for prompt in prompts])
        return {"prompt": counts_BD.float().to(self.compute.device)}

    def collate(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def frame(self, framing: Framing) -> dict[str, torch.Tensor]:
        return {}

    def predict(
        self, noisy_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        output_BCHW: torch.Tensor = self.denoiser(noisy_BCHW, timesteps_B, conditioning["prompt"])
        return output_BCHW

    @torch.no_grad()
    def draw(self, request: DrawRequest) -> Image:
        device = self.compute.device
        size = (request.height // SIDE_FACTOR, request.width // SIDE_FACTOR)
        source = torch.Generator().manual_seed(request.seed)
        picture_BCHW = torch.randn(1, 3, *size, generator=source).to(device)
        told = self.collate([self.encode_prompt(request.prompt)])
        conditioning = {name: tensor.to(device) for name, tensor in told.items()}
        self.scheduler.set_timesteps(request.steps)
        for timestep in self.scheduler.timesteps:
            noise_BCHW = self.predict(picture_BCHW, timestep[None].to(device), conditioning)
            picture_BCHW = self.scheduler.step(noise_BCHW, timestep, picture_BCHW).prev_sample
        pixels_BCHW = functional.interpolate(picture_BCHW, scale_factor=SIDE_FACTOR)
        array_HWC = ((pixels_BCHW[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
        return fromarray(array_HWC.to("cpu", torch.uint8).numpy())

    def checkpoint_gradients(self) -> None:
        raise user_error("gradient_checkpointing", "found true; this model has no need of it")

    def units(self, component: str) -> Sequence[nn.Module]:
        return [self.adapted[component]]

    def probe(self) -> torch.Tensor:
        device, source = self.compute.device, torch.Generator().manual_seed(0)
        noisy_BCHW = torch.randn(1, 3, 8, 8, generator=source).to(device)
        told = {"prompt": self.encode_prompt("a b c")["prompt"][None].to(device)}
        return self.predict(noisy_BCHW, torch.tensor([500], device=device), told).flatten().cpu()

    def load_file(self, path: Path) -> None:
        """No library knows this family, so its own few lines read the file."""
        file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
        tensors = load_file(file)
        adapters = []
        for layer in self.targets("all")["denoiser"]:
            name = self.webui_name("denoiser", layer)
            if f"{name}.alpha" in tensors:
                down, up = (tensors[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
                alpha = tensors[f"{name}.alpha"].item()
                adapters.append(lora.AdaptedLayer(layer, down.float(), up.float(), alpha))
        lora.put(self.denoiser, "file", adapters)
        lora.set_strengths(self.denoiser, {"file": 1.0})

    def parts(self) -> Mapping[str, Any]:
        return {"denoiser": self.denoiser, "scheduler": self.scheduler}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.denoiser.state_dict(), folder / WEIGHTS)

    def webui_name(self, component: str, path: str) -> str:
        return f"lora_{component}_{path.replace('.', '_')}"

    def metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "toy", "modelspec.architecture": "toy/lora"}


def load(found: Signature, compute: Compute, options: Options) -> ToyFamily:
    """Read a toy's folder. Options that cannot act are refused, not passed over."""
    if (options.clip_skip, options.vae) != (None, None):
        raise user_error("clip_skip, vae", "this model has no CLIP and no VAE; leave them out")
    denoiser = Denoiser()
    denoiser.load_state_dict(load_file(found.path / WEIGHTS))
    return ToyFamily(denoiser, compute)
