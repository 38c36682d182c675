"""Stable Diffusion XL: load, encode, predict, draw, and the names that its LoRA files use.

Two text encoders read the prompt; their states, without the final norm, lie side by side, and the
second's projected end state (`pooled`) and the picture's sizes (`time_ids`) go to the time
embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL.Image import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_scripts.device import Compute
from lora_scripts.models import clip_text, components, latents, prediction, schedule, source
from lora_scripts.models import unet as unet_layers
from lora_scripts.models.encoders import Encoders
from lora_scripts.models.family import (
    Conditioning,
    DrawRequest,
    Encoder,
    Framing,
    Options,
    Prediction,
    Preset,
)
from lora_scripts.models.json_file import read_json
from lora_scripts.models.signature import Signature

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PARTS: Mapping[Encoder, Sequence[str]] = {"image": ["vae"], "text": TEXT_ENCODERS}
OWN_CLIP_SKIP = 2  # the states before the last layer


class StableDiffusionXL:
    """An SDXL model in memory: the UNet in the run's precision, the rest in float32.

    The encoders visit the device only while they are needed, from the CPU or from the disk; those
    that are used in every step are kept there (`keep_on_device`). Text encoders that are trained
    are held in float32, too, and compute under the loop's autocast.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        compute: Compute,
        options: Options,
        said: prediction.Said,
        encoders: Encoders | None = None,
        *,
        zeros_for_empty: bool,
    ) -> None:
        """`encoders`: has VAE and text encoders in charge; without it they stay in memory."""
        unet: UNet2DConditionModel = parts["unet"]
        self.unet = unet.to(compute.home).requires_grad_(False).eval()
        self.vae: AutoencoderKL = parts["vae"]
        latents.check(self.vae)
        self.text_encoder: CLIPTextModel = parts["text_encoder"]
        self.text_encoder_2: CLIPTextModelWithProjection = parts["text_encoder_2"]
        if encoders is None:
            encoders = Encoders(compute.device)
            for name in ("vae", *TEXT_ENCODERS):
                encoders.add(name, parts[name])
        self.encoders = encoders
        self.tokenizer: CLIPTokenizer = parts["tokenizer"]
        self.tokenizer_2: CLIPTokenizer = parts["tokenizer_2"]
        self.compute = compute
        self.options = options
        self.zeros_for_empty = zeros_for_empty
        self.adapted: Mapping[str, nn.Module] = {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }
        text_encoders = {name: self.adapted[name] for name in TEXT_ENCODERS}
        clip_text.check_skip(text_encoders, options.clip_skip)
        side_factor = latents.side_factor(self.vae)
        self.latent_size: int = unet.config.sample_size
        self.native_size = self.latent_size * side_factor
        self.pixel_multiple = unet_layers.pixel_multiple(unet, side_factor)
        self.probe_side = 2 * self.pixel_multiple // side_factor
        self.last_timestep: int = parts["scheduler"].config.num_train_timesteps - 1
        settled = prediction.settle(options, said, self._try_out)
        self.prediction = settled.prediction
        self.scheduler: SchedulerMixin = schedule.settled(
            parts["scheduler"], settled.prediction, zero_snr=settled.zero_snr
        )
        self.alphas_cumprod_T = schedule.alphas_cumprod(self.scheduler)

    def targets(self, chosen: Preset | Sequence[str]) -> Mapping[str, Sequence[str]]:
        return unet_layers.targets(self.adapted, chosen)

    @cached_property
    def denoiser_id(self) -> str:
        return components.content_id(self.unet)

    @cached_property
    def image_encoder_id(self) -> str:
        return self.encoders.content_id("vae", *latents.reading_of(self.vae, self.options))

    @cached_property
    def text_encoder_id(self) -> str:
        reading = clip_text.reading_of([self.tokenizer, self.tokenizer_2], self.options)
        second = self.encoders.content_id("text_encoder_2")
        return self.encoders.content_id("text_encoder", second, *reading)

    def encode_image(self, pixels_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self.visiting("image"):
            return latents.encode(self.vae, pixels_CHW)

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        return self._encode(self.tokenize(prompt))

    def tokenize(self, prompt: str) -> dict[str, torch.Tensor]:
        most = self.options.max_caption_tokens
        return {
            "text_encoder": clip_text.tokenize(self.tokenizer, prompt, most),
            "text_encoder_2": clip_text.tokenize(self.tokenizer_2, prompt, most),
        }

    def encode_tokens(self, prompts: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        """`embedding` (B, S, both widths), `pooled` (B, D) of each prompt's first part."""
        skip = self.options.clip_skip or OWN_CLIP_SKIP
        first = [prompt["text_encoder"] for prompt in prompts]
        second = [prompt["text_encoder_2"] for prompt in prompts]
        states_PSD, _ = clip_text.raw_states(
            self.text_encoder, torch.cat(first).to(self.text_encoder.device), skip
        )
        states_2_PSD, pooled_PD = clip_text.raw_states(
            self.text_encoder_2, torch.cat(second).to(self.text_encoder_2.device), skip
        )
        counts = [len(ids_PS) for ids_PS in second]
        both_PSD = torch.cat([states_PSD, states_2_PSD], dim=-1)
        pooled = [parts_PD[0] for parts_PD in torch.split(pooled_PD, counts)]
        embeddings = clip_text.laid_out(both_PSD, first)
        rows = zip(embeddings, pooled, strict=True)
        return self.collate([{"embedding": e_SD, "pooled": p_D} for e_SD, p_D in rows])

    def collate(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        return clip_text.collate(rows)

    def frame(self, framing: Framing) -> dict[str, torch.Tensor]:
        """`time_ids`: original height and width, top and left of the cut, target height and width.

        In diffusers' order (examples/text_to_image/train_text_to_image_lora_sdxl.py)."""
        sides = (framing.original[::-1], framing.corner[::-1], framing.target[::-1])
        return {"time_ids": torch.tensor([side for pair in sides for side in pair]).float()}

    def predict(
        self, noisy_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
        return unet_layers.denoise(self.unet, noisy_BCHW, timesteps_B, conditioning, added)

    @torch.no_grad()
    def draw(self, request: DrawRequest) -> Image:
        # Without text encoders the pipeline takes the UNet's dtype for everything it computes.
        pipeline = self._pipeline()
        prompt, negative = (
            {
                name: tensor[None].to(self.compute.device, self.unet.dtype)
                for name, tensor in told.items()
            }
            for told in self._told_of(request)
        )
        if self.zeros_for_empty and not request.negative_prompt:
            negative = {name: torch.zeros_like(tensor) for name, tensor in prompt.items()}
        with self.compute.autocast():
            latents_BCHW = pipeline(
                prompt_embeds=prompt["embedding"],
                pooled_prompt_embeds=prompt["pooled"],
                negative_prompt_embeds=negative["embedding"],
                negative_pooled_prompt_embeds=negative["pooled"],
                guidance_scale=request.guidance_scale,
                num_inference_steps=request.steps,
                width=request.width,
                height=request.height,
                generator=torch.Generator().manual_seed(request.seed),
                output_type="latent",
            ).images
        with self.visiting("image"):
            return latents.decode(self.vae, latents_BCHW)

    def checkpoint_gradients(self) -> None:
        self.unet.enable_gradient_checkpointing()
        for text_encoder in (self.text_encoder, self.text_encoder_2):
            text_encoder.activation_checkpointing_enable({"use_reentrant": False})

    def units(self, component: str) -> Sequence[nn.Module]:
        return unet_layers.units(self.adapted[component])

    def probe(self) -> torch.Tensor:
        source = torch.Generator().manual_seed(0)
        side, config = self.probe_side, self.unet.config
        noisy_BCHW = torch.randn(1, config.in_channels, side, side, generator=source)
        tokens = self.tokenizer.model_max_length
        pooled_width = self.text_encoder_2.config.projection_dim
        size = (self.native_size, self.native_size)
        conditioning = {
            "embedding": torch.randn(1, tokens, config.cross_attention_dim, generator=source),
            "pooled": torch.randn(1, pooled_width, generator=source),
            "time_ids": self.frame(Framing(size, (0, 0), size))["time_ids"][None],
        }
        device = self.compute.device
        output_BCHW = self.predict(
            noisy_BCHW.to(device),
            torch.tensor([len(self.alphas_cumprod_T) // 2], device=device),
            {name: tensor.to(device) for name, tensor in conditioning.items()},
        )
        with self.visiting("text"):
            read = self.encode_tokens([self.tokenize("a b c")])
        outputs = (output_BCHW, read["embedding"], read["pooled"])
        return torch.cat([output.flatten().cpu() for output in outputs])

    def load_file(self, path: Path) -> None:
        self.encoders.keep(*TEXT_ENCODERS)
        pipeline = self._pipeline(
            text_encoder=self.text_encoder, text_encoder_2=self.text_encoder_2
        )
        folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
        pipeline.load_lora_weights(str(folder), weight_name=file, local_files_only=True)

    def parts(self) -> Mapping[str, Any]:
        self.encoders.keep("vae", *TEXT_ENCODERS)
        return {
            **self.adapted,
            "vae": self.vae,
            "tokenizer": self.tokenizer,
            "tokenizer_2": self.tokenizer_2,
            "scheduler": self.scheduler,
        }

    def save(self, folder: Path) -> None:
        self.encoders.keep("vae", *TEXT_ENCODERS)
        pipeline = self._pipeline(
            text_encoder=self.text_encoder, text_encoder_2=self.text_encoder_2
        )
        pipeline.save_pretrained(str(folder))

    def webui_name(self, component: str, path: str) -> str:
        return unet_layers.webui_name(PREFIXES[component], path, is_text=component != "unet")

    def metadata(self) -> dict[str, str]:
        return {
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": "False",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            **prediction.metadata(self.prediction, self.scheduler),
        }

    def visiting(self, encoder: Encoder) -> AbstractContextManager[None]:
        return self.encoders.visiting(*PARTS[encoder])

    def keep_on_device(self, encoder: Encoder) -> None:
        self.encoders.keep_on_device(*PARTS[encoder])

    def _told_of(self, request: DrawRequest) -> Sequence[dict[str, torch.Tensor]]:
        texts = (request.prompt, request.negative_prompt)
        return self.encoders.asked(
            PARTS["text"], texts, lambda: clip_text.told(request, self.tokenize, self._encode)
        )

    @torch.no_grad()
    def _encode(self, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with self.visiting("text"):
            conditioning = self.encode_tokens([tokens])
        return {name: tensor[0].cpu() for name, tensor in conditioning.items()}

    def _try_out(self) -> Prediction | None:
        """What the UNet predicts, by its answer to pure noise and an empty prompt."""
        device = self.unet.device
        size = (self.native_size, self.native_size)
        row = self.encode_prompt("") | self.frame(Framing(size, (0, 0), size))
        conditioning = {
            name: tensor.to(device) for name, tensor in self.collate([row, row]).items()
        }
        timesteps_B = torch.full((2,), self.last_timestep, device=device)

        def denoise(noise_BCHW: torch.Tensor) -> torch.Tensor:
            with self.compute.autocast():
                return self.predict(noise_BCHW.to(device), timesteps_B, conditioning)

        return prediction.try_out(denoise, self.unet.config.in_channels, self.latent_size)

    def _pipeline(self, **encoders: nn.Module) -> StableDiffusionXLPipeline:
        """diffusers' pipeline around the model. Its UNet steps run in the run's precision; prompts
        are encoded and latents decoded here, in float32."""
        pipeline = StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=encoders.get("text_encoder"),
            text_encoder_2=encoders.get("text_encoder_2"),
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            force_zeros_for_empty_prompt=self.zeros_for_empty,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load(
    found: Signature, compute: Compute, options: Options, *, resting: bool = False
) -> StableDiffusionXL:
    """Read a diffusers folder or an original single file. No network, no pickle.

    `resting`: whether the encoders lie in memory only while they are needed."""
    parts, encoders = source.load(found, compute, options, resting=resting)
    zeros_for_empty = True
    if found.layout == "diffusers":
        index: Mapping[str, Any] = read_json(found.path / "model_index.json")
        zeros_for_empty = index.get("force_zeros_for_empty_prompt", True)
    said = prediction.said_by(found, parts["scheduler"])
    return StableDiffusionXL(
        parts, compute, options, said, encoders, zeros_for_empty=zeros_for_empty
    )
