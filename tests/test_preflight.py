"""What is known before a GPU is used: paths, rows, the base model's kind, CUDA."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from lora_scripts import config, pipeline, preflight
from lora_scripts import environment as installed
from lora_scripts.data import looking
from lora_scripts.errors import UserError
from tests import text_toys
from tests.toys import save_pictures, write_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `data/style_train` with six pictures and their captions."""
    monkeypatch.chdir(tmp_path)
    return save_pictures(Path("data/style_train"))


def inputs(**values: object) -> list[str]:
    """What the preflight says about a config with these keys."""
    defaults = {"base_model": "someone/a-model", "train_data_dir": "data/style_train"}
    values = {"output_dir": "output/x", **values, "resolution": 64}
    file = write_config(Path("my.yaml"), **{**defaults, **values})
    _, problems = preflight.inputs(config.read(file))
    return [str(problem) for problem in problems]


def test_good_inputs(folder: Path) -> None:
    file = write_config(
        Path("my.yaml"),
        base_model="someone/a-model",
        train_data_dir="data/style_train",
        output_dir="output/x",
        resolution=64,
    )
    rows, problems = preflight.inputs(config.read(file))
    assert problems == []
    assert len(rows) == 6
    assert {dataset.path for _, dataset in rows} == {folder}
    assert not Path("output").exists()  # looking changes nothing


# --- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "what"),
    [
        (
            "data/style_trian",
            "found data/style_trian, but there is no such folder; did you mean data/style_train?",
        ),
        ("nowhere/style", "found nowhere/style, but there is no such folder, nor nowhere"),
        ("data/style_train/img00.png", "but that is a file, not a folder"),
        ("x" * 300, "but it cannot be looked at"),
    ],
)
def test_data_folder_not_there(folder: Path, named: str, what: str) -> None:
    (problem,) = inputs(train_data_dir=named)
    assert problem.startswith("my.yaml line 2: train_data_dir: found ")
    assert what in problem.replace("\\", "/")


def test_each_dataset_is_looked_at_also_beside_a_mistake(folder: Path) -> None:
    datasets = [{"path": "data/style_train"}, {"path": "data/other"}]
    first, second = inputs(train_data_dir=None, datasets=datasets, lora_rnk=8)
    assert first == "my.yaml line 5: lora_rnk: unknown key; did you mean lora_rank?"
    assert second.startswith("my.yaml line 4: datasets.1.path: found data")


@pytest.mark.parametrize("beyond", ["", "/deeper/still"])
def test_output_under_a_file(folder: Path, beyond: str) -> None:
    Path("taken").write_text("", encoding="utf-8")
    (problem,) = inputs(output_dir=f"taken{beyond}")
    what = f"my.yaml line 3: output_dir: found taken{beyond}, but taken is a file, not a folder"
    assert problem == what


def test_long_output_name(folder: Path) -> None:
    (problem,) = inputs(output_dir="x" * 300, output_name="x")
    assert "but it cannot be looked at" in problem


# --- rows ---------------------------------------------------------------------------------------


def test_output_that_holds_something_else(folder: Path) -> None:
    Path("project").mkdir()
    assert inputs(output_dir="project") == []
    Path("project/README.md").write_text("mine", encoding="utf-8")
    (problem,) = inputs(output_dir="project")
    assert "found project, which holds README.md but no run; name a folder for the run" in problem
    Path("project/metrics.jsonl").write_text("", encoding="utf-8")
    assert inputs(output_dir="project") == []


@pytest.mark.parametrize("output", ["data/style_train", "data/style_train/output"])
def test_output_among_the_pictures(folder: Path, output: str) -> None:
    (problem,) = inputs(output_dir=output)
    assert problem.startswith("my.yaml line 3: output_dir: ")
    assert "which lies in the data folder data/style_train; name another place" in problem


def test_metadata_not_there(folder: Path) -> None:
    (problem,) = inputs(metadata_path="data/style_train/captions.csv")
    assert "captions.csv: there is no such file" in problem


def test_damaged_picture(folder: Path) -> None:
    (folder / "img01.png").write_bytes(b"no picture")
    (problem,) = inputs()
    assert "img01.png" in problem
    assert "(metadata.csv line 3)" in problem


def test_a_lora_to_go_on_from_that_is_not_there(folder: Path) -> None:
    wanted = "expected a .safetensors file or a folder with pytorch_lora_weights.safetensors"
    assert inputs(init_lora="old") == [f"my.yaml line 4: init_lora: found old; {wanted}"]
    assert inputs(init_lora="data") == [f"my.yaml line 4: init_lora: found data; {wanted}"]
    Path("old").mkdir()
    Path("old/pytorch_lora_weights.safetensors").touch()
    (problem,) = inputs(init_lora="old")
    assert "init_lora: old" in problem and "the file is empty" in problem


