"""Train the small text-to-image model that ships in `assets/demo/model`.

    python scripts/demo_drawings.py draw
    python scripts/build_demo_model.py [--vae-minutes 15] [--unet-minutes 85]

Two stages, a VAE and then a UNet with its text encoder, each as long as its budget of training
minutes. Checkpoints go to `build/demo_model/`; the same command goes on from the last one. Every
`--grid-minutes` the EMA weights draw a grid there; late enough in the second stage they are also
written to `--out` in the diffusers layout.

Shapes: N pictures, B batch, C channels, H W height and width, L tokens.
"""

import argparse
import copy
import csv
import json
import math
import random
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from demo_drawings import BASE_STYLES, with_article, words
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NOUN_LIST = """
apple banana cherries grapes lemon peach pear pineapple strawberry watermelon orange tomato
eggplant corn carrot avocado mushroom bread croissant cheese egg hamburger french-fries hot-dog
pizza sushi donut cookie birthday-cake cake candy lollipop ice-cream-cone popcorn beer wine-glass
cocktail coffee chicken-leg cat dog mouse rabbit fox bear panda koala tiger lion cow pig frog
monkey penguin bird duck owl horse unicorn bee butterfly snail ladybug spider turtle snake octopus
crab fish dolphin whale shark elephant camel rooster cactus pine-tree tree palm-tree rose tulip
sunflower moon star sun cloud rainbow umbrella snowflake snowman fire lightning volcano globe
balloon gift christmas-tree pumpkin soccer-ball basketball baseball trophy game-controller dice
guitar violin trumpet saxophone piano microphone headphones telephone phone laptop camera
television alarm-clock watch hourglass light-bulb candle magnifying-glass key lock hammer scissors
pencil open-book envelope crown glasses t-shirt dress high-heel diamond bomb anchor bell car bus
fire-truck truck tractor bicycle motorcycle airplane helicopter rocket sailboat ship train house
castle ghost skull robot alien smiley heart
"""
NOUNS = tuple(NOUN_LIST.split())
WORDINGS_WITH_STYLE = (
    "{noun}, {style} style",
    "{a_noun}, {style} style",
    "a drawing of {a_noun} in {style} style",
    "a drawing of {a_noun}, {style} style",
    "{a_noun} in {style} style",
    "a {style} style drawing of {a_noun}",
    "{style} {noun}",
)
WORDINGS = ("{noun}", "{a_noun}", "a drawing of {a_noun}", "a picture of {a_noun}")
CAPTION_DROPPED = 0.10
STYLE_UNNAMED = 0.30
TOKENS = 24
VOCABULARY = 1800

GRID_NOUNS = (
    "apple",
    "panda",
    "pizza",
    "house",
    "car",
    "airplane",
    "fish",
    "umbrella",
    "guitar",
    "rocket",
)
GRID_STYLES = ("noto", "firefox", "fluent", "twemoji")
GUIDANCE = 2.5
SAMPLING_STEPS = 25

BATCH = 32
VAE_LEARNING_RATE = 2e-3
UNET_LEARNING_RATE = 8e-4
WARM_UP_STEPS = 200
EMA_DECAY = 0.999
KL_WEIGHT = 2e-4
GREY_SHARE = 0.12  # of each batch is shown without colour, and its captions say so
LAST_TIMESTEP_ALONE = 0.03  # this first share of the budget is spent only where all is noise
LAST_TIMESTEP_SHARE = 0.25  # and afterwards this share of each batch
TEXT_IN_TIME_FADES = (0.475, 0.6)  # between these shares of the budget; see FadingText
LOG_STEPS = 100
CHECKPOINT_SECONDS = 150


