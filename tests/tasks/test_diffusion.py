"""The image task: formulas against diffusers and by hand, randomness as a function."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from lora_scripts.errors import UserError
from lora_scripts.models import lora
from lora_scripts.tasks.diffusion import DiffusionTask
from lora_scripts.tasks.noising import diffuse, min_snr_weight
from lora_scripts.tasks.task import Key, Split
from tests import runs, toys


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_velocity_are_those_of_diffusers(zero_snr: bool) -> None:
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    latents_BCHW, noise_BCHW = torch.randn(2, 3, 4, 8, 8)
    timesteps_B = torch.tensor([0, 500, 999])
    signal_B = scheduler.alphas_cumprod[timesteps_B]
    noisy, velocity = diffuse(latents_BCHW, noise_BCHW, signal_B, "v_prediction")
    torch.testing.assert_close(noisy, scheduler.add_noise(latents_BCHW, noise_BCHW, timesteps_B))
    torch.testing.assert_close(
        velocity, scheduler.get_velocity(latents_BCHW, noise_BCHW, timesteps_B)
    )
    assert torch.equal(diffuse(latents_BCHW, noise_BCHW, signal_B, "epsilon")[1], noise_BCHW)


def test_min_snr_weights_by_hand() -> None:
    # snr = 1, 9, 99 and, at zero terminal SNR, 0
    signal_B = torch.tensor([0.5, 0.9, 0.99, 0.0], dtype=torch.float64)
    expected_epsilon = torch.tensor([1.0, 5 / 9, 5 / 99, 1.0], dtype=torch.float64)
    expected_v = torch.tensor([1 / 2, 5 / 10, 5 / 100, 0.0], dtype=torch.float64)
    torch.testing.assert_close(min_snr_weight(signal_B, 5.0, "epsilon"), expected_epsilon)
    torch.testing.assert_close(min_snr_weight(signal_B, 5.0, "v_prediction"), expected_v)


def test_loss_is_a_sum_over_items_that_does_not_depend_on_the_batch(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    task, _, _ = runs.task(sd_folder, pictures, tmp_path)
    key = Key(7, "train", 3)
    together = task.loss(task.load((0, 1, 2, 3), key), key)
    alone = [task.loss(task.load((index,), key), key) for index in range(4)]
    assert together.count == 4
    total = sum(loss.total.item() for loss in alone)
    assert together.total.item() == pytest.approx(total, rel=1e-5)
    other_epoch = Key(7, "train", 4)
    other = task.loss(task.load((0, 1, 2, 3), other_epoch), other_epoch)
    assert other.total.item() != pytest.approx(together.total.item(), rel=1e-3)


def test_the_latents_are_the_vaes(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """The cached mean and deviation, scaled, are what diffusers' VAE gives for the pixels."""
    from diffusers import AutoencoderKL

    from lora_scripts.data.images import pixels_of, view_of

    task, _, _ = runs.task(sd_folder, pictures, tmp_path)
    vae = AutoencoderKL.from_pretrained(str(sd_folder / "vae"))
    pixels_BCHW = pixels_of(view_of(task.train_set.at(2), None, mirrored=False))[None]
    with torch.no_grad():
        expected = vae.encode(pixels_BCHW).latent_dist
    batch = task.load((2,), Key(0, "train", 0))
    torch.testing.assert_close(batch["mean"], expected.mean * vae.config.scaling_factor)
    torch.testing.assert_close(batch["std"], expected.std * vae.config.scaling_factor)


def test_flip_and_caption_dropout_follow_from_the_key_alone(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    task, _, _ = runs.task(
        sd_folder, pictures, tmp_path, random_flip=True, caption_dropout=0.25, repeats=40
    )
    plain, _, _ = runs.task(sd_folder, pictures, tmp_path, repeats=40)
    key = Key(7, "train", 0)
    empty = task.reader.prompts.read(task.reader.prompt_key(""))["embedding"]
    views = range(len(task.train_set))
    loaded = [task.load((view,), key) for view in views]
    again = [task.load((view,), key) for view in views]
    assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(loaded, again, strict=True))
    dropped = sum(torch.equal(batch["conditioning.embedding"][0], empty) for batch in loaded)
    assert dropped / len(views) == pytest.approx(0.25, abs=0.08)
    unflipped = [plain.load((view,), key)["mean"] for view in views]
    flipped = sum(
        not torch.equal(batch["mean"], other)
        for batch, other in zip(loaded, unflipped, strict=True)
    )
    assert flipped / len(views) == pytest.approx(0.5, abs=0.1)