def test_a_vae_that_is_not_there_or_none(folder: Path) -> None:
    (message,) = inputs(vae="data/style_train/vae.safetensors")
    assert message.startswith("my.yaml line 4: vae: data/style_train/vae.safetensors: no such file")
    (message,) = inputs(vae="data/style_train/img00.png")
    assert "line 4: vae: data/style_train/img00.png" in message


def test_columns_of_captions_that_are_not_there(folder: Path) -> None:
    (message,) = inputs(caption_keys=["text", "tags"])
    assert message == (
        'metadata.csv: no column "tags", which caption_keys needs; '
        'its first line: "file_name", "text"'
    )
    text = '{"file_name": "img00.png", "text": "a"}\n'
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    (message, *_) = inputs(caption_keys=["tags"], metadata_path=str(folder / "metadata.jsonl"))
    assert message.startswith('metadata.jsonl line 1: no "tags"; found "file_name", "text"')
    # with a mistake elsewhere the columns are the same
    assert len(inputs(caption_keys=["text"], lora_rank=0)) == 1
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").unlink()
    (folder / "img00.txt").write_text("a", encoding="utf-8")
    messages = inputs(train_data_dir=None, datasets=[{"path": str(folder), "caption_keys": ["a"]}])
    assert any(m.startswith("my.yaml line 4: datasets.0.caption_keys: needs") for m in messages)


def test_masks_that_are_not_there(folder: Path) -> None:
    (message,) = inputs(masked_loss=True, mask_dir="masks")
    assert message == "my.yaml line 5: mask_dir: found masks, but there is no such folder"
    (message,) = inputs(
        train_data_dir=None, masked_loss=True,
        datasets=[{"path": str(folder), "mask_dir": "masks"}],
    )  # fmt: skip
    assert "datasets.0.mask_dir: found masks, but there is no such folder" in message
    (message,) = inputs(masked_loss=True)
    assert message.startswith("my.yaml line 4: masked_loss: is true, but no picture has a mask")
    Path("masks").mkdir()
    messages = inputs(masked_loss=True, mask_dir="masks")
    assert len(messages) == 6 and "no mask for img00.png in masks" in messages[0]


def test_an_optimizer_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inputs(optimizer="prodigy") == []
    monkeypatch.setitem(preflight.OPTIMIZER_PACKAGES, "prodigy", "no-such-package")
    assert inputs(optimizer="prodigy") == [
        "my.yaml line 4: optimizer: found prodigy, which needs a package that is not installed: "
        "pip install no-such-package"
    ]


def test_all_kinds_of_mistakes_in_one_answer(folder: Path) -> None:
    with (folder / "metadata.csv").open("a", encoding="utf-8") as stream:
        stream.write("img99.png,a picture that is not there\nimg00.png, a comma, no quotes\n")
    file = Path("my.yaml")
    file.write_text(
        "base_model: ./models/v1-5.ckpt\n"
        "train_data_dir: data/style_train\n"
        "output_dir: my.yaml/x\n"
        "lora_rnk: 8\n"
        "batch_size: four\n",
        encoding="utf-8",
    )
    Path("models").mkdir()
    Path("models/v1-5.ckpt").write_bytes(b"\x80")
    with pytest.raises(UserError) as caught:
        pipeline.run(file)
    expected = [
        "my.yaml line 4: lora_rnk: unknown key; did you mean lora_rank?",
        'my.yaml line 5: batch_size: found the text "four", must be auto, or a whole number',
        "my.yaml line 1: base_model: models/v1-5.ckpt: a .ckpt file is a Python pickle",
        "my.yaml line 3: output_dir: found my.yaml/x, but my.yaml is a file, not a folder",
        "metadata.csv line 8: ",
        "metadata.csv line 9: 3 fields found, expected 2",
    ]
    found = [str(problem).replace("\\", "/") for problem in caught.value.problems]
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


# --- base model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "MODEL.CKPT"])
def test_pickles_are_refused_with_the_way_out(folder: Path, name: str) -> None:
    Path(name).write_bytes(b"PK\x03\x04")
    (problem,) = inputs(base_model=name)
    assert problem.startswith("my.yaml line 1: base_model: ")
    assert "is a Python pickle" in problem
    assert "save it as .safetensors" in problem


