"""What the run does, done with tensors that take no memory: a step, the VAE, an answer.

These are the operations of `tasks/diffusion.py`, `tasks/language.py` and `training/learner.py` on
the same modules; what is left out there (cuts, noise by key, weights of samples) is small.
Tensor suffixes: B batch, C channels, H height, W width, T tokens, N learned tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_scripts.device import Compute
from lora_scripts.memory import fakes
from lora_scripts.memory.heaviest import LOGIT_WEIGHT, TOKEN_WEIGHT, Pictures, Rows
from lora_scripts.memory.tracker import Event, Tracker, tensors_of
from lora_scripts.models import head, latents, lora, packing
from lora_scripts.models.head import Learned
from lora_scripts.schema import ImageConfig, TextConfig, TextPrompt

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lora_scripts.models.family import Conditioning, ImageFamily

CLIP_LENGTH = 77  # tokens that a CLIP text encoder reads at once
ROUGH_TENSORS = 200  # that the activations of a rough estimate are made of


@dataclass(frozen=True)
class Trace:
    """What came and went.

    Attributes:
        peak: Bytes that were alive at once.
        logits: Of these, what has the vocabulary's width.
        left: Bytes that were still alive at the end: the gradients.
        at_work: What was alive at once with what convolutions copy while they are at work.
        events: Every birth and death, to replay them.
    """

    peak: int
    logits: int
    left: int
    at_work: int
    events: Sequence[Event]


def image_step(
    fake: fakes.FakeImages,
    batch: Pictures,
    config: ImageConfig,
    compute: Compute,
    mode: FakeTensorMode,
    *,
    text_too: bool,
) -> Trace:
    """Forward and backward of a micro-batch. `text_too`: prompts are encoded in every step."""
    family = fake.family
    with mode:
        noisy_BCHW = _noise(fake, batch)
        ids = [torch.zeros(batch.parts, CLIP_LENGTH, dtype=torch.long)] * batch.count
        told = _told(family, batch, fake)

        def forward() -> torch.Tensor:
            conditioning = told
            if text_too:
                conditioning = {**told, **_encoded(family, ids, config)}
            timesteps_B = torch.zeros(batch.count, dtype=torch.long)
            output_BCHW = family.predict(noisy_BCHW, timesteps_B, conditioning)
            error_BCHW = (output_BCHW.float() - noisy_BCHW).square()
            return error_BCHW.mean(dim=(1, 2, 3)).sum()

        inputs = [noisy_BCHW, *ids, *told.values()]
        return _step(list(fake.parts.values()), forward, inputs, config, compute)


def text_step(
    fake: fakes.FakeText, batch: Rows, config: TextConfig, compute: Compute, mode: FakeTensorMode
) -> Trace:
    """Forward and backward of a micro-batch.

    Raises:
        RuntimeError, NotImplementedError, TypeError: of a model whose code needs real numbers.
    """
    model = fake.model
    in_segments = fake.packed and compute.device.type == "cpu"
    if in_segments:
        packing.register()
        model.set_attn_implementation(packing.NAME)
    with mode:
        inputs = _packed(batch) if in_segments else _padded(batch, side_by_side=not fake.packed)
        rows_N = inputs.pop("rows")
        learned = Learned(inputs.pop("columns"), rows_N, torch.zeros_like(rows_N), rows_N)

        def forward() -> torch.Tensor:
            return head.loss(model, inputs, learned, in_parts=head.looks_plain(model))

        given = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        given += [learned.columns_C, learned.row_N, learned.column_N]
        wide = model.config.get_text_config().vocab_size
        try:
            return _step([model], forward, given, config, compute, wide)
        finally:
            packing.forget_masks()


def rough_step(fake: fakes.FakeText, batch: Rows, config: TextConfig, compute: Compute) -> Trace:
    """The same by a rule of thumb, for models whose code needs real numbers."""
    settings = fake.model.config.get_text_config()
    kept = 3 * settings.hidden_size if config.gradient_checkpointing else 0  # a layer's input
    width = kept or TOKEN_WEIGHT * settings.hidden_size
    scale = compute.dtype.itemsize / 2
    states = int(width * settings.num_hidden_layers * sum(batch.lengths) * scale)
    logits = LOGIT_WEIGHT * settings.vocab_size * head.alive_at_once(fake.model, batch.learned)
    return of_sizes([states // ROUGH_TENSORS] * ROUGH_TENSORS + [logits], logits)


def of_sizes(sizes: Sequence[int], logits: int = 0) -> Trace:
    """Tensors of these sizes that are alive at once."""
    born = [Event(number, size) for number, size in enumerate(sizes)]
    dead = [Event(event.number, -event.bytes) for event in born]
    total = sum(sizes)
    return Trace(total, logits, 0, total, (*born, *dead))


def encode_picture(fake: fakes.FakeImages, picture: Pictures, mode: FakeTensorMode) -> Trace:
    """The VAE on one picture."""
    vae: Any = fake.parts["vae"]
    with mode:
        pixels_CHW = torch.empty(3, picture.height, picture.width)
        return _without_gradients([vae], lambda: latents.encode(vae, pixels_CHW), [pixels_CHW])


def sampler_step(
    fake: fakes.FakeImages, batch: Pictures, compute: Compute, mode: FakeTensorMode
) -> Trace:
    """A step of the sampler; a picture counts twice, with and without its prompt."""
    with mode:
        noisy_BCHW = _noise(fake, batch)
        told = _told(fake.family, batch, fake)

        def predict() -> Any:
            timesteps_B = torch.zeros(batch.count, dtype=torch.long)
            with _autocast(compute):
                return fake.family.predict(noisy_BCHW, timesteps_B, told)

        return _without_gradients(list(fake.parts.values()), predict, [noisy_BCHW, *told.values()])


def decode_picture(fake: fakes.FakeImages, picture: Pictures, mode: FakeTensorMode) -> Trace:
    """The VAE back to pixels."""
    vae: Any = fake.parts["vae"]
    with mode:
        latents_BCHW = _noise(fake, picture)
        return _without_gradients([vae], lambda: vae.decode(latents_BCHW), [latents_BCHW])


def answer_bytes(model: Any, prompt: TextPrompt, longest: int, width: int) -> int:
    """Keys and values of a whole answer, twice, as each token makes them anew; `width`: bytes."""
    settings = model.config.get_text_config()
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    size = getattr(settings, "head_dim", None) or (
        settings.hidden_size // settings.num_attention_heads
    )
    tokens = longest + prompt.max_new_tokens
    return int(2 * 2 * settings.num_hidden_layers * heads * size * tokens * width)


# --- private --------------------------------------------------------------------------------------


def _step(
    modules: list[nn.Module],
    forward: Callable[[], torch.Tensor],
    inputs: list[torch.Tensor],
    config: ImageConfig | TextConfig,
    compute: Compute,
    wide: int | None = None,
) -> Trace:
    tracker = Tracker(wide)
    tracker.leave_out(inputs)
    for module in modules:
        tracker.leave_out(tensors_of(module))
    trained = [p for module in modules for p in lora.trainable(module).values()]
    for module in modules:
        module.train(bool(lora.trainable(module)))
    with tracker:
        with _autocast(compute):
            loss = forward()
        loss.backward()  # type: ignore[no-untyped-call]
    del loss
    trace = _trace(tracker)
    for parameter in trained:
        parameter.grad = None
    return trace


def _autocast(compute: Compute) -> AbstractContextManager[None]:
    """The run's arithmetic, on tensors that all pretend to be on a CPU."""
    return Compute(torch.device("cpu"), compute.precision).autocast()


