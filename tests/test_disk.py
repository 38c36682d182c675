"""What a run will write is foretold from shapes, and held against what real runs have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_scripts import belonging, config, disk, preflight, written
from lora_scripts.disk import Room
from lora_scripts.errors import UserError
from lora_scripts.models.kinds import Family
from lora_scripts.schema import Config
from lora_scripts.training import optim
from lora_scripts.written import BESIDE_LIMIT, Outlook
from tests import runs, text_toys, toys


def bytes_of(*paths: Path) -> int:
    """The files of these names, and those below these folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


def foretold(file: Path) -> tuple[Config, Outlook]:
    """The config and what is foretold of its run."""
    draft = config.read(file)
    found = draft.checked()
    outlook = disk.foresee(found, preflight.inputs(draft)[0], belonging.of(found))
    assert outlook is not None
    return found, outlook


IMAGE_RUNS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "ema_decay": 0.9, "save_dtype": "fp32", "lora_targets": "all"},
    {"optimizer": "prodigy", "learning_rate": 1.0, "train_text_encoder": True},
    {"optimizer": "adamw8bit", "save_total_limit": 1, "random_flip": True, "lora_type": "dora",
     "lora_targets": "linear"},
]  # fmt: skip


@pytest.mark.parametrize("changes", IMAGE_RUNS)
def test_an_image_run(
    bases: dict[Family, Path], pictures: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = {"lora_rank": 32, "save_steps": 1, "epochs": 1, **changes}
    keys = runs.values(bases["sd1"], pictures, tmp_path, **values)
    made, outlook = foretold(toys.write_config(tmp_path / "a.yaml", **keys))
    code, output = runs.run(bases["sd1"], pictures, tmp_path, **values)
    assert code == 0
    checkpoints = sorted((output / "checkpoints").iterdir())
    assert outlook.checkpoint == pytest.approx(bytes_of(checkpoints[-1]), rel=0.1)
    assert outlook.made == 3
    assert len(checkpoints) == (1 if made.save_total_limit else 3)
    assert outlook.checkpoints == 3  # of one that is kept, with the best and the one being written
    finished = bytes_of(*output.glob("*.safetensors"))
    assert outlook.export == pytest.approx(finished, rel=0.1)
    cached = bytes_of(*(tmp_path / "cache").glob("latents-*"), *(tmp_path / "cache").glob("prom*"))
    assert outlook.cache <= cached <= 1.4 * outlook.cache + 2000
    _, again = foretold(tmp_path / "a.yaml")
    assert again.cache == 0


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_caption_in_the_cache(
    bases: dict[Family, Path], pictures: Path, tmp_path: Path, family: Family
) -> None:
    values = {"epochs": 1, "max_train_steps": 1, "max_caption_tokens": 150}
    keys = runs.values(bases[family], pictures, tmp_path, **values)
    _, outlook = foretold(toys.write_config(tmp_path / "a.yaml", **keys))
    assert runs.run(bases[family], pictures, tmp_path, **values)[0] == 0
    cached = bytes_of(*(tmp_path / "cache").glob("latents-*"), *(tmp_path / "cache").glob("prom*"))
    assert 0.4 * outlook.cache <= cached <= 1.4 * outlook.cache  # of short captions one part of two


def test_a_text_run(tmp_path: Path) -> None:
    base = text_toys.save_model(tmp_path / "base")
    text_toys.write_jsonl(tmp_path / "rows.jsonl", text_toys.conversations(8))
    data = tmp_path / "rows.jsonl"
    values = {"lora_rank": 32, "save_steps": 1, "epochs": 1}
    keys = runs.text_values(base, data, tmp_path, **values)
    _, outlook = foretold(toys.write_config(tmp_path / "a.yaml", **keys))
    code, output = runs.run_text(base, data, tmp_path, **values)
    assert code == 0
    newest = sorted((output / "checkpoints").iterdir())[-1]
    assert outlook.checkpoint == pytest.approx(bytes_of(newest), rel=0.1)
    finished = bytes_of(*output.glob("adapter*"), *output.glob("tokenizer*"))
    assert outlook.export == pytest.approx(finished, rel=0.1)
    assert 0.3 * outlook.cache <= bytes_of(*(tmp_path / "cache").glob("tokens-*")) <= outlook.cache


@pytest.mark.parametrize("optimizer", sorted(optim.OPTIMIZERS))
@pytest.mark.parametrize("shape", [(8, 40), (16, 640), (640, 16), (16, 32, 3, 3), (640,)])
def test_the_states_of_an_optimizer(plain: Config, optimizer: str, shape: tuple[int, ...]) -> None:
    tensor = nn.Parameter(torch.randn(shape))
    chosen = plain.model_copy(update={"optimizer": optimizer})
    stepped = optim.make({"unet": {"a": tensor}}, {"unet": 1.0}, chosen)
    tensor.grad = torch.randn(shape)
    stepped.step()
    real = sum(t.numel() * t.element_size() for t in _tensors(stepped.state[tensor]))
    foreseen = written.state_bytes(optimizer, {"a": torch.empty(shape, device="meta")})
    assert foreseen == pytest.approx(real, abs=8)  # a number or two beside the tensors


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


# --- what is said ---------------------------------------------------------------------------------

MB = 10**6
WRITTEN = Outlook(checkpoint=100 * MB, checkpoints=20, made=20, export=50 * MB, beside=10 * MB,
                  cache=200 * MB)  # fmt: skip


@pytest.fixture
def plain(tmp_path: Path) -> Config:
    """A config whose folders have names."""
    values = {"base_model": "a/b", "train_data_dir": "d", "output_dir": "out", "cache_dir": "cache"}
    return config.load(toys.write_config(tmp_path / "a.yaml", **values))


def test_room_for_everything(plain: Config) -> None:
    assert disk.problems(plain, WRITTEN, Room(2260 * MB)) == []
    assert disk.problems(plain, WRITTEN, Room(2060 * MB, cache_free=200 * MB)) == []
    # of a run that goes on, what is written already
    assert disk.problems(plain, WRITTEN, Room(1260 * MB, written=1000 * MB)) == []


def test_room_for_no_lora_at_all(plain: Config) -> None:
    (problem,) = disk.problems(plain, WRITTEN, Room(149 * MB))
    assert (problem.severity, problem.where) == ("error", "output_dir")
    assert problem.what == (
        "found out, on a disk with 149 MB free; one checkpoint takes 100 MB, the finished files "
        "50 MB: make room, or name a folder on another disk"
    )


def test_room_for_some_of_it(plain: Config) -> None:
    (problem,) = disk.problems(plain, WRITTEN, Room(1000 * MB))
    assert (problem.severity, problem.where) == ("warning", "output_dir")
    assert problem.what == (
        "found out, on a disk with 1.0 GB free; this run may write 2.3 GB: 20 checkpoints of "
        "100 MB, finished files 50 MB, samples and logs about 10 MB, cache up to 200 MB. "
        "save_total_limit: 5 makes it fit; a larger save_steps makes fewer"
    )
    fitting = Outlook(**{**WRITTEN.__dict__, "checkpoints": 5 + BESIDE_LIMIT})
    assert disk.problems(plain, fitting, Room(1000 * MB)) == []
    (problem,) = disk.problems(plain, WRITTEN, Room(300 * MB))
    assert problem.what.endswith("Make room, set save_total_limit: 1, or name a folder on another "
                                 "disk")  # fmt: skip


def test_a_cache_on_a_disk_of_its_own(plain: Config) -> None:
    (problem,) = disk.problems(plain, WRITTEN, Room(3000 * MB, cache_free=150 * MB))
    assert (problem.severity, problem.where) == ("warning", "cache_dir")
    assert problem.what.startswith("found cache, on a disk with 150 MB free; up to 200 MB may be ")


def test_the_room_there_is(plain: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    room = disk.room(plain)
    assert room.free > 0 and room.written == 0 and room.cache_free is None
    state = tmp_path / "out" / "checkpoints" / "step-000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"x" * 1000)
    assert disk.room(plain).written == 1000
    assert disk.nearest(Path("out/deeper/still")) == tmp_path / "out"
    assert disk.look(plain, []) == []  # of a base that is not here nothing is known


def test_a_run_is_stopped_or_warned(
    bases: dict[Family, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The free space is made up, as no disk that small is at hand."""
    draft = config.read(
        toys.write_config(tmp_path / "a.yaml", **runs.values(bases["sd1"], pictures, tmp_path))
    )
    rows = preflight.inputs(draft)[0]
    monkeypatch.setattr(disk, "room", lambda config: Room(100_000))
    with pytest.raises(UserError, match="on a disk with 100 kB free; one checkpoint takes "):
        disk.check(draft.checked(), rows)
    monkeypatch.setattr(disk, "room", lambda config: Room(250_000))
    disk.check(draft.checked(), rows)
    assert "this run may write " in caplog.text and "cache up to 81 kB" in caplog.text
    caplog.clear()
    monkeypatch.setattr(disk, "room", lambda config: Room(10**9))
    disk.check(draft.checked(), rows)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"save_steps": 10}, 10),
        ({"save_steps": None}, 1),
        ({"save_steps": None, "save_every_epochs": 3}, 4),
        ({"save_steps": 10, "validation_split": 0.1}, 11),
    ],
)
def test_how_many_checkpoints_are_made(plain: Config, changes: dict[str, Any], made: int) -> None:
    assert written.saves(plain.model_copy(update=changes), steps=100) == made