def main() -> None:
    """Run the stages that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drawings", type=Path, default=Path("build/drawings"))
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--out", type=Path, default=Path("assets/demo/model"))
    parser.add_argument("--vae-minutes", type=float, default=15)
    parser.add_argument("--unet-minutes", type=float, default=85)
    parser.add_argument("--grid-minutes", type=float, default=8)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)
    vae = train_vae(arguments)
    train_unet(arguments, vae)


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawings:
    """Pictures as bytes, each with its name and style."""

    names: list[str]
    styles: list[str]
    pixels_NCHW: Tensor


def read_drawings(folder: Path, names: tuple[str, ...] | None) -> Drawings:
    """Read the drawings of the base's styles; of these names only, if names are given."""
    with (folder / "drawings.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["style"] in BASE_STYLES]
    if names is not None:
        rows = [row for row in rows if row["name"] in names]
    pictures = [np.array(Image.open(folder / row["file"]).convert("RGB")) for row in rows]
    pixels_NCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return Drawings([row["name"] for row in rows], [row["style"] for row in rows], pixels_NCHW)


def unit_range(pixels_NCHW: Tensor) -> Tensor:
    """Bytes to floats in [-1, 1]."""
    return pixels_NCHW.float() / 127.5 - 1


def batches(count: int) -> Iterator[Tensor]:
    """Endless shuffled batches of indices; every picture once before any comes twice."""
    while True:
        yield from torch.randperm(count)[: count // BATCH * BATCH].split(BATCH)


def fill(wording: str, name: str, style: str) -> str:
    """Put a name and a style into a wording."""
    noun = words(name)
    return wording.format(noun=noun, a_noun=with_article(noun), style=style)


def caption(name: str, style: str, grey: bool) -> str:
    """Say what is drawn, and mostly how, in one of several wordings; sometimes say nothing."""
    name = f"grey {name}" if grey else name
    draw = random.random()
    if draw < CAPTION_DROPPED:
        return ""
    wordings = WORDINGS if draw < CAPTION_DROPPED + STYLE_UNNAMED else WORDINGS_WITH_STYLE
    return fill(random.choice(wordings), name, style)


# --- budget, checkpoints --------------------------------------------------------------------------


@dataclass
class Budget:
    """Training time: the sum of the steps' own seconds, so that a paused process loses nothing."""

    seconds: float
    spent: float = 0.0
    step: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(self.spent / self.seconds, 1.0)

    def tick(self) -> None:
        """Count one step; one that took longer than two seconds was paused and counts as two."""
        now = time.monotonic()
        self.spent += min(now - self.started, 2.0)
        self.started, self.step = now, self.step + 1

    def learning_rate(self, peak: float) -> float:
        """Linear warm-up over steps, cosine to zero over the budget."""
        warm_up = min((self.step + 1) / WARM_UP_STEPS, 1.0)
        return peak * warm_up * (0.5 + 0.5 * math.cos(math.pi * self.progress))


class Every:
    """True once whenever a budget has spent another `seconds`."""

    def __init__(self, seconds: float, spent: float):
        self.seconds, self.next = seconds, spent + seconds

    def due(self, spent: float) -> bool:
        """Say whether it is time, and if so wait for the next one."""
        if spent < self.next:
            return False
        self.next = spent + self.seconds
        return True


def save_checkpoint(file: Path, budget: Budget, parts: dict) -> None:
    """Write the parts' state dicts and the budget so that a kill leaves the old file or the new."""
    state = {name: part.state_dict() for name, part in parts.items()}
    temporary = file.with_suffix(".part")
    torch.save(state | {"spent": budget.spent, "step": budget.step}, temporary)
    temporary.replace(file)


def load_checkpoint(file: Path, budget: Budget, parts: dict) -> None:
    """Bring parts and budget to where `file` left them; without a file they stay as they are."""
    if not file.exists():
        return
    state = torch.load(file, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    budget.spent, budget.step = state["spent"], state["step"]


class Ema:
    """A moving average of a module's parameters, held in a copy of the module."""

    def __init__(self, module: nn.Module, averaged: nn.Module):
        averaged.load_state_dict(module.state_dict())
        self.source, self.averaged = list(module.parameters()), list(averaged.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the module, faster in the first steps."""
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averaged, self.source, 1 - decay)


def optimise(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """One clipped AdamW step."""
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def log_loss(file: Path, budget: Budget, loss: float) -> None:
    """Append step, training minutes and loss as a JSON line, and show it."""
    minutes = round(budget.spent / 60, 2)
    line = json.dumps({"step": budget.step, "minutes": minutes, "loss": round(loss, 5)})
    print(line, flush=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


# --- first stage: VAE -----------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """64x64 pixels to 16x16x4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def augment(pixels_BCHW: Tensor) -> Tensor:
    """Mirror, shift by up to four pixels, permute the colours of some and take them from others."""
    if random.random() < 0.5:
        pixels_BCHW = pixels_BCHW.flip(3)
    padded_BCHW = F.pad(pixels_BCHW, (4, 4, 4, 4), value=1.0)
    top, left = random.randrange(9), random.randrange(9)
    pixels_BCHW = padded_BCHW[:, :, top : top + 64, left : left + 64].clone()
    eighth = len(pixels_BCHW) // 8
    pixels_BCHW[:eighth] = pixels_BCHW[:eighth, torch.randperm(3)]
    pixels_BCHW[eighth : 2 * eighth] = pixels_BCHW[eighth : 2 * eighth].mean(1, keepdim=True)
    return pixels_BCHW


def edges(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, across and down."""
    return pixels_BCHW.diff(dim=3), pixels_BCHW.diff(dim=2)


def reconstruction_loss(drawn_BCHW: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """L1 over pixels plus L1 over edges."""
    loss = F.l1_loss(drawn_BCHW, pixels_BCHW)
    for drawn, wanted in zip(edges(drawn_BCHW), edges(pixels_BCHW), strict=True):
        loss = loss + 0.5 * F.l1_loss(drawn, wanted)
    return loss


def train_vae(arguments: argparse.Namespace) -> AutoencoderKL:
    """Train the VAE on every drawing there is, or take the finished one; returns its EMA."""
    vae, averaged = new_vae(), new_vae().requires_grad_(False)
    ema = Ema(vae, averaged)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), fused=True)
    budget = Budget(arguments.vae_minutes * 60)
    parts = {"vae": vae, "averaged": averaged, "optimizer": optimizer}
    file = arguments.work / "vae.pt"
    load_checkpoint(file, budget, parts)
    if budget.progress == 1:
        return averaged.eval()
    drawings = read_drawings(arguments.drawings, None)
    save = Every(CHECKPOINT_SECONDS, budget.spent)
    for index_B in batches(len(drawings.names)):
        pixels_BCHW = augment(unit_range(drawings.pixels_NCHW[index_B]))
        loss, kl = vae_losses(vae, pixels_BCHW)
        optimise(optimizer, loss + KL_WEIGHT * kl, budget.learning_rate(VAE_LEARNING_RATE))
        ema.update(budget.step)
        budget.tick()
        if budget.step % LOG_STEPS == 0:
            log_loss(arguments.work / "vae.jsonl", budget, loss.item())
        if save.due(budget.spent) or budget.progress == 1:
            save_checkpoint(file, budget, parts)
            draw_reconstructions(averaged, drawings, arguments.work / "vae.png")
        if budget.progress == 1:
            return averaged.eval()


def vae_losses(vae: AutoencoderKL, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction loss, and KL divergence from the unit normal per latent number."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels_BCHW).latent_dist
        drawn_BCHW = vae.decode(posterior.sample()).sample.float()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return reconstruction_loss(drawn_BCHW, pixels_BCHW), kl


@torch.no_grad()
def draw_reconstructions(vae: AutoencoderKL, drawings: Drawings, file: Path) -> None:
    """Eighty drawings, each above what the VAE makes of it."""
    pixels_BCHW = unit_range(drawings.pixels_NCHW[:: len(drawings.names) // 80][:80])
    drawn_BCHW = vae.decode(vae.encode(pixels_BCHW).latent_dist.mean).sample
    rows = [
        torch.cat([row, other], 2)
        for row, other in zip(pixels_BCHW.split(16), drawn_BCHW.split(16), strict=True)
    ]
    sheet_CHW = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    to_image(sheet_CHW).save(file)


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """Floats in [-1, 1] to a PIL image."""
    levels_CHW = (pixels_CHW.clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels_CHW.round().byte().permute(1, 2, 0).numpy())


# --- second stage: UNet and text encoder ----------------------------------------------------------


def standardise_latents(vae: AutoencoderKL, pixels_NCHW: Tensor) -> Tensor:
    """Make the VAE's latents of these pictures mean 0 and deviation 1 in each channel.

    The change of scale goes into `quant_conv` and `post_quant_conv`; what the VAE reconstructs
    stays the same. Returns the standardised latents, (N, 4, 16, 16).
    """
    latents_NCHW = encode(vae, pixels_NCHW)
    mean_C = latents_NCHW.mean((0, 2, 3))
    deviation_C = latents_NCHW.std((0, 2, 3))
    count = len(mean_C)
    with torch.no_grad():
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:count] /= deviation_C[:, None, None, None]
        quant.bias[:count] = (quant.bias[:count] - mean_C) / deviation_C
        quant.bias[count:] -= 2 * deviation_C.log()
        post.bias += post.weight[:, :, 0, 0] @ mean_C
        post.weight *= deviation_C[None, :, None, None]
    return encode(vae, pixels_NCHW)


def without_colour(pixels_NCHW: Tensor) -> Tensor:
    """The same pictures in grey."""
    return pixels_NCHW.float().mean(1, keepdim=True).round().byte().expand_as(pixels_NCHW)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels_NCHW: Tensor) -> Tensor:
    """Means of the latents of pictures given as bytes, (N, 4, H/4, W/4)."""
    parts = pixels_NCHW.split(64)
    return torch.cat([vae.encode(unit_range(part)).latent_dist.mean for part in parts])


def new_tokenizer(names: list[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with merges learnt on captions, so that each of the nouns is one token.

    As in CLIP the vocabulary holds every byte, every byte at a word's end, what the merges make,
    and last the two special tokens: no text is unknown.
    """
    wordings = [*WORDINGS, *WORDINGS_WITH_STYLE]
    texts = [fill(wording, name, BASE_STYLES[0]) for name in names for wording in wordings]
    texts += [fill("{style} {noun}", name, style) for name in NOUNS * 20 for style in BASE_STYLES]
    learnt = CLIPTokenizer().train_new_from_iterator([texts], VOCABULARY, show_progress=False)
    merges = json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]
    symbols = sorted(ByteLevel.alphabet())
    entries = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges)]
    entries += [learnt.bos_token, learnt.eos_token]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocabulary, [tuple(pair) for pair in merges], model_max_length=TOKENS)


def load_tokenizer(arguments: argparse.Namespace) -> CLIPTokenizer:
    """The tokenizer of this work folder, made on first use (ties make each training differ)."""
    folder = arguments.work / "tokenizer"
    if not folder.exists():
        names = sorted({*read_drawings(arguments.drawings, None).names})
        new_tokenizer(names).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A three-layer CLIP text model whose token embeddings start at deviation 1."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder


def new_unet(**text_in_time: str | int) -> UNet2DConditionModel:
    """16x16x4 latents; attention to itself and to the text on every level."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(96, 128, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        norm_num_groups=16,
        cross_attention_dim=192,
        attention_head_dim=4,
        **text_in_time,
    )


class FadingText(nn.Module):
    """Diffusers' pooled text in the time embedding, times a weight that training takes to zero.

    With it the UNet listens to the text within minutes. But it is out of reach of a LoRA on
    attention, which then cannot change what the text says about colour; so it goes again.
    """

    def __init__(self, pooled: nn.Module):
        super().__init__()
        self.pooled, self.weight = pooled, 1.0

    def forward(self, text_BLC: Tensor) -> Tensor:
        """What is added to the time embedding, (B, C)."""
        return self.weight * self.pooled(text_BLC)


def new_scheduler() -> DDIMScheduler:
    """SD's betas rescaled so that the last timestep is pure noise; the model predicts velocity."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


class Denoiser(nn.Module):
    """The two modules of the second stage, so that they share one optimizer and one average."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = new_unet(addition_embed_type="text", addition_embed_type_num_heads=4)
        # a third faster on CPUs than torch's fused attention, whose backward is slow at these sizes
        self.unet.set_attn_processor(AttnProcessor())
        self.unet.add_embedding = FadingText(self.unet.add_embedding)
        self.text_encoder = new_text_encoder(tokenizer)

    def forward(self, noisy_BCHW: Tensor, timesteps_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Predict the velocity, (B, C, H, W)."""
        text_BLC = self.text_encoder(tokens_BL).last_hidden_state
        return self.unet(noisy_BCHW, timesteps_B, text_BLC).sample

    def fade(self, progress: float) -> None:
        """Set the weight of the text in the time embedding."""
        start, end = TEXT_IN_TIME_FADES
        self.unet.add_embedding.weight = min(max((end - progress) / (end - start), 0.0), 1.0)


def without_faded(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of the UNet without the text in its time embedding."""
    plain, state = new_unet(), unet.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


def draw_timesteps(count: int, progress: float, last: int) -> Tensor:
    """Timesteps of a batch: at first all the last one, later a share of it, the rest uniform."""
    timesteps_B = torch.randint(0, last, (count,))
    share = 1.0 if progress < LAST_TIMESTEP_ALONE else LAST_TIMESTEP_SHARE
    timesteps_B[: round(share * count)] = last
    return timesteps_B


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids padded to the model's length, (B, L)."""
    padding = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **padding).input_ids


@dataclass(frozen=True)
class Examples:
    """The drawings' latents, with and without colour, and what is said about them."""

    names: list[str]
    styles: list[str]
    coloured_NCHW: Tensor
    grey_NCHW: Tensor

    def draw(self, index_B: Tensor) -> tuple[Tensor, list[str]]:
        """Latents, (B, C, H, W), and captions of a batch; some of it grey."""
        grey_B = torch.rand(len(index_B)) < GREY_SHARE
        latents_BCHW = torch.where(
            grey_B[:, None, None, None], self.grey_NCHW[index_B], self.coloured_NCHW[index_B]
        )
        pairs = zip(index_B.tolist(), grey_B.tolist(), strict=True)
        return latents_BCHW, [caption(self.names[i], self.styles[i], grey) for i, grey in pairs]


def read_examples(folder: Path, vae: AutoencoderKL) -> Examples:
    """Standardise the VAE on the drawings of the nouns and encode them."""
    drawings = read_drawings(folder, NOUNS)
    coloured_NCHW = standardise_latents(vae, drawings.pixels_NCHW)
    grey_NCHW = encode(vae, without_colour(drawings.pixels_NCHW))
    return Examples(drawings.names, drawings.styles, coloured_NCHW, grey_NCHW)


def train_unet(arguments: argparse.Namespace, vae: AutoencoderKL) -> None:
    """Train UNet and text encoder on latents computed once; draw grids and export on the way."""
    examples = read_examples(arguments.drawings, vae)
    tokenizer = load_tokenizer(arguments)
    model, averaged = Denoiser(tokenizer), Denoiser(tokenizer).requires_grad_(False).eval()
    ema = Ema(model, averaged)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    budget = Budget(arguments.unet_minutes * 60)
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    file = arguments.work / "unet.pt"
    load_checkpoint(file, budget, parts)
    torch.manual_seed(budget.step)
    random.seed(budget.step)
    scheduler = new_scheduler()
    save = Every(CHECKPOINT_SECONDS, budget.spent)
    show = Every(arguments.grid_minutes * 60, budget.spent)
    losses = deque(maxlen=LOG_STEPS)
    for index_B in batches(len(examples.names)):
        if budget.progress == 1:
            break
        model.fade(budget.progress)
        latents_BCHW, captions = examples.draw(index_B)
        tokens_BL = tokenise(tokenizer, captions)
        loss = velocity_loss(model, scheduler, latents_BCHW, tokens_BL, budget.progress)
        optimise(optimizer, loss, budget.learning_rate(UNET_LEARNING_RATE))
        ema.update(budget.step)
        budget.tick()
        losses.append(loss.item())
        if budget.step % LOG_STEPS == 0:
            log_loss(arguments.work / "unet.jsonl", budget, sum(losses) / len(losses))
        if save.due(budget.spent):
            save_checkpoint(file, budget, parts)
        if show.due(budget.spent):
            averaged.fade(budget.progress)
            show_progress(arguments, new_pipeline(vae, averaged, tokenizer), budget)
    save_checkpoint(file, budget, parts)
    averaged.fade(budget.progress)
    export(new_pipeline(vae, averaged, tokenizer), arguments.out)
    draw_grid(load_pipeline(arguments.out), arguments.out.parent / "grid.png")


def velocity_loss(
    model: Denoiser,
    scheduler: DDIMScheduler,
    latents_BCHW: Tensor,
    tokens_BL: Tensor,
    progress: float,
) -> Tensor:
    """Mean squared error of the predicted velocity."""
    last = scheduler.config.num_train_timesteps - 1
    timesteps_B = draw_timesteps(len(latents_BCHW), progress, last)
    noise_BCHW = torch.randn_like(latents_BCHW)
    noisy_BCHW = scheduler.add_noise(latents_BCHW, noise_BCHW, timesteps_B)
    velocity_BCHW = scheduler.get_velocity(latents_BCHW, noise_BCHW, timesteps_B)
    with torch.autocast("cpu", torch.bfloat16):
        predicted_BCHW = model(noisy_BCHW, timesteps_B, tokens_BL)
    return F.mse_loss(predicted_BCHW.float(), velocity_BCHW)


# --- what is shown and shipped --------------------------------------------------------------------


def new_pipeline(
    vae: AutoencoderKL, model: Denoiser, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The parts as a Stable Diffusion pipeline; its UNet still has what fades."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=model.unet,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """What `export` wrote, in single precision."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def show_progress(
    arguments: argparse.Namespace, pipeline: StableDiffusionPipeline, budget: Budget
) -> None:
    """Draw a grid into the work folder, and export once the text has faded from the time."""
    draw_grid(pipeline, arguments.work / f"grid_{round(budget.spent / 60):03d}.png")
    if budget.progress > TEXT_IN_TIME_FADES[1]:
        export(pipeline, arguments.out)
    budget.started = time.monotonic()


def draw_grid(pipeline: StableDiffusionPipeline, file: Path) -> None:
    """Ten concepts across, four styles down, each picture from its own fixed seed."""
    cell, label = 128, 20
    size = (cell * len(GRID_NOUNS) + 64, cell * len(GRID_STYLES) + label)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, style in enumerate(GRID_STYLES):
        prompts = [f"a drawing of {with_article(noun)} in {style} style" for noun in GRID_NOUNS]
        seeds = [torch.Generator().manual_seed(100 * row + i) for i in range(len(prompts))]
        pictures = pipeline(
            prompts, num_inference_steps=SAMPLING_STEPS, guidance_scale=GUIDANCE, generator=seeds
        ).images
        pen.text((4, label + row * cell + cell // 2), style, fill="black")
        for column, picture in enumerate(pictures):
            large = picture.resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(large, (64 + column * cell, label + row * cell))
            pen.text((64 + column * cell + 40, 4), GRID_NOUNS[column], fill="black")
    sheet.save(file, optimize=True)


def export(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Write the pipeline in half precision next to `out`, then swap the folders."""
    temporary, old = out.with_name(out.name + ".part"), out.with_name(out.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    half = copy.deepcopy({"vae": pipeline.vae, "text_encoder": pipeline.text_encoder})
    half["unet"] = without_faded(pipeline.unet)
    parts = pipeline.components | {name: part.half() for name, part in half.items()}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(temporary)
    pipeline.tokenizer.backend_tokenizer.model.save(str(temporary / "tokenizer"))
    load_as_float32(temporary / "text_encoder" / "config.json")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def load_as_float32(config: Path) -> None:
    """Let transformers load the text encoder as diffusers loads the rest when no dtype is named."""
    content = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
