"""`batch_size: auto`: the largest divisor that fits, with as many samples in a step as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_scripts import batch_size, memory, pipeline
from lora_scripts.config import load, read
from lora_scripts.device import choose
from lora_scripts.errors import UserError
from lora_scripts.memory.room import Room
from lora_scripts.preflight import inputs
from lora_scripts.schema import Config
from lora_scripts.tasks.task import Task
from tests import runs, text_toys, toys

MANY = 2**40


def config_of(tmp_path: Path, **changes: object) -> Config:
    values = runs.values(tmp_path, tmp_path, tmp_path, **changes)
    return load(toys.write_config(tmp_path / "run.yaml", **values))


def test_all_that_fits_is_taken_at_once(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    keys = {"batch_size": "auto", "gradient_accumulation_steps": 4, "save_dtype": "fp32"}
    code, output = runs.run(sd_folder, pictures, tmp_path / "a", **keys)
    assert code == pipeline.EXIT_DONE
    written = load(output / "config.yaml")
    assert (written.batch_size, written.gradient_accumulation_steps) == (4, 1)
    _, other = runs.run(sd_folder, pictures, tmp_path / "b", batch_size=4, save_dtype="fp32")
    assert runs.metrics(output) == runs.metrics(other)


def test_the_largest_divisor_that_fits(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    values = runs.values(sd_folder, pictures, tmp_path, batch_size="auto",
                         gradient_accumulation_steps=12, resolution=512)  # fmt: skip
    draft = read(toys.write_config(tmp_path / "run.yaml", **values))
    rows, _ = inputs(draft)
    config, compute = draft.checked(), choose("cpu", "no")
    needs = {}
    for size in (1, 2, 3, 4, 6, 12):
        one = config.model_copy(update={"batch_size": size})
        needs[size] = memory.foretell(one, rows, compute).peak_ram
    *up_to_all, _ = needs.values()  # there are six pictures
    assert sorted(up_to_all) == up_to_all
    assert needs[12] == pytest.approx(needs[6], abs=2**20), "but for the process's own size"
    for chosen, larger in ((1, 2), (2, 3), (4, 6)):
        between = (needs[chosen] + needs[larger]) // 2
        room = Room(ram_total=MANY, ram_free=round(between / 0.9))
        assert memory.largest_batch(config, rows, compute, 12, room) == chosen


def test_a_resumed_run_keeps_the_batch_of_its_checkpoint(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    runs.run(sd_folder, pictures, tmp_path, batch_size=1, gradient_accumulation_steps=4)
    auto = {"batch_size": "auto", "gradient_accumulation_steps": 4}
    code, output = runs.run(sd_folder, pictures, tmp_path, epochs=3, **auto)
    assert code == pipeline.EXIT_DONE
    written = load(output / "config.yaml")
    assert (written.batch_size, written.gradient_accumulation_steps) == (1, 4)
    with pytest.raises(UserError, match="gradient_accumulation_steps: found 8"):
        runs.run(
            sd_folder, pictures, tmp_path, epochs=4, batch_size="auto",
            gradient_accumulation_steps=8,
        )  # fmt: skip


def test_a_batch_that_does_not_fit_after_all_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = text_toys.save_model(tmp_path / "m"), text_toys.write_jsonl(tmp_path / "r.jsonl")
    tried = []
    original = memory.micro_step

    def narrow(task: Task, config: Config, *rest: object) -> memory.Peak:
        tried.append(task.batch)
        if task.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(task, config, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "micro_step", narrow)
    keys = {"batch_size": "auto", "gradient_accumulation_steps": 6}
    code, output = runs.run_text(base, rows, tmp_path, **keys)
    assert code == pipeline.EXIT_DONE and tried == [6, 3, 2]
    state = json.loads(
        next((output / "checkpoints").glob("*/state.json")).read_text(encoding="utf-8")
    )
    assert (state["config"]["batch_size"], state["config"]["gradient_accumulation_steps"]) == (2, 3)


def test_one_that_was_named_does_not_shrink(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, config, compute = runs.task(sd_folder, pictures, tmp_path)

    def none(*everything: object) -> memory.Peak:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(memory, "micro_step", none)
    with pytest.raises(torch.OutOfMemoryError):
        batch_size.tried(task, config, compute, may_shrink=False)
    assert task.batch == config.batch_size


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"batch_size": "auto"}, "write in gradient_accumulation_steps how many samples"),
        ({"batch_size": "all"}, 'found the text "all", must be auto, or a whole number'),
        ({"batch_size": 0}, "found 0, must be auto, or at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, keys: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, **keys)
    assert said in str(caught.value)
