"""LoRAs and checkpoints of another base model are refused by their headers, before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_scripts import belonging, config, preflight, run_folder
from lora_scripts.errors import UserError
from lora_scripts.models import lora, skeleton
from lora_scripts.models.kinds import Family
from lora_scripts.models.signature import read_signature
from lora_scripts.models.text_signature import read_text_signature
from tests import lora_toys, runs, text_toys, toys
from tests.models import ldm_toy

PUBLISHED: dict[Family, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
}


def published_lora(path: Path, family: Family) -> Path:
    """A LoRA of rank 1 for a family's published layers, as kohya's scripts write it."""
    model: Any = skeleton.of(family)
    model.targets = lambda preset: {"unet": _some_layers(model), "text_encoder": _text(model)}
    return lora_toys.kohya(path, model, lora_toys.random_layers(model, rank=1))


def _some_layers(model: skeleton.Skeleton) -> list[str]:
    return [n for n, _ in model.adapted["unet"].named_modules() if n.endswith("attn2.to_k")]


def _text(model: skeleton.Skeleton) -> list[str]:
    return [n for n, _ in model.adapted["text_encoder"].named_modules() if n.endswith("q_proj")]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """A LoRA for each family's published layers."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        family: published_lora(folder / f"{family}.safetensors", family) for family in PUBLISHED
    }


def init_lora(folder: Path, base: Path, path: Path, **changes: Any) -> list[str]:
    """What the preflight says of a config with this `init_lora`."""
    data = toys.save_pictures(folder / "data")
    values = runs.values(base, data, folder, init_lora=str(path), **changes)
    _, problems = preflight.inputs(config.read(toys.write_config(folder / "my.yaml", **values)))
    return [str(problem).replace("\\", "/") for problem in problems]


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("other", ["sd1", "sd2", "sdxl"])
def test_a_lora_of_each_family_on_each_base(
    loras: dict[Family, Path], bases: dict[Family, Path], tmp_path: Path, family: Family,
    other: Family,
) -> None:  # fmt: skip
    (problem,) = init_lora(tmp_path, bases[family], loras[other])
    assert "init_lora: " in problem
    named = f"{loras[other]}: is a LoRA for {PUBLISHED[other]}; base_model is {PUBLISHED[family]}"
    if family != other:
        assert problem.endswith(named)
    else:  # the toy is narrower than the published model
        assert "is a LoRA for another model: lora_" in problem
        assert " in base_model, " in problem


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_lora_that_belongs_is_taken(
    bases: dict[Family, Path], tmp_path: Path, family: Family
) -> None:
    model: Any = skeleton.of_base(read_signature(bases[family]))
    model.targets = lambda preset: {"unet": _some_layers(model)}
    layers = lora_toys.random_layers(model)
    file = lora_toys.kohya(tmp_path / "x.safetensors", model, layers, original=family == "sdxl")
    assert init_lora(tmp_path, bases[family], file, lora_rank=2) == []
    folder = lora_toys.peft(tmp_path / "peft", layers)
    named = folder / "adapter_model.safetensors"
    assert init_lora(tmp_path, bases[family], named, lora_rank=2) == []


def test_keys_that_are_not_those_of_the_lora(loras: dict[Family, Path], tmp_path: Path) -> None:
    """Told without a base, too: it would be found out only after the data have been encoded."""
    path = loras["sd1"]
    nowhere = Path("someone/a-model")
    rank, text = init_lora(tmp_path, nowhere, path)
    assert rank.endswith("has the rank 1, not 4: lora_rank must be that of the file")
    assert text.endswith("which has layers of text_encoder; train_text_encoder is false")
    right = {"lora_rank": 1, "train_text_encoder": True}
    assert init_lora(tmp_path, nowhere, path, **right) == []
    (kind,) = init_lora(tmp_path, nowhere, path, **right, lora_type="dora")
    assert "which is not DoRA, and lora_type: dora: one of the two is DoRA" in kind
    assert init_lora(tmp_path, nowhere, path, **right, lora_type="rslora") == []