def test_validation_is_the_same_every_time_and_spread_over_the_schedule(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    task, _, _ = runs.task(
        sd_folder, pictures, tmp_path, validation_split=0.34, random_flip=True, caption_dropout=0.9
    )
    assert len(task.train_set.pictures) == 4
    assert len(task.validation_set.pictures) == 2
    names = {p.record.name for p in task.train_set.pictures}
    assert names.isdisjoint(p.record.name for p in task.validation_set.pictures)
    key = Key(7, "validation", 0)
    views = range(len(task.validation_set))
    timesteps = sorted(task._draw(view, key, torch.Size([4, 8, 8]))[2] for view in views)
    assert len(views) == 16
    assert timesteps[0] < 63 and timesteps[-1] > 937
    assert max(b - a for a, b in pairwise(timesteps)) <= 63
    batch = task.load(tuple(views), key)
    assert torch.equal(task.loss(batch, key).total, task.loss(batch, key).total)


def test_a_plan_shows_every_view_once_in_an_order_of_its_epoch(
    sd_folder: Path, tmp_path: Path
) -> None:
    data = toys.save_pictures(tmp_path / "data", count=5)
    toys.save_pictures(tmp_path / "wide", count=0)
    task, _, _ = runs.task(sd_folder, data, tmp_path, repeats=3, batch_size=4)
    first, second = (task.plan(Key(1, "train", epoch)) for epoch in (0, 1))
    assert sorted(view for batch in first for view in batch) == list(range(15))
    assert first != second
    assert first == task.plan(Key(1, "train", 0))


def test_a_changed_file_or_setting_is_encoded_again_and_nothing_else(
    sd_folder: Path, tmp_path: Path
) -> None:
    data = toys.save_pictures(tmp_path / "data", count=4)
    entries = tmp_path / "cache" / "latents-v1"
    runs.task(sd_folder, data, tmp_path)
    first = {path: path.stat().st_mtime_ns for path in entries.rglob("*.safetensors")}
    assert len(first) == 4
    runs.task(sd_folder, data, tmp_path)
    assert first == {path: path.stat().st_mtime_ns for path in entries.rglob("*.safetensors")}

    again, _, _ = runs.task(sd_folder, data, tmp_path)
    again.family.encoders.visiting = None  # where all is there, no encoder is woken
    again.encode(lambda what, done, total: None)

    toys.save_pictures(tmp_path / "other", count=4, seed=9)
    (tmp_path / "other" / "img01.png").replace(data / "img01.png")
    runs.task(sd_folder, data, tmp_path)
    second = {path: path.stat().st_mtime_ns for path in entries.rglob("*.safetensors")}
    assert len(second) == 5 and first.items() <= second.items()

    runs.task(sd_folder, data, tmp_path, random_flip=True)
    assert len(list(entries.rglob("*.safetensors"))) == 9
    runs.task(sd_folder, data, tmp_path, resolution=128)
    assert len(list(entries.rglob("*.safetensors"))) == 13


def test_captions_get_prefix_trigger_and_suffix_and_keep_lora_names(
    sd_folder: Path, tmp_path: Path
) -> None:
    data = toys.save_pictures(tmp_path / "data", count=1)
    text = 'file_name,text\nimg00.png,"a cat <lora:style_v1>"\n'
    (data / "metadata.csv").write_text(text, encoding="utf-8")
    task, _, _ = runs.task(
        sd_folder, data, tmp_path,
        trigger_word="zwx", caption_prefix="photo of ", caption_suffix=", sharp",
    )  # fmt: skip
    assert task.train_set.at(0).captions[0] == "zwx, photo of a cat <lora:style_v1>, sharp"


def test_sizes_that_the_model_cannot_work_on_are_named_by_their_keys(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"run\.yaml line \d+: sample_prompts: found the width 60"):
        runs.run(sd_folder, pictures, tmp_path, sample_prompts=[{"prompt": "a", "width": 60}])
    with pytest.raises(UserError, match=r"run\.yaml line \d+: bucket_step: found 8; .* of 16"):
        runs.run(sd_folder, pictures, tmp_path, bucket_step=8)


# --- what a view shows -----------------------------------------------------------------------


def losses(task: DiffusionTask, split: Split = "train", count: int = 6) -> list[float]:
    key = Key(7, split, 1)
    return [task.loss(task.load((index,), key), key).total.item() for index in range(count)]


def test_live_latents_and_prompts_are_those_of_the_cache(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    cached, _, _ = runs.task(sd_folder, pictures, tmp_path / "a")
    live, _, _ = runs.task(
        sd_folder, pictures, tmp_path / "b", cache_latents=False, train_text_encoder=True
    )
    assert cached.reader.prompts_are_cached and cached.reader.latents_are_cached
    assert not live.reader.prompts_are_cached and not live.reader.latents_are_cached
    # nothing encoded, only what is known of the pictures
    assert {path.name for path in (tmp_path / "b/cache").iterdir()} == {"pictures-v1.sqlite"}
    assert losses(live) == pytest.approx(losses(cached), rel=1e-5)


def test_gradients_reach_the_text_encoder(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    task, _, _ = runs.task(sd_folder, pictures, tmp_path, train_text_encoder=True)
    assert list(task.adapted) == ["unet", "text_encoder"]
    assert task.learning_rates == {"unet": 1e-2, "text_encoder": 5e-3}
    key = Key(7, "train", 0)
    task.loss(task.load((0, 1), key), key).total.backward()
    ups = [p for n, p in lora.trainable(task.adapted["text_encoder"]).items() if "lora_B" in n]
    assert ups and all(p.grad is not None and p.grad.abs().max() > 0 for p in ups)


@pytest.mark.parametrize(("keep", "first_stays"), [(0, False), (1, False), (2, True)])
def test_tags_are_varied_by_the_key_and_never_when_measured(
    sd_folder: Path, tmp_path: Path, keep: int, first_stays: bool
) -> None:
    """The trigger word stays in front, and is the first of those that `keep_tokens` counts."""
    data = toys.save_pictures(tmp_path / "data", count=2)
    (data / "metadata.csv").write_text(
        'img00.png,"a, b, c, d, e"\nimg01.png,"f, g, h"\n', encoding="utf-8"
    )
    task, _, _ = runs.task(
        sd_folder, data, tmp_path, shuffle_tags=True, tag_dropout=0.3, keep_tokens=keep,
        trigger_word="zwx", repeats=10,
    )  # fmt: skip
    assert not task.reader.prompts_are_cached
    told = [task.reader.prompt(task.train_set.at(i), i, Key(7, "train", 0)) for i in range(20)]
    assert len(set(told)) > 10
    assert all(text.startswith("zwx") for text in told)
    assert all(text.startswith(("zwx, a", "zwx, f")) for text in told) == first_stays
    again = [task.reader.prompt(task.train_set.at(i), i, Key(7, "train", 0)) for i in range(20)]
    assert told == again
    measured = {task.reader.prompt(task.validation_set.at(i), i, Key(7, "validation", 0))
                for i in range(len(task.validation_set))}  # fmt: skip
    assert measured == {"zwx, a, b, c, d, e", "zwx, f, g, h"}
    assert len(set(losses(task, count=4))) == 4


def test_one_of_several_captions_is_drawn_and_all_are_cached(
    sd_folder: Path, tmp_path: Path
) -> None:
    data = toys.save_pictures(tmp_path / "data", count=1)
    text = "file_name,text,tags\nimg00.png,one,two\n"
    (data / "metadata.csv").write_text(text, encoding="utf-8")
    task, _, _ = runs.task(sd_folder, data, tmp_path, caption_keys=["text", "tags"], repeats=30)
    assert task.reader.prompts_are_cached
    told = {task.reader.prompt(task.train_set.at(i), i, Key(7, "train", 0)) for i in range(30)}
    assert told == {"one", "two"}


def test_the_loss_is_a_mean_over_what_the_mask_leaves(sd_folder: Path, tmp_path: Path) -> None:
    """Error under black does not count; by hand from the error of the whole picture."""
    data = toys.save_pictures(tmp_path / "data", count=2)
    for number, share in ((0, 2), (1, 4)):
        grey = np.zeros((64, 64), np.uint8)
        grey[:, : 64 // share] = 255
        Image.fromarray(grey).save(data / f"img{number:02d}-masklabel.png")
    task, _, _ = runs.task(sd_folder, data, tmp_path, masked_loss=True)
    key = Key(7, "train", 0)
    batch = task.load((0, 1), key)
    found = task.loss(batch, key)
    assert found.count == pytest.approx(1 / 2 + 1 / 4)
    latents = batch["mean"].shape[-1]
    total = 0.0
    for index, share in ((0, 2), (1, 4)):
        one = {**task.load((index,), key)}
        columns = torch.zeros(1, 1, 64, 64)
        for column in range(latents // share):
            columns[:] = 0
            columns[..., column * 8 : column * 8 + 8] = 1
            total += task.loss({**one, "mask": columns.clone()}, key).total.item()
    assert found.total.item() == pytest.approx(total, rel=1e-4)


def test_regularisation_counts_by_its_weight(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    kept = toys.save_pictures(tmp_path / "kept", count=2, seed=5)
    datasets = [{"path": str(pictures)}, {"path": str(kept), "role": "regularisation"}]
    both, _, _ = runs.task(
        sd_folder, pictures, tmp_path, train_data_dir=None, datasets=datasets,
        prior_loss_weight=0.25,
    )  # fmt: skip
    key = Key(7, "train", 0)
    views = sorted(view for batch in both.plan(key) for view in batch)
    assert views == list(range(12))  # as many as of the six pictures
    loss = both.loss(both.load((0, 6), key), key)
    alone = [both.loss(both.load((view,), key), key) for view in (0, 6)]
    assert [one.count for one in alone] == [1.0, 0.25]
    assert loss.count == 1.25
    assert loss.total.item() == pytest.approx(sum(one.total.item() for one in alone), rel=1e-5)
    assert both.items == 6
    assert "2 for regularisation" in both.describe()


def test_noise_offset_shifts_whole_channels(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    plain, _, _ = runs.task(sd_folder, pictures, tmp_path)
    offset, _, _ = runs.task(sd_folder, pictures, tmp_path, noise_offset=0.5)
    key, shape = Key(7, "train", 0), torch.Size((4, 8, 8))
    shift = offset._draw(3, key, shape)[1] - plain._draw(3, key, shape)[1]
    channels = shift.mean(dim=(1, 2))
    torch.testing.assert_close(shift, channels[:, None, None].expand(shape), rtol=0, atol=1e-6)
    assert len(set(channels.tolist())) == 4 and channels.abs().max() < 2


def test_a_run_with_everything_live_resumes_to_the_same_bits(
    sd_folder: Path, tmp_path: Path
) -> None:
    data = toys.save_pictures(tmp_path / "data", count=3, side=96)
    Image.new("RGB", (128, 64), "red").save(data / "img02.png")
    options = {
        "random_crop": True, "random_flip": True, "train_text_encoder": True, "shuffle_tags": True,
        "tag_dropout": 0.2, "caption_dropout": 0.1, "noise_offset": 0.1, "epochs": 3,
        "save_dtype": "fp32", "lora_targets": "all", "lora_dropout": 0.1,
    }  # fmt: skip
    _, whole = runs.run(sd_folder, data, tmp_path / "whole", **options)
    with runs.terminated(DiffusionTask, loss=3):
        runs.run(sd_folder, data, tmp_path / "parts", **options)
    _, parts = runs.run(sd_folder, data, tmp_path / "parts", **options)
    one, other = (load_file(run / "toy.safetensors") for run in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
