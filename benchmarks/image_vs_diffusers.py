"""Images, side by side with a plain loop in the form of diffusers' text-to-image LoRA example.

    python -m benchmarks.image_vs_diffusers [--cases demo sd1 sdxl] [--steps 3]
        [--rounds 2] [--seeds 1]

Every measurement is a process of its own, the trainers by turns, on the same model, pictures, batch
and number of steps: LoRA of rank 16 on attention, AdamW. Ours is `lora_scripts.pipeline`, the whole
run. The plain loop is written here with diffusers', transformers' and PEFT's parts and encodes
pictures and captions in every step, as the example does:

- `fp32`: all weights in float32;
- `autocast`: the same under bfloat16 autocast;
- `bf16`: frozen weights in bfloat16, too (the example's `--mixed_precision bf16`; SDXL's VAE stays
  in float32).

Seconds a step are the median over all steps but the first; `before` are those up to the first step
(ours has encoded all pictures by then). Below each model stands the least that a step of the UNet
can take at the rate of this machine's matrix products, measured in the same run. Peaks are of the
process up to the last step: its resident set, and what of that is private (no pages of files).
Random weights cost what trained ones cost. For the demo's model the held-out loss is measured by
diffusers and PEFT in float32 from the exported file, in a process that belongs to neither.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.children import ROOT, child_of

DEMO = ROOT / "assets" / "demo"
OURS = "ours"
WAYS = (OURS, "plain, fp32", "plain, autocast", "plain, bf16")
RANK = 16
VIEWS = 4  # of each held-out picture: timesteps and noise
HEAD = """\
| model | trainer | s/step | × fp32 | × bf16 | before | peak | private | held-out loss |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Case:
    """A model and what it is trained on."""

    name: str
    family: str
    resolution: int
    batch: int = 1
    rate: float = 1e-4