def test_of_a_base_that_is_not_here_nothing_is_said(
    loras: dict[Family, Path], tmp_path: Path
) -> None:
    keys = {"lora_rank": 1, "train_text_encoder": True}
    assert init_lora(tmp_path, Path("someone/a-model"), loras["sdxl"], **keys) == []


def test_what_is_no_lora_is_named(bases: dict[Family, Path], tmp_path: Path) -> None:
    (problem,) = init_lora(tmp_path, bases["sd1"], bases["sd1"] / "vae")
    assert "expected a .safetensors file or a folder with" in problem
    vae = bases["sd1"] / "vae" / "diffusion_pytorch_model.safetensors"
    (problem,) = init_lora(tmp_path, bases["sd1"], vae)
    assert "is no LoRA file that is known here" in problem


def test_an_image_model_under_text_generation_is_named(
    loras: dict[Family, Path], bases: dict[Family, Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "v1-5.safetensors"
    save_file(ldm_toy.ldm_tensors(ldm_toy.toy_modules()), checkpoint)
    said = {
        checkpoint: "this is a model for images (sd1): set task_type: image-generation",
        bases["sd1"] / "unet": "this is a part of a model for images (UNet2DConditionModel)",
        loras["sdxl"]: "this is a LoRA, not a base model. For task_type: text-generation name a ",
    }
    text_toys.write_jsonl(tmp_path / "rows.jsonl", text_toys.conversations(4))
    for path, what in said.items():
        values = runs.text_values(path, tmp_path / "rows.jsonl", tmp_path)
        found = preflight.inputs(config.read(toys.write_config(tmp_path / "a.yaml", **values)))[1]
        (problem,) = [each for each in found if each.severity == "error"]
        assert f"base_model: {path}: {what}" in str(problem)


@pytest.mark.parametrize("what", ["lora", "vae", "unet"])
def test_what_is_no_base_model_is_named(
    loras: dict[Family, Path], bases: dict[Family, Path], tmp_path: Path, what: str
) -> None:
    name = "diffusion_pytorch_model.safetensors"
    path = {
        "lora": loras["sdxl"],
        "vae": bases["sd1"] / "vae" / name,
        "unet": bases["sd1"] / "unet" / name,
    }[what]
    data = toys.save_pictures(tmp_path / "data")
    file = toys.write_config(tmp_path / "my.yaml", **runs.values(path, data, tmp_path))
    (problem,) = preflight.inputs(config.read(file))[1]
    said = {"lora": "this is a LoRA, not", "vae": "a VAE alone, not", "unet": "a UNet alone, not"}
    assert said[what] in str(problem)


# --- texts ----------------------------------------------------------------------------------------


def text_lora(folder: Path, model: Any, base_model: str) -> Path:
    """A PEFT folder with random matrices for the query projections of a model."""
    layers = []
    for path, module in model.named_modules():
        if path.endswith("q_proj"):
            out, inputs = module.weight.shape
            layers.append(_random(path, out, inputs))
    lora.write_peft(folder, layers, base_model)
    return folder


def _random(path: str, out: int, inputs: int) -> lora.AdaptedLayer:
    import torch

    return lora.AdaptedLayer(path, torch.randn(4, inputs), torch.randn(out, 4), 4.0)


def test_a_text_lora_of_another_base(tmp_path: Path) -> None:
    small, large = (text_toys.save_model(tmp_path / name) for name in ("small", "large"))
    (wide,) = large.glob("config.json")
    values = json.loads(wide.read_text(encoding="utf-8"))
    twice = {key: 2 * values[key] for key in ("hidden_size", "intermediate_size")}
    wide.write_text(json.dumps({**values, **twice}), encoding="utf-8")

    base = read_text_signature(small)
    modules = belonging.modules_of(base)
    assert modules is not None
    fitting = text_lora(tmp_path / "fitting", modules["model"], "small")
    belonging.check_lora(fitting, base)

    with pytest.raises(UserError) as caught:
        belonging.check_lora(fitting, read_text_signature(large))
    (problem,) = caught.value.problems
    assert "is a LoRA for another base model: model.model.layers.0.self_attn.q_proj is " in (
        problem.what
    )
    assert problem.what.endswith("; its adapter_config.json names small")

    path = fitting / "adapter_model.safetensors"
    deeper = {n.replace("layers.0.", "layers.7."): t for n, t in load_file(path).items()}
    save_file(deeper, path)
    with pytest.raises(UserError, match=r"layers\.7\.self_attn\.q_proj is no layer of base_model"):
        belonging.check_lora(fitting, base)


def test_of_a_model_with_code_of_its_own_nothing_is_known(tmp_path: Path) -> None:
    base = text_toys.save_model(tmp_path / "base")
    path = base / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "auto_map": {"AutoModel": "m.M"}}), encoding="utf-8")
    found = belonging.find(str(base), is_text=True)
    assert found is not None and belonging.modules_of(found) is not None  # transformers' own
    assert belonging.find(str(base), is_text=True, own_code=True) is None
    path.write_text(json.dumps({**values, "model_type": "nobody's"}), encoding="utf-8")
    found = belonging.find(str(base), is_text=True)
    assert found is not None and belonging.modules_of(found) is None


