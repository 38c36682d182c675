"""Stable Diffusion 1.x and 2.x: load, encode, predict, draw, and the names their LoRA files use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL.Image import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

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
from lora_scripts.models.signature import Signature

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
PARTS: Mapping[Encoder, Sequence[str]] = {"image": ["vae"], "text": ["text_encoder"]}
# family and prediction -> ss_base_model_version, modelspec.architecture
VERSIONS: Mapping[tuple[str, Prediction], tuple[str, str]] = {
    ("sd1", "epsilon"): ("sd_v1", "stable-diffusion-v1"),
    ("sd1", "v_prediction"): ("sd_v1", "stable-diffusion-v1"),
    ("sd2", "epsilon"): ("sd_v2", "stable-diffusion-v2-512"),
    ("sd2", "v_prediction"): ("sd_v2_v", "stable-diffusion-v2-768-v"),
}


class StableDiffusion:
    """An SD1.x or SD2.x model in memory: the UNet in the run's precision, the rest in float32.

    The encoders visit the device only while they are needed, from the CPU or from the disk; one
    that is used in every step is kept there (`keep_on_device`). A text encoder that is trained is
    held in float32, too, and computes under the loop's autocast.
    """

    def __init__(
        self,
        name: Literal["sd1", "sd2"],
        parts: Mapping[str, Any],
        compute: Compute,
        options: Options,
        said: prediction.Said,
        encoders: Encoders | None = None,
    ) -> None:
        """`encoders`: has vae and text encoder in charge; without it they stay in memory."""
        unet: UNet2DConditionModel = parts["unet"]
        self.name = name
        self.unet = unet.to(compute.home).requires_grad_(False).eval()
        self.vae: AutoencoderKL = parts["vae"]
        latents.check(self.vae)
        self.text_encoder: CLIPTextModel = parts["text_encoder"]
        if encoders is None:
            encoders = Encoders(compute.device)
            encoders.add("vae", self.vae)
            encoders.add("text_encoder", self.text_encoder)
        self.encoders = encoders
        self.tokenizer: CLIPTokenizer = parts["tokenizer"]
        self.compute = compute
        self.options = options
        self.adapted: Mapping[str, nn.Module] = {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
        }
        clip_text.check_skip({"text_encoder": self.text_encoder}, options.clip_skip)
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
        reading = clip_text.reading_of([self.tokenizer], self.options)
        return self.encoders.content_id("text_encoder", *reading)

    def encode_image(self, pixels_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self.visiting("image"):
            return latents.encode(self.vae, pixels_CHW)

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        return self._encode(self.tokenize(prompt))

    def tokenize(self, prompt: str) -> dict[str, torch.Tensor]:
        most = self.options.max_caption_tokens
        return {"text_encoder": clip_text.tokenize(self.tokenizer, prompt, most)}

    def encode_tokens(self, prompts: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        ids = [prompt["text_encoder"] for prompt in prompts]
        ids_PS = torch.cat(ids).to(self.text_encoder.device)
        states_PSD = clip_text.last_states(
            self.text_encoder, ids_PS, skip=self.options.clip_skip or 1
        )
        return self.collate([{"embedding": e} for e in clip_text.laid_out(states_PSD, ids)])

    def collate(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        return clip_text.collate(rows)

    def frame(self, framing: Framing) -> dict[str, torch.Tensor]:
        return {}

    def predict(
        self, noisy_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return unet_layers.denoise(self.unet, noisy_BCHW, timesteps_B, conditioning)

    @torch.no_grad()
    def draw(self, request: DrawRequest) -> Image:
        # Without a text encoder the pipeline takes the UNet's dtype for everything it computes.
        pipeline = self._pipeline(text_encoder=None)
        prompt_SD, negative_SD = (
            told["embedding"].to(self.compute.device, self.unet.dtype)
            for told in self._told_of(request)
        )
        with self.compute.autocast():
            latents_BCHW = pipeline(
                prompt_embeds=prompt_SD[None],
                negative_prompt_embeds=negative_SD[None],
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
        self.text_encoder.activation_checkpointing_enable({"use_reentrant": False})

    def units(self, component: str) -> Sequence[nn.Module]:
        return unet_layers.units(self.adapted[component])

    def probe(self) -> torch.Tensor:
        source = torch.Generator().manual_seed(0)
        side, config = self.probe_side, self.unet.config
        noisy_BCHW = torch.randn(1, config.in_channels, side, side, generator=source)
        tokens = self.tokenizer.model_max_length
        embedding_BSD = torch.randn(1, tokens, config.cross_attention_dim, generator=source)
        device = self.compute.device
        output_BCHW = self.predict(
            noisy_BCHW.to(device),
            torch.tensor([len(self.alphas_cumprod_T) // 2], device=device),
            {"embedding": embedding_BSD.to(device)},
        )
        with self.visiting("text"):
            states = self.encode_tokens([self.tokenize("a b c")])["embedding"]
        return torch.cat([output_BCHW.flatten().cpu(), states.flatten().cpu()])

    def load_file(self, path: Path) -> None:
        self.encoders.keep("text_encoder")
        pipeline = self._pipeline(text_encoder=self.text_encoder)
        folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
        pipeline.load_lora_weights(str(folder), weight_name=file, local_files_only=True)

    def parts(self) -> Mapping[str, Any]:
        self.encoders.keep("vae", "text_encoder")
        return {
            **self.adapted,
            "vae": self.vae,
            "tokenizer": self.tokenizer,
            "scheduler": self.scheduler,
        }

    def save(self, folder: Path) -> None:
        self.encoders.keep("vae", "text_encoder")
        self._pipeline(text_encoder=self.text_encoder).save_pretrained(str(folder))

    def webui_name(self, component: str, path: str) -> str:
        return unet_layers.webui_name(PREFIXES[component], path, is_text=component != "unet")

    def metadata(self) -> dict[str, str]:
        version, architecture = VERSIONS[self.name, self.prediction]
        return {
            "ss_base_model_version": version,
            "ss_v2": str(self.name == "sd2"),
            "modelspec.architecture": f"{architecture}/lora",
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
        embedding_SD = self.encode_prompt("")["embedding"].to(device)
        conditioning = {"embedding": torch.stack([embedding_SD] * 2)}
        timesteps_B = torch.full((2,), self.last_timestep, device=device)

        def denoise(noise_BCHW: torch.Tensor) -> torch.Tensor:
            with self.compute.autocast():
                return self.predict(noise_BCHW.to(device), timesteps_B, conditioning)

        return prediction.try_out(denoise, self.unet.config.in_channels, self.latent_size)

    def _pipeline(self, text_encoder: CLIPTextModel | None) -> StableDiffusionPipeline:
        """diffusers' pipeline around the model. Its UNet steps run in the run's precision; prompts
        are encoded and latents decoded here, in float32."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load(
    found: Signature, compute: Compute, options: Options, *, resting: bool = False
) -> StableDiffusion:
    """Read a diffusers folder or an original single file. No network, no pickle.

    `resting`: whether the encoders lie in memory only while they are needed."""
    parts, encoders = source.load(found, compute, options, resting=resting)
    said = prediction.said_by(found, parts["scheduler"])
    assert found.family != "sdxl"
    return StableDiffusion(found.family, parts, compute, options, said, encoders)
