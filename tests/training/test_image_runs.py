"""Whole runs on pictures: several folders, masks, weights, a finished LoRA gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lora_scripts.data.images import view_of
from lora_scripts.device import choose
from lora_scripts.errors import UserError
from lora_scripts.models import lora
from lora_scripts.models.family import DrawRequest, Options
from lora_scripts.tasks import build
from lora_scripts.tasks.task import Key
from tests import runs, toys


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


def header(file: Path) -> dict[str, Any]:
    """The header fields of a LoRA file; what is JSON is read."""
    with safe_open(file, framework="pt") as stored:
        fields: dict[str, str] = stored.metadata()
    return {k: json.loads(v) if v[:1] == "{" else v for k, v in fields.items()}


def test_sdxl_with_several_folders_masks_and_random_cuts(sdxl_folder: Path, tmp_path: Path) -> None:
    """Everything of the data at once; the file says what was learned."""
    style = toys.save_pictures(tmp_path / "style", count=3, side=96)
    Image.new("RGB", (160, 64), "red").save(style / "img02.png")
    white_right = np.zeros((64, 160), np.uint8)
    white_right[:, 140:] = 255
    Image.fromarray(white_right).save(style / "img02_mask.png")
    kept = tmp_path / "reg" / "5_a thing"
    toys.save_pictures(kept, count=2, seed=3)
    (kept / "metadata.csv").unlink()
    code, output = runs.run(
        sdxl_folder, style, tmp_path,
        train_data_dir=None, bucket_step=16, random_crop=True, random_flip=True,
        masked_loss=True, shuffle_tags=True, keep_tokens=1, prior_loss_weight=0.5, clip_skip=1,
        noise_offset=0.05, train_text_encoder=True, save_steps=None, epochs=1,
        datasets=[
            {"path": str(style), "repeats": 2, "weight": 1.5},
            {"path": str(tmp_path / "reg"), "role": "regularisation"},
        ],
    )  # fmt: skip
    assert code == 0
    fields = header(output / "toy.safetensors")
    assert fields["ss_dataset_dirs"] == {"style": {"n_repeats": 3, "img_count": 3}}
    assert fields["ss_num_train_images"] == "9"
    assert fields["ss_num_reg_images"] == "10"  # kohya's 5_ repeats two pictures
    assert fields["ss_tag_frequency"]["style"]["a square"] == 3
    expected = {
        "ss_prior_loss_weight": "0.5", "ss_shuffle_caption": "True", "ss_keep_tokens": "1",
        "ss_noise_offset": "0.05", "ss_clip_skip": "1", "ss_max_token_length": "75",
        "ss_random_crop": "True", "ss_flip_aug": "True",
    }  # fmt: skip
    assert expected.items() <= fields.items()
    samples = [row["samples"] for row in runs.metrics(output) if "samples" in row]
    assert samples[-1] == 18  # as many of the class as of the pictures


def test_sdxl_is_told_how_each_view_was_cut(sdxl_folder: Path, tmp_path: Path) -> None:
    data = toys.save_pictures(tmp_path / "data", count=1)
    Image.new("RGB", (192, 96), "red").save(data / "img00.png")
    options = {"aspect_ratio_buckets": False, "random_flip": True, "repeats": 12}
    cached, _, _ = runs.task(sdxl_folder, data, tmp_path, **options)
    live, _, _ = runs.task(sdxl_folder, data, tmp_path, **options, random_crop=True)
    key, indices = Key(7, "train", 0), tuple(range(12))
    middle = cached.load(indices, key)["conditioning.time_ids"]
    assert set(map(tuple, middle.tolist())) == {(96, 192, 0, 32, 64, 64)}
    drawn = live.load(indices, key)["conditioning.time_ids"]
    assert len(set(drawn[:, 3].tolist())) > 5
    assert drawn[:, 3].min() >= 0 and drawn[:, 3].max() <= 64
    picture = live.train_set.at(0)
    view = view_of(picture, np.random.default_rng(0), mirrored=True)
    assert view.shown_corner == (64 - view.corner[0], 0)


def test_captions_of_regularisation_pictures_stand_as_written(
    sd_folder: Path, tmp_path: Path
) -> None:
    """With the trigger word in them they would teach what they are there to prevent."""
    data, kept = (
        toys.save_pictures(tmp_path / "a", 2),
        toys.save_pictures(tmp_path / "b", 2, seed=1),
    )
    sets = [{"path": str(data)}, {"path": str(kept), "role": "regularisation"}]
    task, _, _ = runs.task(
        sd_folder, data, tmp_path, train_data_dir=None, datasets=sets, trigger_word="zwx",
        caption_prefix="by me, ",
    )  # fmt: skip
    learned, beside = task.train_set.pictures, task.train_set.regularisation
    assert all(p.captions[0].startswith("zwx, by me, ") for p in learned)
    assert [p.captions[0] for p in beside] == [p.record.caption for p in beside]
    task, _, _ = runs.task(
        sd_folder, data, tmp_path, train_data_dir=None, datasets=sets, trigger_word="zwx",
        shuffle_tags=True,
    )  # fmt: skip
    key = Key(1, "train", 0)
    assert not task.reader.prompt(task.train_set.regularisation[0], 3, key).startswith("zwx")
    assert task.reader.prompt(task.train_set.pictures[0], 0, key).startswith("zwx, ")


def test_weights_below_one_may_leave_an_epoch_empty(sd_folder: Path, tmp_path: Path) -> None:
    data = toys.save_pictures(tmp_path / "data", count=1)
    rare = {"train_data_dir": None, "datasets": [{"path": str(data), "weight": 0.25}]}
    code, output = runs.run(sd_folder, data, tmp_path, **rare, epochs=8)
    assert code == 0
    assert [row["step"] for row in runs.metrics(output) if "loss" in row] == [1, 2]
    with pytest.raises(UserError, match=r"line \d+: datasets: by their weights 3 epochs show 0.75"):
        runs.run(sd_folder, data, tmp_path / "b", **rare, epochs=3)


def test_a_mask_that_is_black_within_the_cut(sd_folder: Path, tmp_path: Path) -> None:
    data = toys.save_pictures(tmp_path / "data", count=1)
    Image.new("RGB", (192, 64), "red").save(data / "img00.png")
    edge = np.zeros((64, 192), np.uint8)
    edge[:, :32] = 255
    Image.fromarray(edge).save(data / "img00-masklabel.png")
    options = {"masked_loss": True, "aspect_ratio_buckets": False}
    with pytest.raises(UserError, match=r"masklabel.png: is black where img00.png is cut to 64×64"):
        runs.task(sd_folder, data, tmp_path, **options)
    with pytest.raises(UserError, match="is black where"):  # measured pictures are cut like this
        runs.task(sd_folder, data, tmp_path, **options, random_crop=True)


# --- a finished LoRA ------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_finished_lora(
    sd_folder: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"train_text_encoder": True, "save_dtype": "fp32"}
    _, first = runs.run(sd_folder, pictures, tmp_path / "first", **options)
    task, _, _ = runs.task(
        sd_folder, pictures, tmp_path / "second", **options, init_lora=str(first),
        lora_targets="linear", lora_alpha=8,
    )  # fmt: skip
    ups = {}
    for component, module in task.adapted.items():
        for layer in lora.layers(module):
            name = task.family.webui_name(component, layer.path)
            ups[f"{name}.lora_up.weight"] = layer.up * layer.alpha / layer.rank
    stored = load_file(first / "toy.safetensors")
    known = [name for name in stored if name.endswith("lora_up.weight")]
    assert known and len(ups) > len(known)
    for name in known:
        torch.testing.assert_close(ups[name], stored[name], rtol=1e-6, atol=1e-8)
    fresh = [up for name, up in ups.items() if name not in stored]
    assert not any(up.any() for up in fresh)
    assert f"{len(fresh)} layers are not in" in caplog.text
    plain, _, _ = runs.task(sd_folder, pictures, tmp_path / "third", **options)
    assert "init_lora" in task.fingerprint and "init_lora" not in plain.fingerprint


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lora_rank": 2}, "has the rank 4, not 2"),
        ({"lora_type": "dora"}, "one of the two is DoRA"),
        ({"lora_targets": ["to_q", "q_proj"]}, "carry no LoRA here"),
        ({"train_text_encoder": False}, "layers of text_encoder; train_text_encoder is false"),
    ],
)
def test_a_finished_lora_that_does_not_fit_is_refused_by_the_key(
    sd_folder: Path, pictures: Path, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    options: dict[str, Any] = {"train_text_encoder": True, "max_train_steps": 1}
    _, first = runs.run(sd_folder, pictures, tmp_path / "first", **options)
    with pytest.raises(UserError, match=what) as caught:
        runs.run(
            sd_folder, pictures, tmp_path / "b", **{**options, **changes}, init_lora=str(first)
        )
    assert "init_lora" in caught.value.problems[0].where


def test_targets_that_leave_out_a_module(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora_targets: .* none of these is a layer of unet"):
        runs.task(sd_folder, pictures, tmp_path, lora_targets=["q_proj"])
    with pytest.raises(UserError, match="none of these is a layer of text_encoder, which"):
        runs.task(sd_folder, pictures, tmp_path, lora_targets=["to_q"], train_text_encoder=True)


# --- samples before any learning ------------------------------------------------------------------

SQUARE = {"prompt": "a square", "steps": 4}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_base_is_drawn_after_the_first_step_as_if_there_had_been_none(
    sd_folder: Path, pictures: Path, tmp_path: Path, kind: str
) -> None:
    """The first thing that may fail is a step; samples of the base can wait for it."""
    options: dict[str, Any] = {
        "lora_type": kind, "lora_dropout": 0.2, "sample_prompts": [SQUARE], "sample_steps": 1,
        "max_train_steps": 1, "learning_rate": 0.1, "train_text_encoder": True,
    }  # fmt: skip
    _, output = runs.run(sd_folder, pictures, tmp_path, **options)
    family = build.load_family(build.find_base(str(sd_folder)), choose("cpu", "no"), Options())
    base = family.draw(DrawRequest("a square", "", 7.5, 4, 64, 64, seed=42))
    drawn = [np.asarray(Image.open(output / f"samples/step-{n:06d}_00.png")) for n in (0, 1)]
    assert np.array_equal(drawn[0], np.asarray(base))
    assert not np.array_equal(drawn[0], drawn[1])
    rows = map(json.loads, (output / "metrics.jsonl").read_text("utf-8").splitlines())
    first = next(row["time"] for row in rows if "loss" in row)
    assert (output / "samples/step-000000_00.png").stat().st_mtime > first


def test_what_goes_on_from_a_finished_lora_is_drawn_as_it_begins(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"sample_prompts": [SQUARE], "learning_rate": 0.1, "epochs": 1}
    _, first = runs.run(sd_folder, pictures, tmp_path / "first", **options)
    _, second = runs.run(sd_folder, pictures, tmp_path / "second", **options, init_lora=str(first))
    end, begin = (run / f"samples/step-{n:06d}_00.png" for run, n in ((first, 3), (second, 0)))
    there, here = (np.asarray(Image.open(path)).astype(int) for path in (end, begin))
    base = np.asarray(Image.open(first / "samples/step-000000_00.png")).astype(int)
    assert abs(there - here).max() <= 2  # written in fp16
    assert abs(there - base).max() > 20
