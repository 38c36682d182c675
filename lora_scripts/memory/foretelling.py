"""The memory of a run from shapes alone, before any weight is read."""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_scripts import allocator
from lora_scripts.data.rows import AnyRows
from lora_scripts.device import Compute
from lora_scripts.memory import fakes, heap, heaviest, imagined, room
from lora_scripts.memory.estimate import STEP, Estimate, Phase
from lora_scripts.memory.heap import Growth
from lora_scripts.memory.heaviest import Pictures
from lora_scripts.memory.imagined import Trace
from lora_scripts.memory.optimizers import FLOAT, state_bytes
from lora_scripts.memory.tracker import bytes_of, tensors_of
from lora_scripts.models import causal_lm, filling, lora, sharding
from lora_scripts.schema import Config, ImageConfig, TextConfig

# names of phases
ENCODING, CAPTIONS, SAMPLES = "encoding of the pictures", "encoding of the captions", "samples"
MB = 10**6
# Measured, docs/memory.md. Machine code and caches of PyTorch and oneDNN once they compute.
AT_WORK = {"no": 45 * MB, "bf16": 60 * MB, "fp16": 60 * MB}
CUDA_CONTEXT = 600 * MB  # of a process on the card before its first tensor
CUDA_LIBRARIES = 1200 * MB  # in RAM
ARRIVING = 2  # times the weights of a block: as they arrive, and as they are used
CARD_GAPS = 0.08  # of what is alive, lost between blocks in PyTorch's allocator


def foretell(config: Config, rows: AnyRows, compute: Compute) -> Estimate:
    """What a run will hold in memory. No weight is read and none made: the model has only shapes.

    Rows of text are tokenised (into the run's cache), as the longest micro-batch decides.

    Args:
        config: Checked, with a number for `batch_size`.
        rows: As `preflight.inputs` gives them.
        compute: As the run will have it; the device need not be there.

    Raises:
        UserError: if base model or data cannot be taken, as `tasks.build` would.
    """
    match config:
        case ImageConfig():
            found = _images(config, rows, compute)
        case TextConfig():
            found = _texts(config, rows, compute)
    gc.collect()  # modules and their hooks hold each other
    allocator.give_back()
    return _estimate(found, config, compute, room.resident())


@dataclass(frozen=True)
class Found:
    """What the shapes tell, in bytes.

    Attributes:
        batch: The heaviest micro-batch in words.
        weights: By part, as they are held.
        files: Of each part, what its files add while they are read.
        resting: The parts that lie in memory only in those phases that need them.
        on_card: The parts that lie on a card, if there is one.
        adapters: The trained parameters by name, for their shapes.
        step: A micro-step.
        passes: Further phases by name, with what comes and goes in them.
        largest: Of parts that are spread over the processes, what is gathered of each at once.
    """

    batch: str
    weights: Mapping[str, int]
    files: Mapping[str, int]
    resting: Collection[str]
    on_card: Sequence[str]
    adapters: Mapping[str, torch.Tensor]
    step: Trace
    passes: Mapping[str, Trace]
    largest: Mapping[str, int]