def test_a_text_lora_in_a_config(tmp_path: Path) -> None:
    base = text_toys.save_model(tmp_path / "base")
    text_toys.write_jsonl(tmp_path / "rows.jsonl", text_toys.conversations(4))
    stranger = tmp_path / "stranger"
    lora.write_peft(stranger, [_random("model.layers.0.self_attn.q_proj", 6, 10)], "other/model")
    values = runs.text_values(base, tmp_path / "rows.jsonl", tmp_path, init_lora=str(stranger))
    file = toys.write_config(tmp_path / "my.yaml", **values)
    problems = [p for p in preflight.inputs(config.read(file))[1] if p.severity == "error"]
    assert len(problems) == 1
    assert "init_lora" in problems[0].where
    assert "6×10 in the model it was made for; its adapter_config.json names other/model" in str(
        problems[0]
    )


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_of_another_base_is_refused_before_it_is_loaded(
    bases: dict[Family, Path], pictures: Path, tmp_path: Path
) -> None:
    code, _ = runs.run(bases["sd1"], pictures, tmp_path, max_train_steps=1, save_steps=1)
    assert code == 0
    same = runs.values(bases["sd1"], pictures, tmp_path, max_train_steps=1, save_steps=1)
    later = config.load(toys.write_config(tmp_path / "a.yaml", **{**same, "max_train_steps": 2}))
    assert run_folder.standing(later).checkpoint is not None

    other = {**same, "max_train_steps": 2, "base_model": str(bases["sdxl"])}
    with pytest.raises(UserError) as caught:
        run_folder.standing(config.load(toys.write_config(tmp_path / "b.yaml", **other)))
    first, second = caught.value.problems
    assert first.where.endswith("step-000001")
    assert first.what.startswith(f"was trained on another base model ({bases['sd1']}): unet.")
    assert second.where == "base_model" and "Ways on: put the old values back" in second.what


def test_a_text_checkpoint_of_another_base(tmp_path: Path) -> None:
    base = text_toys.save_model(tmp_path / "base")
    text_toys.write_jsonl(tmp_path / "rows.jsonl", text_toys.conversations(4))
    code, _ = runs.run_text(base, tmp_path / "rows.jsonl", tmp_path, epochs=1)
    assert code == 0
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings["intermediate_size"] *= 2
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    values = runs.text_values(base, tmp_path / "rows.jsonl", tmp_path, epochs=2)
    with pytest.raises(UserError, match=r"was trained on another base model .*mlp"):
        run_folder.standing(config.load(toys.write_config(tmp_path / "b.yaml", **values)))
