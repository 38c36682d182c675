"""Stable Diffusion 1.x: load, encode, predict, draw, and the names its LoRA files use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from lora_scripts.device import Compute
from lora_scripts.errors import user_error
from lora_scripts.models import unet as unet_layers
from lora_scripts.models.family import (
    Conditioning,
    DrawRequest,
    Encoder,
    Framing,
    Options,
    Prediction,
    Preset,
)
from lora_scripts.models.sd_single_file import Parts, load_single_file
from lora_scripts.models.signature import Signature

SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


class StableDiffusion:
    """An SD1.x model in memory. The UNet is held in the run's precision, the encoders in float32.

    The encoders stay on the CPU and visit the device only while they are needed.
    """

    pixel_multiple: int

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        compute: Compute,
    ) -> None:
        self.unet = unet.to(compute.device).requires_grad_(False).eval()
        self.vae = vae.float().requires_grad_(False).eval()
        self.text_encoder = text_encoder.float().requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.compute = compute
        self.adapted: Mapping[str, nn.Module] = {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
        }
        self.prediction: Prediction = _prediction(scheduler)
        self.alphas_cumprod_T = _noise_schedule(scheduler)
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.native_size = unet.config.sample_size * self.vae_factor
        self.pixel_multiple = self.vae_factor * 2 ** (len(unet.config.block_out_channels) - 1)

    def targets(self, chosen: Preset | Sequence[str]) -> Mapping[str, Sequence[str]]:
        return unet_layers.targets(self.adapted, chosen)

    @cached_property
    def denoiser_id(self) -> str:
        return content_id(self.unet)

    @cached_property
    def image_encoder_id(self) -> str:
        return content_id(self.vae)

    @cached_property
    def text_encoder_id(self) -> str:
        return content_id(self.text_encoder, str(sorted(self.tokenizer.get_vocab().items())))

    @torch.no_grad()
    def encode_image(self, pixels_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self.visiting("image"):
            latent = self.vae.encode(pixels_CHW[None].to(self.vae.device)).latent_dist
        scale = self.vae.config.scaling_factor
        return latent.mean[0].cpu() * scale, latent.std[0].cpu() * scale

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        with self.visiting("text"):
            conditioning = self.encode_tokens([self.tokenize(prompt)])
        return {name: tensor[0].cpu() for name, tensor in conditioning.items()}

    def tokenize(self, prompt: str) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"text_encoder": tokens.input_ids}

    def encode_tokens(self, prompts: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        ids_BS = torch.cat([prompt["text_encoder"] for prompt in prompts])
        ids_BS = ids_BS.to(self.text_encoder.device)
        return {"embedding": self.text_encoder(ids_BS).last_hidden_state}

    def collate(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def frame(self, framing: Framing) -> dict[str, torch.Tensor]:
        return {}

    def predict(
        self, noisy_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        output: torch.Tensor = self.unet(
            noisy_BCHW.to(self.unet.dtype),
            timesteps_B,
            encoder_hidden_states=conditioning["embedding"].to(self.unet.dtype),
            return_dict=False,
        )[0]
        return output

    @torch.no_grad()
    def draw(self, request: DrawRequest) -> Image.Image:
        # Without a text encoder the pipeline takes the UNet's dtype for everything it computes.
        pipeline = self._pipeline(text_encoder=None)
        prompt_SD, negative_SD = (
            self.encode_prompt(text)["embedding"].to(self.compute.device, self.unet.dtype)
            for text in (request.prompt, request.negative_prompt)
        )
        with self.visiting("image"):
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
            scale = self.vae.config.scaling_factor
            pixels_BCHW = self.vae.decode(latents_BCHW.float() / scale).sample
        return _to_image(pixels_BCHW[0])

    def checkpoint_gradients(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def probe(self) -> torch.Tensor:
        source = torch.Generator().manual_seed(0)
        side = 2 * self.pixel_multiple // self.vae_factor
        config = self.unet.config
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
        pipeline = self._pipeline(text_encoder=self.text_encoder)
        folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
        pipeline.load_lora_weights(str(folder), weight_name=file, local_files_only=True)

    def webui_name(self, component: str, path: str) -> str:
        # transformers >= 5.6 has no `text_model.` level in CLIPTextModel; the WebUIs expect it.
        if component == "text_encoder" and not path.startswith("text_model."):
            path = f"text_model.{path}"
        return f"{PREFIXES[component]}_{path.replace('.', '_')}"

    def metadata(self) -> dict[str, str]:
        return {
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[
                self.prediction
            ],
        }

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

    @contextmanager
    def visiting(self, encoder: Encoder) -> Iterator[None]:
        module = {"image": self.vae, "text": self.text_encoder}[encoder]
        home = module.device
        module.to(self.compute.device)
        try:
            yield
        finally:
            module.to(home)

    def keep_on_device(self, encoder: Encoder) -> None:
        {"image": self.vae, "text": self.text_encoder}[encoder].to(self.compute.device)


def load(found: Signature, compute: Compute, options: Options) -> StableDiffusion:
    """Read a diffusers folder or an original single file. No network, no pickle."""
    match found.layout:
        case "diffusers":
            parts = _load_folder(found.path, found.variant, compute.dtype)
        case "ldm":
            parts = load_single_file(found.path, compute.dtype)
    return StableDiffusion(**parts, compute=compute)


def content_id(module: nn.Module, *more: str) -> str:
    """SHA-256 over a module's tensors, their names and `more`: the key of what it produces."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for text in more:
        digest.update(text.encode("utf-8"))
    return digest.hexdigest()


def _load_folder(path: Path, variant: str | None, dtype: torch.dtype) -> Parts:
    def weights(cls: Any, part: str, dtype: torch.dtype) -> Any:
        return cls.from_pretrained(
            str(path / part),
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
        )

    return {
        "unet": weights(UNet2DConditionModel, "unet", dtype),
        "vae": weights(AutoencoderKL, "vae", torch.float32),
        "text_encoder": weights(CLIPTextModel, "text_encoder", torch.float32),
        "tokenizer": CLIPTokenizer.from_pretrained(str(path / "tokenizer"), local_files_only=True),
        "scheduler": _load_scheduler(path / "scheduler"),
    }


def _load_scheduler(folder: Path) -> SchedulerMixin:
    config = DDPMScheduler.load_config(str(folder), local_files_only=True)
    name = config["_class_name"]
    known = {cls.__name__: cls for cls in SCHEDULERS}
    if name not in known:
        what = f"the scheduler {name} is none of {', '.join(known)}"
        raise user_error(str(folder / "scheduler_config.json"), what)
    return known[name].from_config(config)


def _prediction(scheduler: SchedulerMixin) -> Prediction:
    match scheduler.config.prediction_type:
        case "epsilon":
            return "epsilon"
        case "v_prediction":
            return "v_prediction"
        case other:
            what = f"prediction_type is {other}; this version trains epsilon and v_prediction"
            raise user_error("base_model: scheduler/scheduler_config.json", what)


def _noise_schedule(scheduler: SchedulerMixin) -> torch.Tensor:
    """The training schedule that belongs to a sampler's config (zero terminal SNR included)."""
    alphas_cumprod_T: torch.Tensor = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return alphas_cumprod_T.float()


def _to_image(pixels_CHW: torch.Tensor) -> Image.Image:
    array_HWC = ((pixels_CHW.float().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    return Image.fromarray(array_HWC.to("cpu", torch.uint8).numpy(), mode="RGB")