def _images(config: ImageConfig, rows: AnyRows, compute: Compute) -> Found:
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = fakes.images(config, compute)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes.pretend(fake.parts.values(), mode)
    batch, largest = heaviest.of_pictures(rows, config, fake.family.pixel_multiple)
    text_too = config.train_text_encoder or config.shuffle_tags or config.tag_dropout > 0
    pixels_too = config.cache_latents is False or (
        config.cache_latents == "auto" and config.random_crop
    )
    step = imagined.image_step(fake, batch, config, compute, mode, text_too=text_too)
    passes = {ENCODING: imagined.encode_picture(fake, largest, mode)}
    side = config.resolution
    sizes = {(prompt.width or side, prompt.height or side) for prompt in config.sample_prompts}
    for width, height in sorted(sizes):
        drawn = [imagined.decode_picture(fake, Pictures(1, width, height, batch.parts), mode)]
        both = Pictures(2, width, height, batch.parts)
        if not both.fits_into(batch):  # else a training step takes more: it keeps activations, too
            drawn.append(imagined.sampler_step(fake, both, compute, mode))
        known = [passes[SAMPLES]] if SAMPLES in passes else []
        passes[SAMPLES] = max(known + drawn, key=lambda trace: trace.peak)
    weights = {name: _frozen_bytes(part) for name, part in fake.parts.items()}
    dtypes = {name: compute.dtype if name == "unet" else torch.float32 for name in weights}
    encoders = ["vae"] * pixels_too + _readers(weights) * text_too
    files = {n: _mapped(fake.files[n], dtypes[n]) for n in weights}
    return Found(
        batch=str(batch),
        weights=weights,
        files=files | {"unet": min(files["unet"], filling.PIECE)},
        resting=[n for n in weights if n != "unet" and n not in encoders],
        on_card=["unet", *encoders],
        adapters=_adapters(fake.parts),
        step=step,
        passes=passes,
        largest={
            name: sharding.largest(fake.family.units(name))
            for name, part in fake.parts.items()
            if compute.sharded and lora.trainable(part)
        },
    )


