"""`lora-scripts sample`: which LoRAs act in which picture, and with which settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_scripts import device, grid, sample
from lora_scripts.adapters import Adapter, parse
from lora_scripts.cli import main
from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.models import lora_file
from lora_scripts.models.family import DrawRequest, ImageFamily
from lora_scripts.sample import SampleRequest
from lora_scripts.tasks import build
from tests import lora_toys, runs, toys

CPU = Compute(torch.device("cpu"), "no")
Rows = Sequence[Sequence[Image.Image]]


class Grid:
    """What was put together: pictures by row and column, and their labels."""

    def __init__(self, rows: Rows, columns: Sequence[str], labels: Sequence[str]) -> None:
        self.columns, self.labels = list(columns), list(labels)
        self.cells = [[picture.tobytes() for picture in row] for row in rows]
        self.sizes = [[picture.size for picture in row] for row in rows]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Grid]:
    """The grids that were put together in float32, newest last."""
    monkeypatch.setattr(device, "choose", lambda name, precision: CPU)
    grids: list[Grid] = []
    original = grid.labelled

    def noted(rows: Rows, columns: Sequence[str], labels: Sequence[str]) -> Image.Image:
        grids.append(Grid(rows, columns, labels))
        return original(rows, columns, labels)

    monkeypatch.setattr(grid, "labelled", noted)
    return grids


def family_of(base: Path) -> ImageFamily:
    return build.load_family(build.find_base(str(base)), CPU)


def lora(path: Path, base: Path, seed: int) -> Path:
    family = family_of(base)
    layers = lora_toys.random_layers(family, "attention", seed=seed)
    return lora_toys.kohya(path, family, layers)


def draw(base: Path, *loras: tuple[Path, float], **changes: Any) -> bytes:
    family = family_of(base)
    lora_file.put_on(family, loras)
    settings = {"prompt": "a square", "negative_prompt": "", "guidance_scale": 7.5, "steps": 2,
                "width": 64, "height": 64, "seed": 42}  # fmt: skip
    return family.draw(DrawRequest(**{**settings, **changes})).tobytes()


def sampled(folder: Path, **settings: Any) -> Path:
    usual = {"prompts": ["a square"], "steps": 2, "width": 64, "height": 64, "device": "cpu",
             "output": folder / "grid.png"}  # fmt: skip
    return sample.run(SampleRequest(**{**usual, **settings}))


def test_several_act_together_in_one_column(
    sd_folder: Path, tmp_path: Path, drawn: list[Grid]
) -> None:
    one, two = (lora(tmp_path / f"{n}.safetensors", sd_folder, seed=n) for n in (1, 2))
    loras = [parse(f"{one}:0.8"), parse(f"{two}:0.5")]
    written = sampled(tmp_path, base=str(sd_folder), loras=loras)
    assert drawn[-1].columns == ["base", "1 : 0.8 + 2 : 0.5"]
    assert drawn[-1].labels == ["a square"]
    [[base, both]] = drawn[-1].cells
    assert base == draw(sd_folder)
    assert both == draw(sd_folder, (one, 0.8), (two, 0.5)) != base
    assert Image.open(written).size == (2 * 192 + 3 * grid.MARGIN, 192 + 50)


def test_each_in_a_column_of_its_own(sd_folder: Path, tmp_path: Path, drawn: list[Grid]) -> None:
    """Also where two files have the same name: diffusers' is told by its folder."""
    paths = []
    for n in (1, 2):
        folder = tmp_path / f"run{n}"
        folder.mkdir()
        paths.append(lora(folder / "pytorch_lora_weights.safetensors", sd_folder, seed=n))
    loras = [Adapter(paths[0], 1.0), Adapter(paths[1].parent, 0.7)]
    sampled(tmp_path, base=str(sd_folder), loras=loras, compare=True)
    assert drawn[-1].columns == ["base", "run1 : 1", "run2 : 0.7"]
    [cells] = drawn[-1].cells
    assert cells[1:] == [draw(sd_folder, (paths[0], 1.0)), draw(sd_folder, (paths[1], 0.7))]


