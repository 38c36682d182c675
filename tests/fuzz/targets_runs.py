"""What a run leaves and the next one goes on from: checkpoints, its folder, metrics, the cache."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import nn

from lora_scripts import config, run_folder
from lora_scripts.data.cache import Cache, fill, key_of
from lora_scripts.schema import Config
from lora_scripts.training import checkpoint, contents, log
from lora_scripts.training.checkpoint import Position, State
from tests import toys
from tests.fuzz.mutation import Files, spoil, spoil_json, spoil_lines
from tests.fuzz.targets_models import folder_of, spoil_weights
from tests.fuzz.trial import Target

STATE = "checkpoints/step-000004/state.json"
KEY = key_of("a picture")


def _parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {f"unet.layer{n}.{half}": nn.Parameter(torch.randn(4, 2))
            for n in range(2) for half in ("down", "up")}  # fmt: skip


def _optimizer(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def _config(folder: Path) -> Config:
    values = {"base_model": "a/b", "train_data_dir": "data", "output_dir": str(folder)}
    path = folder.with_suffix(".yaml")
    return config.load(toys.write_config(path, **values))


def _runs(work: Path) -> list[Files]:
    """A run of two checkpoints that has finished."""
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "run"
    parameters = _parameters()
    tensors, numbers = contents.pack(parameters, _optimizer(parameters))
    for step in (2, 4):
        state = State(
            position=Position(step, 1, 1, step * 2),
            best=checkpoint.Best(2, 0.5) if step == 4 else None,
            tallies={"tokens": 7}, passing=False, processes=1, total_steps=8,
            precision="fp16", scaler={"scale": 65536.0, "growth_tracker": 3}, optimizer=numbers,
            config=_config(folder).model_dump(mode="json"),
            fingerprint={"data": "x", "base_model": "y"},
        )  # fmt: skip
        checkpoint.write(folder / "checkpoints", state, tensors, lambda path: [], None)
    record = {"last_step": 4, "steps": 4, "files": ["metrics.jsonl"]}
    run_folder.write_record(folder, record)
    rows = [{"step": n, "loss": 1.0 / n, "time": 1.5} for n in range(1, 5)] + [
        {"step": 4, "eval_loss": 0.5, "time": 2.5}
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return [folder_of(folder)]


def _spoil_run(chance: random.Random, seeds: Sequence[Files]) -> Files:
    """One file of it; in half of the checkpoints the checksums are made right again."""
    files = dict(seeds[0])
    name = chance.choice((STATE, STATE, STATE, STATE.replace("state.json", "training.safetensors"),
                          "run.json"))  # fmt: skip
    if name.endswith(".safetensors"):
        files[name] = spoil_weights(chance, files[name])
        if chance.random() < 0.7:
            state = json.loads(files[STATE])
            state["sha256"]["training.safetensors"] = hashlib.sha256(files[name]).hexdigest()
            files[STATE] = _summed(json.dumps(state).encode())
    else:
        files[name] = chance.choice((spoil_json, spoil_json, spoil))(chance, files[name])
        if chance.random() < 0.7:
            files[name] = _summed(files[name])
    if chance.random() < 0.5:
        files = {name: content for name, content in files.items() if "step-000002" not in name}
    return files


def _summed(text: bytes) -> bytes:
    """A state.json with the checksum that it should have of itself."""
    try:
        values = json.loads(text)
        values[checkpoint.OWN_SUM] = checkpoint._sum_of(values)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text
    return json.dumps(values).encode()


def _read_checkpoint(folder: Path) -> None:
    newest = checkpoint.newest_good(folder / "checkpoints", lambda text: None, with_best=True)
    assert newest is not None
    state = checkpoint.read_state(newest)
    parameters = _parameters()
    tensors = contents.read_tensors(newest)
    contents.unpack(newest, tensors, state, parameters, _optimizer(parameters))
    if state.best is not None:
        checkpoint.judged(state.best, state.position.step + 1, 0.1)


def _read_run(folder: Path) -> None:
    start = run_folder.decide(_config(folder))
    if start.checkpoint is not None:
        run_folder.refuse_other_inputs(*start.checkpoint, {"data": "x", "base_model": "y"}, str)


def _metrics(work: Path) -> list[Files]:
    return [{"metrics.jsonl": _runs(work)[0]["metrics.jsonl"]}]


def _spoil_metrics(chance: random.Random, seeds: Sequence[Files]) -> Files:
    content = seeds[0]["metrics.jsonl"]
    if chance.random() < 0.5:
        lines = content.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = spoil_json(chance, lines[at])
        return {"metrics.jsonl": b"\n".join(lines)}
    return {"metrics.jsonl": chance.choice((spoil, spoil_lines))(chance, content)}


def _read_metrics(folder: Path) -> None:
    log.cut_back(folder / "metrics.jsonl", 3)
    assert all(row["step"] < 3 for row in log.read_metrics(folder))
    log.losses_of(folder, held_out=True)


def _caches(work: Path) -> list[Files]:
    Cache(work, "latents").write(KEY, {"mean": torch.randn(4, 8, 8), "std": torch.rand(4, 8, 8)})
    return [folder_of(work)]


def _spoil_cache(chance: random.Random, seeds: Sequence[Files]) -> Files:
    return {name: spoil_weights(chance, content) for name, content in seeds[0].items()}


def _read_cache(folder: Path) -> None:
    cache = Cache(folder, "latents")
    with redirect_stdout(io.StringIO()):
        entry = (KEY, lambda: {"mean": torch.zeros(1)})
        fill(cache, lambda: iter([entry]), lambda done, total: None)
    cache.read(KEY)


TARGETS = (
    Target("checkpoints", 80, _runs, _spoil_run, _read_checkpoint),
    Target("run-folders", 60, _runs, _spoil_run, _read_run),
    Target("metrics", 30, _metrics, _spoil_metrics, _read_metrics),
    Target("cache", 20, _caches, _spoil_cache, _read_cache),
)
