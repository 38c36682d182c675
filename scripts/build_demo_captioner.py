"""Train the small BLIP that ships in `assets/demo/captioner`.

    python scripts/demo_drawings.py draw
    python scripts/build_demo_captioner.py [--hold-out STYLE] [--work DIR] [--out DIR]

It learns to say "a drawing of a panda" of the 159 things that the demo's base model knows, from
the drawings of the five base styles, disturbed a lot. No stencil is ever read: that style is what
the captioner is measured on (`benchmarks/demo_captioner.py`). Neither are the 39 drawings of
`is_held_out`, which `<out>_heldout.csv` lists.

Every step draws its batch and its disturbances from a seed of its own, so a run that was stopped
goes on from its last checkpoint in `--work` as if nothing had happened.

The settings were chosen with `--hold-out firefox`: that whole style is left out and its drawings
are named on the way, in colour and in ink. The stencils, and the drawings of `is_held_out`, chose
nothing. The whole run takes half an hour on one CPU core with AVX512-BF16.

Shapes: N pictures, B batch, C channels, H W height and width, L tokens, T patches,
F things, V vocabulary.
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from build_demo_model import (
    CHECKPOINT_SECONDS,
    LOG_STEPS,
    NOUNS,
    Budget,
    Ema,
    Every,
    load_as_float32,
    load_checkpoint,
    log_loss,
    optimise,
    read_drawings,
    save_checkpoint,
)
from demo_disturbances import SIDE, disturb, inked
from demo_drawings import BASE_STYLES, with_article, words, write_csv
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    BlipVisionModel,
)

PATCH = 8
WIDTH, HEADS, VISION_LAYERS, TEXT_LAYERS = 160, 5, 6, 2
TOKENS, SHIPPED_TOKENS = 16, 64  # of a caption: to learn, and there is room for
BATCH = 64
STEPS = 5500
LEARNING_RATE = 1e-3
CAPTION_WEIGHT = 2.0  # of the tokens' loss beside the things'
WARM_UP_STEPS = 150
WEIGHT_DECAY = 0.05
SPREAD = 0.06  # of the first weights; BLIP's own 0.02 is made for five times the width
LABEL_SMOOTHING = 0.1
SCORE_STEPS = 200
WHOLE_WORD = "t-shirt"
PROMPT_WORDS = ("picture", "photo", "in", "style", "the", "and")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def main() -> None:
    """Train from the last checkpoint on, then write the captioner."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drawings", type=Path, default=Path("build/drawings"))
    parser.add_argument("--work", type=Path, default=Path("build/demo_captioner"))
    parser.add_argument("--out", type=Path, default=Path("assets/demo/captioner"))
    parser.add_argument("--hold-out", choices=BASE_STYLES, help="leave this style out, name it")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    examples = read_examples(arguments.drawings, arguments.hold_out)
    export(train(arguments, examples), new_processor(), arguments.out)
    table = arguments.out.with_name(f"{arguments.out.name}_heldout.csv")
    write_held_out(arguments.drawings, table)


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Drawings of the known things to learn from, and some that are never learnt.

    Labels are places in NOUNS.
    """

    pixels_NCHW: Tensor
    label_N: Tensor
    unseen_NCHW: Tensor
    unseen_names: list[str]

    def draw(self) -> tuple[Tensor, Tensor]:
        """A batch of disturbed pictures as the model takes them, (B, 3, H, W), and labels, (B,)."""
        index_B = torch.randint(len(self.label_N), (BATCH,))
        return disturb(self.pixels_NCHW[index_B]), self.label_N[index_B]


def read_examples(folder: Path, hold_out: str | None) -> Examples:
    """Read the base's drawings of the known things; the unseen are of `hold_out`, if given."""
    drawings = read_drawings(folder, NOUNS)
    pairs = list(zip(drawings.names, drawings.styles, strict=True))
    learnt = [i for i, pair in enumerate(pairs) if not is_held_out(*pair) and pair[1] != hold_out]
    unseen = [i for i, pair in enumerate(pairs) if pair[1] == hold_out]
    unseen = unseen or [i for i, pair in enumerate(pairs) if is_held_out(*pair)]
    return Examples(
        drawings.pixels_NCHW[learnt],
        torch.tensor([NOUNS.index(drawings.names[i]) for i in learnt]),
        drawings.pixels_NCHW[unseen],
        [drawings.names[i] for i in unseen],
    )


def is_held_out(name: str, style: str) -> bool:
    """Is this one of the drawings that are kept to measure known things in known styles with?

    One drawing of every fourth known thing, the styles by turns.
    """
    turn, rest = divmod(NOUNS.index(name), 4)
    return rest == 0 and style == BASE_STYLES[turn % len(BASE_STYLES)]


def caption(name: str) -> str:
    """What the captioner says of a thing."""
    return f"a drawing of {with_article(words(name))}"


# --- training -------------------------------------------------------------------------------------


