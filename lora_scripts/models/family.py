"""What every image family offers to data, task and export. One file a family implements it.

Tensor suffixes: B batch, C channels, H height, W width, S tokens, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL.Image import Image
from torch import nn

Conditioning = Mapping[str, torch.Tensor]  # what the denoiser is told, one row a prompt
Encoder = Literal["image", "text"]
Prediction = Literal["epsilon", "v_prediction"]
Preset = Literal["attention", "linear", "all"]
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Options:
    """How a base model is to be taken; the keys of these names in a config say what they mean."""

    vae: str | None = None
    prediction_type: Literal["auto"] | Prediction = "auto"
    zero_terminal_snr: Literal["auto"] | bool = "auto"
    clip_skip: int | None = None
    max_caption_tokens: int = 75


@dataclass(frozen=True)
class Framing:
    """How a picture was cut for a view: what SDXL is told of it.

    Attributes:
        original: The picture's own size.
        corner: (left, top) of the cut within the picture scaled to cover the bucket.
        target: The bucket's size.
    """

    original: Size
    corner: tuple[int, int]
    target: Size


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

    adapted: Mapping[str, nn.Module]  # the modules a LoRA can sit on, the denoiser first, by name
    prediction: Prediction
    alphas_cumprod_T: torch.Tensor  # float32, the noise schedule after T training steps
    native_size: int  # side of the square pictures that the model was made for, in pixels
    pixel_multiple: int  # sides of a picture must be multiples of this

    @property
    def image_encoder_id(self) -> str:
        """A content hash: same id, same latents."""

    @property
    def text_encoder_id(self) -> str:
        """A content hash of encoders, tokenizers and options: same id, same conditioning."""

    @property
    def denoiser_id(self) -> str:
        """A content hash of the module that is trained, as it was before a LoRA."""

    def targets(self, chosen: Preset | Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Component -> full paths of the layers that a LoRA shall sit on, for every component.

        `chosen`: a preset, or ends of paths (`to_q`, `ff.net.2`).

        Raises:
            UserError: if a name fits no layer, with the names that there are.
        """

    def visiting(self, encoder: Encoder) -> AbstractContextManager[None]:
        """The encoder on the device within this context, back where it was after it."""

    def keep_on_device(self, encoder: Encoder) -> None:
        """From now on the encoder stays on the device: it is used in every step."""

    def encode_image(self, pixels_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation (both CHW, float32, scaled for the denoiser) of one picture's latent.

        `pixels_CHW` is float32 in [-1, 1]."""

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        """What the denoiser is told for one prompt: float32, on the CPU, no batch dimension."""

    def tokenize(self, prompt: str) -> dict[str, torch.Tensor]:
        """A prompt's token ids by encoder, each int64 (parts, tokens a part); no model runs."""

    def encode_tokens(self, prompts: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        """The conditioning of a batch of tokenized prompts, on the device, with gradients."""

    def collate(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        """Rows as `encode_prompt` gives them, of one or of several lengths, as one batch."""

    def frame(self, framing: Framing) -> dict[str, torch.Tensor]:
        """What the denoiser is told of a picture's cut, without a batch dimension; {} if nothing.

        These stand beside a prompt's tensors in the conditioning."""

    def predict(
        self, noisy_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The denoiser's output, BCHW: noise or velocity as `prediction` says."""

    def draw(self, request: DrawRequest) -> Image:
        """One picture with the model as it is, adapters included."""

    def checkpoint_gradients(self) -> None:
        """Keep fewer activations of the adapted modules, compute them again in the backward."""

    def units(self, component: str) -> Sequence[nn.Module]:
        """What is gathered at once of a module that is spread over processes: all of it, in parts.

        Each before the one that it stands in; they must be used by calling them."""

    def probe(self) -> torch.Tensor:
        """Outputs of denoiser and text encoders on small fixed inputs, flat: to compare models."""

    def load_file(self, path: Path) -> None:
        """Put a LoRA (a file, or a run's folder) on the model with the library's own reader."""

    def parts(self) -> Mapping[str, Any]:
        """The modules, tokenizers and the scheduler under diffusers' names."""

    def save(self, folder: Path) -> None:
        """Write the model as it is as a diffusers folder; no adapters may be on it."""

    def webui_name(self, component: str, path: str) -> str:
        """The name under which WebUI and ComfyUI look for the adapter of a layer."""

    def metadata(self) -> dict[str, str]:
        """The header fields by which programs recognise the family."""
