"""The model card of a run: README.md with command, data, curve, samples and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_scripts import markdown
from lora_scripts.files import write_text
from lora_scripts.schema import Config, ImageConfig
from lora_scripts.training.log import read_metrics

CURVE_WIDTH, CURVE_HEIGHT = 640, 240
KINDS = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}
CURVE_POINTS = 200  # the training loss is averaged down to about this many points


def write(config: Config, config_name: str, record: Mapping[str, Any], usage: str) -> None:
    """Write README.md and loss.svg into the run's folder, from its metrics.jsonl and samples/.

    `usage`: how the files are used, in Markdown.
    """
    folder = config.output_dir
    write_text(folder / "loss.svg", _curve(read_metrics(folder)))
    write_text(folder / "README.md", _card(config, config_name, record, usage))


def _card(config: Config, config_name: str, record: Mapping[str, Any], usage: str) -> str:
    losses = record["held_out_loss"]
    word = config.trigger_word if isinstance(config, ImageConfig) else None
    trigger = f"\nTrigger word: {markdown.code(word)}\n" if word else ""
    command = markdown.code(f"python train.py --config {config_name}")
    return f"""# {markdown.words(config.output_name)}

A LoRA for {markdown.code(config.base_model)}, made by lora-scripts.
{trigger}
## Use

{usage}

## Training

{command} (every key as it was: `config.yaml`)

| | |
|---|---|
| data | {markdown.words(record["data"])} |
| trainable | {record["trainable"]} |
| kind, rank, alpha | {KINDS[config.lora_type]}, {config.lora_rank}, {config.lora_alpha:g} |
| layers | {markdown.words(_layers(config))} |
| steps | {_steps(record)} |
| learning rate | {config.learning_rate:g}, {config.lr_scheduler} |
| batch | {_batch(config, record)} |
| held-out loss, first → last | {losses["first"]:.5f} → {losses["last"]:.5f} |
| device, precision | {record["device"]}, {record["precision"]} |
| this run took | {record["seconds"]:.0f} s |

![loss](loss.svg)
{_finding(record)}
## Samples

{_samples(config.output_dir) or "No `sample_prompts` were configured."}
"""


def _finding(record: Mapping[str, Any]) -> str:
    return f"\n**{markdown.words(record['finding'])}.**\n" if record["finding"] else ""


def _layers(config: Config) -> str:
    targets = config.lora_targets
    named = targets if isinstance(targets, str) else ", ".join(targets)
    text_too = isinstance(config, ImageConfig) and config.train_text_encoder
    return f"{named}; text encoders, too" if text_too else named


def _steps(record: Mapping[str, Any]) -> str:
    if record["steps"] == record["last_step"]:
        return str(record["steps"])
    return f"{record['steps']}, the best of {record['last_step']} by held-out loss"


def _samples(folder: Path) -> str:
    """The samples of the first and of the last round, pictures or texts, in Markdown."""
    paths = sorted((folder / "samples").glob("step-*.*"))
    ends = {path.name.split("_")[0] for path in paths[:1] + paths[-1:]}
    shown = [path for path in paths if path.name.split("_")[0] in ends]
    return "\n".join(_shown(path) for path in shown)


def _shown(path: Path) -> str:
    if path.suffix == ".png":
        return f"![{path.name}](samples/{path.name})"
    text = path.read_text(encoding="utf-8").strip()
    return f"{markdown.code(path.stem)}\n\n{markdown.block(text)}\n"


def _curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """Training loss (averaged) and held-out loss over the steps, as an SVG picture."""
    training = _averaged([(r["step"], r["loss"]) for r in rows if r.get("loss") is not None])
    held_out = [(r["step"], r["eval_loss"]) for r in rows if r.get("eval_loss") is not None]
    values = [value for _, value in training + held_out]
    if not values:
        values = [0.0]
    low, high = min(values), max(values)
    steps = max((step for step, _ in training + held_out), default=1) or 1

    def line(points: Sequence[tuple[float, float]], colour: str) -> str:
        spots = " ".join(
            f"{40 + step / steps * (CURVE_WIDTH - 60):.1f},"
            f"{CURVE_HEIGHT - 30 - (value - low) / ((high - low) or 1) * (CURVE_HEIGHT - 60):.1f}"
            for step, value in points
        )
        return f'<polyline points="{spots}" fill="none" stroke="{colour}" stroke-width="1.5"/>'

    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{CURVE_WIDTH}" '
            f'height="{CURVE_HEIGHT}" font-family="sans-serif" font-size="11">',
            f'<rect width="{CURVE_WIDTH}" height="{CURVE_HEIGHT}" fill="white"/>',
            line(training, "#9bb7d4"),
            line(held_out, "#c0392b"),
            f'<text x="4" y="34">{high:.3g}</text>',
            f'<text x="4" y="{CURVE_HEIGHT - 26}">{low:.3g}</text>',
            f'<text x="40" y="{CURVE_HEIGHT - 8}">step 0</text>',
            f'<text x="{CURVE_WIDTH - 70}" y="{CURVE_HEIGHT - 8}">step {steps}</text>',
            '<text x="200" y="16" fill="#6b8cae">training loss</text>',
            '<text x="320" y="16" fill="#c0392b">held-out loss</text>',
            "</svg>\n",
        ]
    )


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    group = max(1, len(points) // CURVE_POINTS)
    return [
        (part[-1][0], sum(value for _, value in part) / len(part))
        for part in (points[i : i + group] for i in range(0, len(points), group))
    ]


def _batch(config: Config, record: Mapping[str, Any]) -> str:
    """Samples of a step, and how they came together."""
    said = f"{config.micro_batch} × {config.gradient_accumulation_steps} accumulated"
    count = record["processes"]
    return f"{said} × {count} processes" if count > 1 else said