class Namer(nn.Module):
    """The captioner, and beside it a linear layer that names the thing from the vision tower alone.

    The layer is not shipped. It teaches the tower directly, which captions alone do slowly: for the
    tower only one or two of a caption's words are news.
    """

    def __init__(self, tokenizer: BertTokenizer):
        super().__init__()
        self.captioner = BlipForConditionalGeneration(new_config(tokenizer))
        prepare(self.captioner.vision_model)
        self.head = nn.Linear(WIDTH, len(NOUNS))

    def forward(self, pixels_BCHW: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the things, (B, F), and of the captions' tokens, (B, L, V)."""
        said = self.captioner(pixel_values=pixels_BCHW, input_ids=tokens_BL)
        return self.head(said.image_embeds.mean(1)), said.logits


@torch.no_grad()
def prepare(vision: BlipVisionModel) -> None:
    """Start the tower as one that looks at neighbours, which some hundred drawings cannot teach it.

    Positions start as sines; query times key near the identity, so that patches attend to their
    like and, by the sines, to their neighbours; value times projection near minus the identity
    (mimetic initialisation, Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention
    Layers", https://arxiv.org/abs/2305.09828).
    """
    vision.embeddings.position_embedding[0, 1:] = sines(SIDE // PATCH, WIDTH)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        query, key, value = attention.qkv.weight.view(3, HEADS, WIDTH // HEADS, WIDTH)
        for head in range(HEADS):
            left, right = factors(0.7 * noise() + 0.7 * torch.eye(WIDTH), WIDTH // HEADS)
            query[head], key[head] = left.T, right.T
        left, right = factors(0.4 * noise() - 0.4 * torch.eye(WIDTH), WIDTH)
        value.view(WIDTH, WIDTH).copy_(right.T)
        attention.projection.weight.copy_(left)


def noise() -> Tensor:
    """A random square matrix that keeps lengths on average."""
    return torch.randn(WIDTH, WIDTH) / WIDTH**0.5


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two thin matrices of this rank whose product, left times right transposed, is nearest."""
    left, strengths, right = torch.linalg.svd(matrix)
    root = strengths[:rank].sqrt()
    return left[:, :rank] * root, right[:rank].T * root


def sines(side: int, width: int) -> Tensor:
    """Sines and cosines of the row and of the column of each patch, (side * side, width)."""
    frequency = 100.0 ** -torch.linspace(0, 1, width // 4)
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return torch.cat([rows, columns], 1)


def train(arguments: argparse.Namespace, examples: Examples) -> BlipForConditionalGeneration:
    """Train on from the last checkpoint; returns the averaged captioner.

    What a step does depends on its number alone.
    """
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    namer, averaged = Namer(tokenizer), Namer(tokenizer).requires_grad_(False)
    ema = Ema(namer, averaged)
    optimizer = torch.optim.AdamW(
        namer.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    parts = {"model": namer, "averaged": averaged, "optimizer": optimizer}
    file, budget = arguments.work / "captioner.pt", Budget(math.inf)
    load_checkpoint(file, budget, parts)
    save = Every(CHECKPOINT_SECONDS, budget.spent)
    tokens_FL = caption_tokens(tokenizer)
    while budget.step < arguments.steps:
        torch.manual_seed(budget.step)
        pixels_BCHW, label_B = examples.draw()
        loss = naming_loss(namer, pixels_BCHW, label_B, tokens_FL[label_B])
        optimise(optimizer, loss, learning_rate(budget.step, arguments.steps))
        ema.update(budget.step)
        budget.tick()
        done = budget.step == arguments.steps
        if budget.step % LOG_STEPS == 0:
            log_loss(arguments.work / "captioner.jsonl", budget, loss.item())
        if budget.step % SCORE_STEPS == 0 or done:
            print(json.dumps({"step": budget.step} | scores(averaged, tokenizer, examples)))
            budget.started = time.monotonic()
        if save.due(budget.spent) or done:
            save_checkpoint(file, budget, parts)
    return averaged.captioner.eval()


def naming_loss(namer: Namer, pixels_BCHW: Tensor, label_B: Tensor, tokens_BL: Tensor) -> Tensor:
    """Cross entropy of the things, and of the captions' tokens after [DEC]."""
    with torch.autocast("cpu", torch.bfloat16):
        things_BF, tokens_BLV = namer(pixels_BCHW, tokens_BL)
    things = F.cross_entropy(things_BF.float(), label_B, label_smoothing=LABEL_SMOOTHING)
    tokens = F.cross_entropy(
        tokens_BLV[:, :-1].float().flatten(0, 1),
        tokens_BL[:, 1:].flatten(),
        ignore_index=SPECIAL.index("[PAD]"),
        label_smoothing=LABEL_SMOOTHING,
    )
    return things + CAPTION_WEIGHT * tokens


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, cosine to zero."""
    warm_up = min((step + 1) / WARM_UP_STEPS, 1.0)
    return LEARNING_RATE * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def caption_tokens(tokenizer: BertTokenizer) -> Tensor:
    """Ids of each known thing's caption, from [DEC] to [SEP], padded, (F, L)."""
    captions = [caption(noun) for noun in NOUNS]
    tokens_FL = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    tokens_FL[:, 0] = tokenizer.bos_token_id
    return tokens_FL


@torch.no_grad()
def scores(namer: Namer, tokenizer: BertTokenizer, examples: Examples) -> dict[str, float]:
    """Shares of the unseen drawings that are named rightly, in colour and inked at random.

    By the captions, and by the layer beside them.
    """
    torch.manual_seed(0)
    ink_NCHW = 1 - examples.unseen_NCHW.float() / 255
    wanted = [caption(name) for name in examples.unseen_names]
    found = {}
    for manner, drawn_NCHW in (("coloured", ink_NCHW), ("inked", inked(ink_NCHW))):
        tokens_NL = namer.captioner.generate(-2 * drawn_NCHW, max_new_tokens=TOKENS - 2)
        said = tokenizer.batch_decode(tokens_NL, skip_special_tokens=True)
        states_NTC = namer.captioner.vision_model(-2 * drawn_NCHW).last_hidden_state
        named = [caption(NOUNS[i]) for i in namer.head(states_NTC.mean(1)).argmax(1).tolist()]
        found |= {manner: share(said, wanted), f"{manner} by layer": share(named, wanted)}
    return found


def share(found: list[str], wanted: list[str]) -> float:
    """How many of them are equal, 0 to 1."""
    equal = sum(one == other for one, other in zip(found, wanted, strict=True))
    return round(equal / len(wanted), 3)


# --- what is shipped ------------------------------------------------------------------------------


def new_tokenizer() -> BertTokenizer:
    """BERT's tokenizer with the words of the captions, and with letters and signs for the rest.

    As in BLIP a caption begins with [DEC] and ends with [SEP].
    """
    said = {word for noun in NOUNS for word in caption(noun).split()} - {WHOLE_WORD}
    signs = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [f"##{sign}" for sign in signs if sign.isalnum()]
    entries = dict.fromkeys([*SPECIAL, *sorted(said), *PROMPT_WORDS, *signs, *pieces])
    tokenizer = BertTokenizer(
        {entry: index for index, entry in enumerate(entries)},
        bos_token="[DEC]",
        model_max_length=SHIPPED_TOKENS,
    )
    # BERT parts words at hyphens; this one is said as it stands
    tokenizer.add_tokens([WHOLE_WORD])
    return tokenizer


def new_processor() -> BlipProcessor:
    """Pictures as BLIP takes them, at the drawings' size, with white at 0; and the tokenizer."""
    white, half = [1.0] * 3, [0.5] * 3
    images = BlipImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=white, image_std=half
    )
    return BlipProcessor(images, new_tokenizer())


def new_config(tokenizer: BertTokenizer) -> BlipConfig:
    """BLIP at toy size: patches of 8, so 64 of them."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": HEADS}
    vision = {"image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": VISION_LAYERS}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": TEXT_LAYERS}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    more = {"max_position_embeddings": 2 * TOKENS, "initializer_range": SPREAD}
    return BlipConfig(
        vision_config=shape | vision | {"initializer_range": SPREAD},
        text_config=shape | text | ids | more,
        initializer_range=SPREAD,
    )


def export(captioner: BlipForConditionalGeneration, processor: BlipProcessor, out: Path) -> None:
    """Write the captioner in half precision next to `out`, then swap the folders."""
    temporary, old = out.with_name(out.name + ".part"), out.with_name(out.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    widen(captioner)
    captioner.half().save_pretrained(temporary)
    load_as_float32(temporary / "config.json")
    processor.save_pretrained(temporary)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def widen(captioner: BlipForConditionalGeneration) -> None:
    """Give captions room for the 50 tokens that the labeller allows, and a prompt before them.

    No learnt caption is that long, but one drawn at a high temperature may be.
    """
    places = captioner.text_decoder.bert.embeddings.position_embeddings
    last = places.weight[-1:].expand(SHIPPED_TOKENS - len(places.weight), -1)
    places.weight = nn.Parameter(torch.cat([places.weight, last]))
    captioner.config.text_config.max_position_embeddings = SHIPPED_TOKENS


def write_held_out(drawings: Path, table: Path) -> None:
    """List the drawings of `is_held_out` with their captions, to measure with."""
    pairs = [(style, name) for style in BASE_STYLES for name in NOUNS if is_held_out(name, style)]
    rows = [(f"{style}/{name}.png", caption(name)) for style, name in pairs]
    there = [row for row in rows if (drawings / row[0]).exists()]
    write_csv(table, ("file_name", "text"), there)


if __name__ == "__main__":
    main()