def test_more_prompts_than_columns_are_laid_side_by_side(
    sd_folder: Path, tmp_path: Path, drawn: list[Grid]
) -> None:
    sampled(tmp_path, base=str(sd_folder), prompts=["a square", "a dot"], seed=7)
    assert (drawn[-1].columns, drawn[-1].labels) == (["a square", "a dot"], ["base"])
    [[square, dot]] = drawn[-1].cells
    assert (square, dot) == (draw(sd_folder, seed=7), draw(sd_folder, seed=7, prompt="a dot"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a finished run with two checkpoints, and its config."""
    folder = tmp_path_factory.mktemp("run")
    base = toys.save_stable_diffusion(folder / "base")
    data = toys.save_pictures(folder / "data")
    prompts = [{"prompt": "a dot", "steps": 2, "seed": 5, "guidance_scale": 3.0}]
    code, output = runs.run(
        base, data, folder, epochs=2, save_steps=3, clip_skip=2,
        sample_prompts=prompts, learning_rate=0.05,
    )  # fmt: skip
    assert code == 0
    return base, output, folder / "run.yaml"


def test_as_the_training_did(
    run_folder: tuple[Path, Path, Path], tmp_path: Path, drawn: list[Grid]
) -> None:
    """Base, clip_skip, resolution, prompts and their settings from the config, and its LoRA."""
    _, _, config = run_folder
    sample.run(SampleRequest(config=config, output=tmp_path / "a.png", device="cpu"))
    assert drawn[-1].columns == ["base", "toy : 1"]
    assert drawn[-1].labels == ["a dot"]
    assert drawn[-1].sizes == [[(64, 64), (64, 64)]]
    sample.run(SampleRequest(config=config, output=tmp_path / "b.png", device="cpu", clip_skip=1))
    sample.run(SampleRequest(config=config, output=tmp_path / "c.png", device="cpu", seed=6))
    as_trained, other_layer, other_seed = (each.cells for each in drawn)
    assert as_trained != other_layer
    assert as_trained != other_seed
    assert as_trained[0][0] != as_trained[0][1]


def test_another_base_and_other_prompts_than_the_configs(
    run_folder: tuple[Path, Path, Path], tmp_path: Path, drawn: list[Grid]
) -> None:
    _, _, config = run_folder
    other = toys.save_stable_diffusion(tmp_path / "other", seed=3)
    sampled(tmp_path, config=config, base=str(other), loras=[], clip_skip=1)
    assert drawn[-1].labels == ["a square"]
    assert drawn[-1].cells[0][0] == draw(other)


def test_another_vae(sd_folder: Path, tmp_path: Path, drawn: list[Grid]) -> None:
    vae: Any = toys.stable_diffusion_parts(seed=9)["vae"]
    vae.save_pretrained(str(tmp_path / "vae"))
    sampled(tmp_path, base=str(sd_folder), vae=str(tmp_path / "vae"))
    sampled(tmp_path, base=str(sd_folder))
    assert drawn[-2].cells != drawn[-1].cells == [[draw(sd_folder)]]


def test_checkpoints_side_by_side(
    run_folder: tuple[Path, Path, Path], tmp_path: Path, drawn: list[Grid]
) -> None:
    base, output, _ = run_folder
    loras = [Adapter(output, 0.6)]
    sampled(tmp_path, base=str(base), loras=loras, checkpoints="all")
    assert drawn[-1].columns == ["base", "toy-000003 : 0.6", "toy-000006 : 0.6"]
    [[bare, third, sixth]] = drawn[-1].cells
    assert len({bare, third, sixth}) == 3
    assert sixth == draw(base, (output / "toy.safetensors", 0.6))


def test_checkpoints_by_scales(
    run_folder: tuple[Path, Path, Path], tmp_path: Path, drawn: list[Grid]
) -> None:
    base, output, _ = run_folder
    settings = {"base": str(base), "loras": [Adapter(output, 1.0)], "scales": [0, 0.5, 1]}
    sampled(tmp_path, **settings, checkpoints="6,3", prompts=["a dot", "a square"])
    assert drawn[-1].columns == ["base", "0", "0.5", "1"]
    rows = [
        "toy-000006: a dot",
        "toy-000003: a dot",
        "toy-000006: a square",
        "toy-000003: a square",
    ]
    assert drawn[-1].labels == rows
    for row in drawn[-1].cells:
        assert row[0] == row[1]  # at strength 0 it is the base
        assert len(set(row)) == 3
    [file] = (output / "checkpoints" / "step-000003").glob("toy-*.safetensors")
    assert drawn[-1].cells[3][2] == draw(base, (file, 0.5))


def refusal(tmp_path: Path, **settings: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        sampled(tmp_path, **settings)
    return [str(problem) for problem in caught.value.problems]


def test_what_is_typed_wrong(run_folder: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, output, config = run_folder
    assert refusal(
        tmp_path, prompts=None, scales=[1.0], output=tmp_path / "a.jpg",
        loras=[Adapter(Path("x.ckpt"), 1.0), Adapter(Path("no.safetensors"), 1.0)],
    ) == [
        "--base: name the base model, or a --config that does",
        "--prompt: give one",
        "--scales: is for --checkpoints; of a --lora write PATH:SCALE",
        "--lora x.ckpt: must be a .safetensors file or the output folder of a run",
        "--lora no.safetensors: there is no such LoRA file",
        f"--output {tmp_path / 'a.jpg'}: must end in .png",
    ]  # fmt: skip
    run = {"base": str(base), "loras": [Adapter(output, 1.0)]}
    [said] = refusal(tmp_path, **run, checkpoints="4")
    assert said == "--checkpoints: found 4; there are 3, 6"
    [said] = refusal(tmp_path, **run, checkpoints="last")
    assert said == "--checkpoints: found last; must be all, or steps: 100,200"
    [said] = refusal(tmp_path, **run, checkpoints="all", compare=True)
    assert said == "--compare: does nothing beside --checkpoints"
    [said] = refusal(tmp_path, base=str(base), checkpoints="all")
    assert said == "--checkpoints: name one run: --config FILE or --lora OUTPUT_DIR"
    [said] = refusal(tmp_path, config=config, width=100)
    assert said == "--width 100: must be a multiple of 16 for this model"


def test_as_it_is_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[SampleRequest] = []
    monkeypatch.setattr(sample, "run", asked.append)

    def typed(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["sample", *arguments])
        return int(end.value.code or 0)

    assert typed(
        "--config", "x.yaml", "--lora", "a:0.8", "--lora", "C:/b.safetensors", "--compare",
        "--checkpoints", "all", "--scales", "0.5,0.8,1", "--vae", "v", "--clip-skip", "2",
        "--prediction-type", "v_prediction", "--prompt", "p", "--prompt", "q", "--seed", "1",
    ) == 0  # fmt: skip
    assert asked == [
        SampleRequest(
            config=Path("x.yaml"),
            loras=[Adapter(Path("a"), 0.8), Adapter(Path("C:/b.safetensors"), 1.0)],
            compare=True,
            checkpoints="all",
            scales=[0.5, 0.8, 1.0],
            vae="v",
            clip_skip=2,
            prediction_type="v_prediction",
            prompts=["p", "q"],
            seed=1,
        )
    ]
    assert typed("--scales", "half") == 2
    assert "--scales half: must be numbers: 0.5,0.8,1" in capsys.readouterr().err
    assert typed("--scales", "0.5,inf") == 2
    assert typed("--prediction-type", "noise") == 2