def test_base_model_not_there(folder: Path) -> None:
    Path("models").mkdir()
    Path("models/v1-5-pruned.safetensors").write_bytes(b"")
    (problem,) = inputs(base_model="./models/v1-5-prunned.safetensors")
    assert "no such file or folder; did you mean models/v1-5-pruned.safetensors?" in (
        problem.replace("\\", "/")
    )


def test_an_empty_model_is_refused(folder: Path) -> None:
    Path("model.safetensors").write_bytes(b"")
    (problem,) = inputs(base_model="model.safetensors")
    assert "the file is empty" in problem


# --- the device ---------------------------------------------------------------------------------


def test_a_card_that_is_not_there_is_refused_before_anything_is_loaded(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    preflight.environment("auto")
    preflight.environment("cpu")
    file = write_config(
        Path("my.yaml"), base_model="someone/a-model", train_data_dir="data/style_train",
        output_dir="output/x", resolution=64, device="cuda",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        pipeline.run(file)
    assert str(caught.value) == (
        "my.yaml line 5: device: found no NVIDIA card; needed: one, for device: cuda. What to do:\n"
        "  device: auto or cpu in the config"
    )
    assert not Path("output").exists()


def test_packages_of_other_versions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is missing stops a run, one that is not known to work is named."""
    wanted = installed.parse_needs(["rich>=99", "torch>=2.9"])
    monkeypatch.setattr(installed, "needs", lambda: wanted)
    preflight.environment("cpu")
    (line,) = caplog.messages
    assert line.startswith("rich: found 1") and '-m pip install "rich>=99"' in line
    wanted += installed.parse_needs(["no-such-package<2,>=1"])
    with pytest.raises(UserError) as caught:
        preflight.environment("cpu")
    said = "no-such-package: found not installed; needed: >=1, <2. What to do:\n"
    assert str(caught.value).startswith(said)


# --- texts --------------------------------------------------------------------------------------


def text_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> list[str]:
    """What the preflight says of a text config with these keys."""
    monkeypatch.chdir(tmp_path)
    defaults = {"task_type": "text-generation", "base_model": "someone/a-model"}
    more = {"train_data_dir": "rows.jsonl", "output_dir": "output/x"}
    file = write_config(Path("my.yaml"), **{**defaults, **more, **values})
    _, problems = preflight.inputs(config.read(file))
    return [str(problem) for problem in problems]


def test_text_data_may_be_a_file_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = text_toys.conversations(4)
    text_toys.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert text_inputs(tmp_path, monkeypatch) == []
    text_toys.write_jsonl(tmp_path / "folder" / "rows.jsonl", rows)
    assert text_inputs(tmp_path, monkeypatch, train_data_dir="folder") == []
    (problem,) = text_inputs(tmp_path, monkeypatch, train_data_dir="row.jsonl")
    assert problem.endswith("there is no such file; did you mean rows.jsonl?")


def test_all_mistakes_of_a_text_config_and_its_data_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*text_toys.conversations(2), {"mesages": []}, {"prompt": "a"}]
    text_toys.write_jsonl(tmp_path / "rows.jsonl", rows)
    found = text_inputs(
        tmp_path, monkeypatch, lora_rnk=8, base_model="nowhere/model.gguf", max_seq_length=4
    )
    places = [problem.split(":")[0] for problem in found]
    assert places == [
        "my.yaml line 5", "my.yaml line 6", "my.yaml line 2", "rows.jsonl line 3",
        "rows.jsonl line 4",
    ]  # fmt: skip


def test_an_image_model_under_a_text_config_and_the_reverse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd_folder: Path
) -> None:
    text_toys.write_jsonl(tmp_path / "rows.jsonl", text_toys.conversations(4))
    (problem,) = text_inputs(tmp_path, monkeypatch, base_model=str(sd_folder))
    assert "a diffusers folder, a model for images: set task_type: image-generation" in problem
    llama = text_toys.save_model(tmp_path / "llama")
    save_pictures(tmp_path / "pictures")
    file = write_config(
        Path("image.yaml"), base_model=str(llama), train_data_dir="pictures", output_dir="o",
        resolution=64,
    )  # fmt: skip
    (found,) = preflight.inputs(config.read(file))[1]
    assert "set `task_type: text-generation`" in str(found)


def test_a_disk_without_room_for_the_checks_is_a_problem_among_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(looks: looking.Looks, look: looking.Look) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(looking.Looks, "add", full)
    found = inputs(lora_rnk=8)
    assert "lora_rnk" in found[0] and found[1:] == ["somewhere: No space left on device"]
