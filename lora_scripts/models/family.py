"""What every image family offers to data, task and export. One file a family implements it.

Tensor suffixes: B batch, C channels, H height, W width, S tokens, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from PIL.Image import Image
from torch import nn

Conditioning = Mapping[str, torch.Tensor]  # what the denoiser is told, one row a prompt
Encoder = Literal["image", "text"]
Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class DrawRequest:
    """One picture to draw: `width` and `height` in pixels, `seed` of the starting noise."""

    prompt: str
    negative_prompt: str
    guidance_scale: float
    steps: int
    width: int
    height: int
    seed: int


class ImageFamily(Protocol):
    """A text-to-image model of one family, loaded: its encoders, its denoiser, its names."""

    adapted: Mapping[str, nn.Module]  # the modules a LoRA can sit on, by component name
    targets: Mapping[str, Sequence[str]]  # component -> ends of the paths of adapted layers
    prediction: Prediction
    alphas_cumprod_T: torch.Tensor  # float32, the noise schedule after T training steps
    native_size: int  # side of the square pictures that the model was made for, in pixels
    pixel_multiple: int  # sides of a picture must be multiples of this

    @property
    def image_encoder_id(self) -> str:
        """A content hash: same id, same latents."""

    @property
    def text_encoder_id(self) -> str:
        """A content hash: same id, same conditioning."""

    @property
    def denoiser_id(self) -> str:
        """A content hash of the module that is trained, as it was before a LoRA."""

    def visiting(self, encoder: Encoder) -> AbstractContextManager[None]:
        """The encoder on the device within this context, back where it was after it."""

    def encode_image(self, pixels_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation (both CHW, float32, scaled for the denoiser) of one picture's latent.

        `pixels_CHW` is float32 in [-1, 1]."""

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        """What the denoiser is told for one prompt: float32, on the CPU, no batch dimension."""

    def predict(
        self, noisy_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The denoiser's output, BCHW: noise or velocity as `prediction` says."""

    def draw(self, request: DrawRequest) -> Image:
        """One picture with the model as it is, adapters included."""

    def checkpoint_gradients(self) -> None:
        """Keep fewer activations while training and compute them again in the backward pass."""

    def probe(self) -> torch.Tensor:
        """One forward pass of the denoiser on small fixed inputs, to compare models by."""

    def load_loras(self, loras: Sequence[tuple[Path, float]]) -> None:
        """Put finished LoRA files on the model with the library's own reader, with strengths."""

    def webui_name(self, component: str, path: str) -> str:
        """The name under which WebUI and ComfyUI look for the adapter of a layer."""

    def metadata(self) -> dict[str, str]:
        """The header fields by which programs recognise the family."""