def _texts(config: TextConfig, rows: AnyRows, compute: Compute) -> Found:
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = fakes.text(config, compute)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes.pretend([fake.model], mode)
    data = heaviest.dealt(rows, config)
    batch = heaviest.of_rows(data, config, fake.model, packed=fake.packed)
    said = str(batch)
    try:
        with _quiet():
            step = imagined.text_step(fake, batch, config, compute, mode)
    except (RuntimeError, NotImplementedError, TypeError):
        step = imagined.rough_step(fake, batch, config, compute)
        said += "; roughly, as this model's code needs real numbers"
    passes = {}
    longest = max(batch.lengths)
    for prompt in config.sample_prompts:
        kept = imagined.answer_bytes(fake.model, prompt, longest, compute.dtype.itemsize)
        passes[SAMPLES] = imagined.of_sizes([kept])
    dtype = compute.dtype
    files = _mapped(fake.files, dtype)
    if fake.layout == "gguf":  # unpacked to float32 before it is rounded
        files += sum(p.numel() for p in fake.model.parameters()) * FLOAT
    return Found(
        batch=said,
        weights={"model": _quantised(fake.model, config.quantization, dtype)},
        files={"model": files},
        resting=[],
        on_card=["model"],
        adapters=_adapters({"model": fake.model}),
        step=step,
        passes=passes,
        largest=(
            {"model": sharding.largest(causal_lm.units(fake.model))} if compute.sharded else {}
        ),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch logs what it cannot pretend to do; that is answered here."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _estimate(found: Found, config: Config, compute: Compute, imports: int) -> Estimate:
    """The phases, each with all that lies in memory in it."""
    on_card = compute.device.type == "cuda"
    always = {
        "imports": imports + CUDA_LIBRARIES * on_card,
        "libraries at work": AT_WORK[compute.precision],
    }
    held = _held(found, compute)
    stays = {f"{name} weights": held[name] for name in held if name not in found.resting}
    waiting = found.largest if compute.offloaded else {}
    there = {f"{name} weights" for name in found.on_card if on_card and name not in waiting}
    gpu = {"CUDA itself": CUDA_CONTEXT} if on_card else {}
    gpu |= {name: size for name, size in stays.items() if name in there}
    ram = always | {name: size for name, size in stays.items() if name not in there}

    states = state_bytes(config.optimizer, found.adapters)
    trained = _trained(found, config, sum(states))
    grown = _growth_of_steps(found.step, config, states)

    def phase(name: str, parts: Mapping[str, int], visiting: Sequence[str] = ()) -> Phase:
        """`visiting`: parts that come to the device for this phase, from the disk if they rest."""
        read = {f"{part} weights": held[part] for part in visiting}
        if not on_card:
            return Phase(name, {}, {**ram, **read, **parts})
        return Phase(name, {**gpu, **read, **parts}, {**ram, **read})

    gathered = {}
    if found.largest:
        gathered = {"gathered weights": ARRIVING * max(found.largest.values())}
    phases = [_loading("loading", found, _read(found, compute), always, gpu, there)]
    readers = _readers(found.weights)
    if ENCODING in found.passes:
        trace = found.passes[ENCODING]
        parts = _passing(trace, {}, on_card, _growth(trace).total)
        phases.append(phase(ENCODING, parts, ["vae"]))
        files = {} if on_card else {f"{part} files": found.files[part] for part in readers}
        phases.append(phase(CAPTIONS, files, readers))
    step = gathered | _passing(found.step, trained, on_card, grown.total - sum(states))
    phases.append(phase(STEP, step))
    if SAMPLES in found.passes:
        trace = found.passes[SAMPLES]
        own = _growth(trace)
        kept = max(grown.kept - sum(states), own.kept) + own.mapped
        guests = ["vae"] if "vae" in found.weights else []
        parts = gathered | _passing(trace, trained, on_card, kept)
        phases.append(phase(SAMPLES, parts, guests))
    phases.append(_exporting(found, compute, always, gpu, there, trained["adapters"]))
    later = {name: size for name, size in trained.items() if name != "adapters"}
    return Estimate(phases, found.batch, later)


def _exporting(
    found: Found,
    compute: Compute,
    always: Mapping[str, int],
    gpu: Mapping[str, int],
    there: set[str],
    adapters: int,
) -> Phase:
    """A fresh model is read, and answers; its text encoders stay, as a file may be for them.

    Where the base is spread nothing rests then."""
    if compute.sharded:
        found = replace(found, resting=())
    spread = {f"{part} weights" for part in found.largest}
    read = _read(found, compute)
    readers = [part for part in _readers(read) if part in found.resting]
    export = _loading("export", found, read, always, gpu, there - spread)
    answering = {f"{part} weights": read[part] for part in read if part not in found.resting}
    for part in readers:
        answering |= {f"{part} weights": read[part], f"{part} files": found.files[part]}
    ram = {**always, **{n: size for n, size in answering.items() if n not in there - spread}}
    heavier = max(export.ram, ram, key=lambda parts: sum(parts.values()))
    visiting = {f"{part} weights": read[part] for part in readers} if export.gpu else {}
    copies = {"adapters and their copies": 3 * adapters}
    return Phase("export", {**export.gpu, **visiting}, {**heavier, **copies})


def _held(found: Found, compute: Compute) -> dict[str, int]:
    """Bytes of each part's weights that this process holds while it trains."""
    count = compute.processes.size
    return {n: size // count if n in found.largest else size for n, size in found.weights.items()}


def _read(found: Found, compute: Compute) -> dict[str, int]:
    """The same while they are read. Parts to be spread are the files' own pages, if these hold
    them in the run's precision, and all processes of a machine share those.
    """
    count = compute.processes.local_size
    return {
        n: size // count if n in found.largest and not found.files[n] else size
        for n, size in found.weights.items()
    }


def _growth(trace: Trace) -> Growth:
    """By how much the process grows in a pass; with tensors mapped alone there are no gaps."""
    if allocator.maps_alone():
        return Growth(total=trace.at_work, kept=0, mapped=trace.at_work)
    return heap.growth(trace.events)


def _growth_of_steps(trace: Trace, config: Config, states: Sequence[int]) -> Growth:
    """The same of steps of a run, what the optimizer keeps included."""
    batches = config.gradient_accumulation_steps
    if allocator.maps_alone():
        earlier = trace.left if batches > 1 else 0  # gradients of earlier micro-batches
        return Growth(trace.at_work + earlier + sum(states), kept=sum(states), mapped=trace.at_work)
    return heap.growth_of_steps(
        trace.events, batches, states, thrifty=config.gradient_checkpointing
    )


def _passing(trace: Trace, lasting: Mapping[str, int], on_card: bool, grown: int) -> dict[str, int]:
    """What comes and goes beside what lies there throughout.

    `grown`: bytes of the process for what comes and goes, gaps or copies included.
    """
    earlier = lasting.get("gradients", 0)  # of earlier micro-batches: these are added to them
    gradients = 0 if earlier else min(trace.left, trace.peak)
    parts = dict(lasting) | {"gradients": earlier + gradients}
    parts["activations"] = trace.peak - trace.logits - gradients
    parts["logits"] = trace.logits
    if on_card:
        parts["gaps"] = int(CARD_GAPS * sum(parts.values()))
    else:
        name = "copies at work" if allocator.maps_alone() else "gaps"
        parts[name] = max(0, grown - trace.peak - earlier)
    return parts


def _loading(
    name: str,
    found: Found,
    weights: Mapping[str, int],
    always: Mapping[str, int],
    gpu: Mapping[str, int],
    there: set[str],
) -> Phase:
    """The parts come one after the other; while one is read, its files are mapped beside it."""
    most: dict[str, int] = {}
    so_far: dict[str, int] = {}
    for part in sorted(weights, key=_is_denoiser):
        label = f"{part} weights"
        during = {**so_far, label: weights[part], f"{part} files": found.files[part]}
        if sum(during.values()) > sum(most.values()):
            most = during
        if label not in there and part not in found.resting:
            so_far[label] = weights[part]
    on_card = {name: size for name, size in gpu.items() if there}
    return Phase(name, on_card, {**always, **most})


def _is_denoiser(part: str) -> bool:
    """It is read last."""
    return part == "unet"


def _readers(parts: Iterable[str]) -> list[str]:
    """The text encoders among the parts of an image model."""
    return [part for part in parts if part.startswith("text_encoder")]


def _trained(found: Found, config: Config, states: int) -> dict[str, int]:
    """What training keeps from step to step."""
    adapters = sum(p.numel() for p in found.adapters.values()) * FLOAT
    return {
        "adapters": adapters,
        "gradients": adapters if config.gradient_accumulation_steps > 1 else 0,
        "optimizer": states,
        "average": adapters if config.ema_decay is not None else 0,
    }


def _adapters(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{name}": parameter
        for component, module in modules.items()
        for name, parameter in lora.trainable(module).items()
    }


def _frozen_bytes(module: nn.Module) -> int:
    trained = {id(p) for p in lora.trainable(module).values()}
    return bytes_of(tensor for tensor in tensors_of(module) if id(tensor) not in trained)


def _mapped(files: fakes.Files, dtype: torch.dtype) -> int:
    """Bytes of files that lie beside the weights made of them; 0 where those are the files'."""
    return 0 if files.dtype == dtype else files.bytes


def _quantised(model: nn.Module, quantization: str | None, dtype: torch.dtype) -> int:
    """Bytes of a model whose linear layers in the blocks are held in 4 or 8 bits.

    nf4: half a byte, a scale of 8 bits for 64 numbers and one of 32 bits for 256 scales (Dettmers
    et al. 2023, arXiv 2305.14314, section 3). int8: a byte, and a float32 scale a row.
    """
    whole = _frozen_bytes(model)
    if quantization is None:
        return whole
    weights = [m.weight for m in _linear_layers(model)]
    numbers, rows = sum(w.numel() for w in weights), sum(w.shape[0] for w in weights)
    plain = whole - numbers * dtype.itemsize
    if quantization == "int8":
        return plain + numbers + FLOAT * rows
    return plain + numbers // 2 + numbers // 64 + FLOAT * (numbers // (64 * 256))


def _linear_layers(model: Any) -> list[nn.Linear]:
    """Those that are quantised: all but the head and the adapters."""
    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    ]