CASES = {
    "demo": Case("demo, 64², batch 16", "demo", 64, 16, 1.5e-3),
    "sd1": Case("SD1.5, 256², batch 1", "sd1", 256),
    "sd1-512": Case("SD1.5, 512², batch 1", "sd1", 512),
    "sdxl": Case("SDXL, 512², batch 1", "sdxl", 512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["demo", "sd1", "sdxl"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="the rounds take them in turn")
    parser.add_argument("--folder", type=Path, default=None, help="keeps the models")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        print(HEAD)
        for case in arguments.cases:
            compare(folder, case, arguments)


def compare(folder: Path, name: str, arguments: argparse.Namespace) -> None:
    """The rows of the table for a case."""
    case = CASES[name]
    base = DEMO / "model" if case.family == "demo" else folder / f"base-{case.family}"
    if not base.is_dir():
        call("base", case.family, str(base))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    for turn in range(arguments.rounds):
        for way in arguments.ways:
            work = folder / f"{name}-work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            given = (name, str(base), str(work), str(turn % arguments.seeds), str(arguments.steps))
            told = call(OURS, *given) if way == OURS else call("plain", *given, way)
            one = json.loads(told)
            if case.family == "demo":
                one["loss"] = json.loads(call("evaluate", str(base), str(work / "output")))
            found[way].append(one)
    seconds = {w: statistics.median(one["seconds"] for one in rows) for w, rows in found.items()}
    for way, rows in found.items():
        ratios = [
            f"{seconds[other] / seconds[way]:.2f}" if other in seconds else ""
            for other in ("plain, fp32", "plain, bf16")
        ]
        took, losses = [[one.get(key, 0.0) for one in rows] for key in ("seconds", "loss")]
        loss = f"{statistics.mean(losses):.5f} ({min(losses):.5f}–{max(losses):.5f})"
        print(
            f"| {case.name} | {way} | {seconds[way]:.2f} ({min(took):.2f}–{max(took):.2f}) "
            f"| {' | '.join(ratios)} | {statistics.median(o['before'] for o in rows):.0f} s "
            f"| {max(one['peak'] for one in rows) / 2**30:.2f} GiB "
            f"| {max(one['private'] for one in rows) / 2**30:.2f} GiB "
            f"| {loss if any(losses) else '–'} |",
            flush=True,
        )
    least = json.loads(call("floor", name, str(base)))
    print(
        f"\n{case.name}: {least['operations'] / 1e12:.3f} TFLOP a step at "
        f"{least['rate'] / 1e12:.3f} TFLOP/s take {least['operations'] / least['rate']:.3f} s\n",
        flush=True,
    )
    if case.family == "demo":
        print(f"without training: {json.loads(call('evaluate', str(base), '')):.5f}\n")


def call(*arguments: str) -> str:
    """Run `child` in a process of its own; the last line of what it says."""
    return child_of("image_vs_diffusers", *arguments)


# --- in a process of its own ----------------------------------------------------------------------


def child(what: str, *arguments: str) -> None:
    """One piece of work; the last line of the output is its result."""
    work: dict[str, Callable[..., None]] = {
        "base": make_base, OURS: ours, "plain": plain, "evaluate": evaluate,
        "floor": print_floor,
    }  # fmt: skip
    work[what](*arguments)


def make_base(family: str, folder: str) -> None:
    """A diffusers folder of the family's shapes, with random weights."""
    from benchmarks import image_shapes

    image_shapes.save_base(Path(folder), family)  # type: ignore[arg-type]


def pictures(case: Case, work: Path) -> Path:
    """The demo's pictures, or eight of them at another size."""
    from PIL import Image

    if case.family == "demo":
        return DEMO / "style_images"
    folder = work / "pictures"
    folder.mkdir()
    lines = ["file_name,text"]
    for path in sorted((DEMO / "style_images").glob("*.png"))[:8]:
        side = (case.resolution, case.resolution)
        Image.open(path).convert("RGB").resize(side).save(folder / path.name)
        lines.append(f"{path.name},a drawing of {path.stem}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class Memory:
    """The largest resident set of this process until `ended`, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak = self.private = 0
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def ended(self) -> dict[str, int]:
        """Bytes: all, and those that are no pages of files."""
        self._ended.set()
        self._watcher.join()
        return {"peak": self.peak, "private": self.private}

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            fields = dict(line.split(":", 1) for line in lines)
            sizes = {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssFile")}
            self.peak = max(self.peak, sizes["VmRSS"])
            self.private = max(self.private, sizes["VmRSS"] - sizes["RssFile"])


def report(began: float, times: list[float], memory: Mapping[str, int]) -> None:
    """Print the result of a training. `times`: when each step began, and when the last ended."""
    took = [after - before for before, after in itertools.pairwise(times)]
    seconds = statistics.median(took[1:] or took)
    print(json.dumps({"seconds": seconds, "before": times[0] - began, **memory}))


def ours(name: str, base: str, work: str, seed: str, steps: str) -> None:
    """The whole of a lora-scripts run; its steps are timed."""
    from lora_scripts import pipeline
    from lora_scripts.tasks import diffusion
    from lora_scripts.training.learner import Learner

    began, memory, case = time.perf_counter(), Memory(), CASES[name]
    keys = {
        "base_model": base, "train_data_dir": str(pictures(case, Path(work))),
        "output_dir": f"{work}/output", "cache_dir": f"{work}/cache",
        "resolution": case.resolution, "batch_size": case.batch, "lora_rank": RANK,
        "lora_alpha": RANK, "learning_rate": case.rate, "lr_scheduler": "constant",
        "lr_warmup_steps": 0, "epochs": 1000, "max_train_steps": int(steps), "seed": int(seed),
        "resume": "never",
    }  # fmt: skip
    config = Path(work) / "run.yaml"
    config.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in keys.items()), "utf-8")
    diffusion.MEASURED_VIEWS = 1  # the run's own held-out loss is not timed
    times: list[float] = []
    peaks: dict[str, int] = {}
    take = Learner.take

    def timed(learner: Any, *arguments: Any) -> Any:
        times.append(time.perf_counter())
        taken = take(learner, *arguments)
        if learner.is_done():
            times.append(time.perf_counter())
            peaks.update(memory.ended())
        return taken

    setattr(Learner, "take", timed)  # noqa: B010
    assert pipeline.run(config) == 0
    report(began, times, peaks)


def plain(name: str, base: str, work: str, seed: str, steps: str, way: str) -> None:
    """Load, then encode and train in every step."""
    import torch
    from diffusers import DDPMScheduler
    from torch.nn import functional

    began, memory, case = time.perf_counter(), Memory(), CASES[name]
    torch.manual_seed(int(seed))
    dtype = torch.bfloat16 if way == "plain, bf16" else torch.float32
    parts = Parts(Path(base), dtype)
    trained = parts.adapt()
    optimizer = torch.optim.AdamW(trained, lr=case.rate, weight_decay=1e-2)
    schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    batches = dealt(pictures(case, Path(work)), case, int(seed))
    times = []
    for _ in range(int(steps)):
        times.append(time.perf_counter())
        pixels_BCHW, captions = next(batches)
        latents = parts.latents(pixels_BCHW)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (case.batch,))
        noisy = schedule.add_noise(latents, noise, timesteps).to(dtype)
        told = parts.told(captions, case.resolution)
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "plain, fp32"):
            output = parts.unet(noisy, timesteps, return_dict=False, **told)[0]
        target = target_of(schedule, latents, noise, timesteps)
        torch.autograd.backward(functional.mse_loss(output.float(), target.float()))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    times.append(time.perf_counter())
    peaks = memory.ended()
    parts.save(Path(work) / "output")
    report(began, times, peaks)


def target_of(schedule: Any, latents: Any, noise: Any, timesteps: Any) -> Any:
    """What the UNet is to say: the noise, or the velocity."""
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return noise


class Parts:
    """A Stable Diffusion of the first kind or XL, as the examples hold it."""

    def __init__(self, base: Path, dtype: Any) -> None:
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        self.is_xl = (base / "text_encoder_2").is_dir()
        self.vae: Any = AutoencoderKL.from_pretrained(
            base, subfolder="vae", torch_dtype=torch.float32 if self.is_xl else dtype
        )
        kinds: dict[str, Any] = {"text_encoder": CLIPTextModel}
        if self.is_xl:
            kinds["text_encoder_2"] = CLIPTextModelWithProjection
        self.encoders: list[Any] = [
            kind.from_pretrained(base, subfolder=name, dtype=dtype) for name, kind in kinds.items()
        ]
        self.tokenizers: list[Any] = [
            CLIPTokenizer.from_pretrained(base, subfolder=name.replace("text_encoder", "tokenizer"))
            for name in kinds
        ]
        self.unet: Any = UNet2DConditionModel.from_pretrained(
            base, subfolder="unet", torch_dtype=dtype
        )
        for part in (self.vae, self.unet, *self.encoders):
            part.requires_grad_(False)

    def adapt(self) -> list[Any]:
        """A LoRA on the attention; its parameters, float32."""
        import torch
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        names = ["to_k", "to_q", "to_v", "to_out.0"]
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=names
        )
        self.unet.add_adapter(config)
        cast_training_params(self.unet, dtype=torch.float32)
        self.unet.train()
        return [p for p in self.unet.parameters() if p.requires_grad]

    def latents(self, pixels_BCHW: Any) -> Any:
        """Drawn from what the VAE makes of the pictures."""
        import torch

        with torch.no_grad():
            found = self.vae.encode(pixels_BCHW.to(self.vae.dtype)).latent_dist.sample()
        return found * self.vae.config.scaling_factor

    def told(self, captions: list[str], resolution: int) -> dict[str, Any]:
        """What the UNet is given besides noise and timestep."""
        import torch

        hidden, pooled = [], None
        with torch.no_grad():
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
                ids = tokenizer(
                    captions, padding="max_length", truncation=True, return_tensors="pt",
                    max_length=tokenizer.model_max_length,
                ).input_ids  # fmt: skip
                found = encoder(ids, output_hidden_states=self.is_xl)
                hidden.append(found.hidden_states[-2] if self.is_xl else found[0])
                pooled = found[0]
        if not self.is_xl:
            return {"encoder_hidden_states": hidden[0]}
        size = [resolution, resolution, 0, 0, resolution, resolution]
        times = torch.tensor([size] * len(captions), dtype=self.unet.dtype)
        return {
            "encoder_hidden_states": torch.cat(hidden, dim=-1),
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times},
        }

    def save(self, folder: Path) -> None:
        """The LoRA as the example writes it."""
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=layers)


def dealt(folder: Path, case: Case, seed: int) -> Iterator[tuple[Any, list[str]]]:
    """Batches of pictures, -1 to 1, and their captions: each epoch in another order."""
    import torch

    from lora_scripts.data.records import read_images

    records, _ = read_images(folder, None)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(records), generator=generator).tolist()
        for start in range(0, len(order) - case.batch + 1, case.batch):
            chosen = [records[index] for index in order[start : start + case.batch]]
            yield torch.stack([pixels_of(r.file) for r in chosen]), [r.caption for r in chosen]


def pixels_of(path: Path) -> Any:
    """A picture on white, shape (3, height, width), -1 to 1."""
    import numpy as np
    import torch
    from PIL import Image

    picture = Image.open(path).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    values = np.asarray(on_white.convert("RGB"), np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1)


def print_floor(name: str, base: str) -> None:
    """Print the operations of a step of the UNet with its LoRA, and the rate of this machine."""
    import torch

    from benchmarks import floor

    case, parts = CASES[name], Parts(Path(base), torch.bfloat16)
    parts.adapt()
    captions = ["a drawing"] * case.batch
    pixels_BCHW = torch.zeros(case.batch, 3, case.resolution, case.resolution)
    noisy = parts.latents(pixels_BCHW).to(torch.bfloat16)
    told = parts.told(captions, case.resolution)

    def step() -> None:
        output = parts.unet(noisy, torch.tensor(1), return_dict=False, **told)[0]
        torch.autograd.backward(output.float().square().mean())

    found = {"operations": floor.arithmetic(step), "rate": floor.rate()}
    print(json.dumps(found))


def evaluate(base: str, output: str) -> None:
    """Print the mean squared error on the held-out pictures, at fixed timesteps and noise."""
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    parts = Parts(Path(base), torch.float32)
    if output:
        state = StableDiffusionPipeline.lora_state_dict(output)[0]
        parts.unet.load_lora_adapter(state, prefix="unet")
    parts.unet.eval()
    schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    lines = (DEMO / "heldout.csv").read_text(encoding="utf-8").splitlines()[1:]
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    with torch.no_grad():
        for number, line in enumerate(lines):
            name, caption = line.split(",", 1)
            latent = parts.latents(pixels_of(DEMO / "heldout_images" / name)[None])
            latents = latent.expand(VIEWS, *latent.shape[1:])
            noise = torch.randn(latents.shape, generator=generator)
            steps = schedule.config.num_train_timesteps
            timesteps = (torch.arange(VIEWS) + (number + 0.5) / len(lines)) / VIEWS * steps
            noisy = schedule.add_noise(latents, noise, timesteps.long())
            told = parts.told([caption.strip('"')] * VIEWS, 0)
            output_BCHW = parts.unet(noisy, timesteps.long(), return_dict=False, **told)[0]
            target_BCHW = target_of(schedule, latents, noise, timesteps.long())
            total += float((output_BCHW - target_BCHW).square().mean())
    print(total / len(lines))


if __name__ == "__main__":
    main()