def _without_gradients(
    modules: list[nn.Module], work: Callable[[], Any], inputs: list[torch.Tensor]
) -> Trace:
    tracker = Tracker()
    tracker.leave_out(inputs)
    for module in modules:
        module.eval()
        tracker.leave_out(tensors_of(module))
    with torch.no_grad(), tracker:
        work()
    return _trace(tracker)


def _trace(tracker: Tracker) -> Trace:
    at_work = max(tracker.peak, tracker.at_work)
    return Trace(tracker.peak, tracker.peak_wide, tracker.live, at_work, tuple(tracker.events))


def _noise(fake: fakes.FakeImages, batch: Pictures) -> torch.Tensor:
    vae: Any = fake.parts["vae"]
    factor = latents.side_factor(vae)
    sides = batch.height // factor, batch.width // factor
    return torch.empty(batch.count, vae.config.latent_channels, *sides)


def _told(family: ImageFamily, batch: Pictures, fake: fakes.FakeImages) -> dict[str, torch.Tensor]:
    """What the denoiser is told of prompts and cuts, as the cache holds it."""
    from lora_scripts.models.family import Framing

    unet: Any = family.adapted["unet"]
    size = (batch.width, batch.height)
    told = {
        "embedding": torch.empty(
            batch.count, CLIP_LENGTH * batch.parts, unet.config.cross_attention_dim
        )
    }
    if "text_encoder_2" in fake.parts:
        second: Any = fake.parts["text_encoder_2"]
        told["pooled"] = torch.empty(batch.count, second.config.projection_dim)
    frame = family.frame(Framing(size, (0, 0), size))
    return told | {name: torch.empty(batch.count, *tensor.shape) for name, tensor in frame.items()}


def _encoded(family: ImageFamily, ids: list[torch.Tensor], config: ImageConfig) -> Conditioning:
    prompts = [dict.fromkeys(list(family.adapted)[1:], ids_PS) for ids_PS in ids]
    if config.train_text_encoder:
        return family.encode_tokens(prompts)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return family.encode_tokens(prompts)


def _packed(batch: Rows) -> dict[str, Any]:
    """The rows laid end to end."""
    return {
        "input_ids": torch.zeros(1, sum(batch.lengths), dtype=torch.long),
        **packing.layout(batch.lengths),
        "columns": torch.zeros(batch.learned, dtype=torch.long),
        "rows": torch.zeros(batch.learned, dtype=torch.long),
    }


def _padded(batch: Rows, *, side_by_side: bool) -> dict[str, Any]:
    """The rows filled up to the longest; or, for a card's fused attention, as one long row."""
    shape = (len(batch.lengths), max(batch.lengths)) if side_by_side else (1, sum(batch.lengths))
    places = min(batch.learned, shape[1])  # columns in which some row learns a token
    return {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        **({"attention_mask": torch.ones(shape, dtype=torch.long)} if side_by_side else {}),
        "columns": torch.zeros(places, dtype=torch.long),
        "rows": torch.zeros(batch.learned, dtype=torch.long),
    }
