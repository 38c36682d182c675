"""Each captioner with a toy of the genuine class, found and loaded from its folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    Florence2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.label import captioner, florence2, generation, vlm
from lora_scripts.label.captioner import Settings
from lora_scripts.label.processors import open_processor
from tests.label import toys, vlm_toys

SHORT = {"max_new_tokens": 8}
TOYS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "blip": ("blip", toys.toy_blip),
    "blip2": ("blip2", toys.toy_blip2),
    "florence2": ("florence2", toys.toy_florence2),
    "qwen2_vl": ("vlm", vlm_toys.toy_qwen2_vl),
    "qwen3_vl": ("vlm", vlm_toys.toy_qwen3_vl),
    "smolvlm": ("vlm", vlm_toys.toy_smolvlm),
    "llava": ("vlm", vlm_toys.toy_llava),
}
every_toy = pytest.mark.parametrize("toy", TOYS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("模型")
    return {toy: make(root / toy) for toy, (_, make) in TOYS.items()}


def captions(
    folders: dict[str, Path], toy: str, pictures: Sequence[Image.Image], **settings: Any
) -> list[str]:
    name = TOYS[toy][0]
    path = captioner.find(name, str(folders[toy]))
    return captioner.load(name, path, Settings(**{**SHORT, **settings}), "cpu")(pictures)


def shapes() -> list[Image.Image]:
    """Pictures of three shapes."""
    first, second, third = toys.pictures(3)
    return [first, second.resize((96, 48)), third.resize((30, 64))]


# --- what transformers itself says --------------------------------------------------------------


def direct(cls: Any, path: Path, pictures: list[Image.Image], text: str | None) -> Any:
    processor, model = AutoProcessor.from_pretrained(path), cls.from_pretrained(path)
    texts = None if text is None else [text] * len(pictures)
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8)
    return processor, inputs["input_ids"].shape[1] if texts else 0, tokens


@pytest.mark.parametrize("beginning", [None, "a red"])
def test_blip_says_what_transformers_says(folders: Any, beginning: str | None) -> None:
    cls = BlipForConditionalGeneration
    processor, _, tokens = direct(cls, folders["blip"], shapes(), beginning)
    expected = [t.strip() for t in processor.batch_decode(tokens, skip_special_tokens=True)]
    found = captions(folders, "blip", shapes(), prompt=beginning)
    assert found == expected
    assert len(set(found)) == 3
    assert all(text.startswith(beginning or "") for text in found)


def test_blip2_says_what_transformers_says(folders: Any) -> None:
    path, question = folders["blip2"], "Question: what is it? Answer:"
    processor, asked, tokens = direct(Blip2ForConditionalGeneration, path, shapes(), question)
    expected = processor.batch_decode(tokens[:, asked:], skip_special_tokens=True)
    found = captions(folders, "blip2", shapes(), prompt=question)
    assert found == [text.strip() for text in expected]
    assert len(set(found)) == 3


def test_blip2_captions_as_transformers_does_without_a_text(folders: Any) -> None:
    processor = AutoProcessor.from_pretrained(folders["blip2"])
    model = Blip2ForConditionalGeneration.from_pretrained(folders["blip2"])
    pixels = processor(images=shapes(), return_tensors="pt")["pixel_values"]
    tokens = model.generate(pixel_values=pixels, max_new_tokens=8)[:, -8:]
    expected = processor.batch_decode(tokens, skip_special_tokens=True)
    assert captions(folders, "blip2", shapes()) == [text.strip() for text in expected]


def test_florence2_says_what_transformers_says(folders: Any) -> None:
    cls, task = Florence2ForConditionalGeneration, "<CAPTION>"
    processor, _, tokens = direct(cls, folders["florence2"], shapes()[:1], task)
    text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
    answer = processor.post_process_generation(text, task=task, image_size=(48, 48))[task]
    assert captions(folders, "florence2", shapes(), prompt=task)[0] == answer


def test_florence2_names_objects_once(folders: Any) -> None:
    processor = open_processor(florence2.Florence2Processor, folders["florence2"])
    processor.tokenizer.add_tokens([f"<loc_{number}>" for number in range(4)])
    box = "<loc_0><loc_1><loc_2><loc_3>"
    ids = processor.tokenizer(f"<s>cat{box}dog{box}cat{box}</s><pad><pad>")["input_ids"]
    assert florence2._answer(processor, torch.tensor(ids), "<OD>", (48, 48)) == "cat, dog"


def test_florence2_leaves_out_the_pads_of_a_shorter_answer(folders: Any) -> None:
    processor = open_processor(florence2.Florence2Processor, folders["florence2"])
    ids = processor.tokenizer("</s><s>a cat</s><pad><pad>")["input_ids"]
    assert florence2._answer(processor, torch.tensor(ids), "<CAPTION>", (48, 48)) == "a cat"


def test_llava_says_what_transformers_says(folders: Any) -> None:
    text = f"User: <image>{vlm.PROMPT}\nAssistant:"
    cls = LlavaForConditionalGeneration
    processor, asked, tokens = direct(cls, folders["llava"], toys.pictures(3), text)
    expected = processor.batch_decode(tokens[:, asked:], skip_special_tokens=True)
    found = captions(folders, "llava", toys.pictures(3))
    assert found == [text.strip() for text in expected]
    assert len(set(found)) == 3


# --- chat models: the processor that is put together without torchvision ------------------------


@pytest.mark.parametrize(("toy", "side", "least"), [("qwen2_vl", 28, 56), ("qwen3_vl", 32, 64)])
@pytest.mark.parametrize("size", [(70, 70), (120, 70), (70, 150)])
def test_qwen_gets_one_token_for_each_feature(
    folders: Any, toy: str, side: int, least: int, size: tuple[int, int]
) -> None:
    path = folders[toy]
    processor = open_processor(vlm.processor_class(path), path)
    text = "<|vision_start|><|image_pad|><|vision_end|>What?"
    picture = toys.pictures(1)[0].resize(size)
    inputs = processor(images=[[picture]], text=[text], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(path)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert count == sum(len(part) for part in features.pooler_output)
    wide, high = (max(least, round(length / side) * side) for length in size)
    assert count == (wide // side) * (high // side)
    assert int(inputs["mm_token_type_ids"].sum()) == count


def test_smolvlm_gets_what_its_own_processor_makes(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own asks for num2words, which only videos use."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    path = folders["smolvlm"]
    ours, its = (
        open_processor(vlm.processor_class(path), path),
        open_processor(SmolVLMProcessor, path),
    )
    for picture in shapes():
        told = {"images": [[picture]], "text": ["User: <image>What?"], "return_tensors": "pt"}
        found, expected = ours(**told), its(**told)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert (found["input_ids"] == ours.image_token_id).sum() == 4 * found["pixel_values"].shape[
            1
        ]


@pytest.mark.parametrize("toy", ["qwen2_vl", "qwen3_vl", "smolvlm", "llava"])
def test_the_answer_follows_the_picture(folders: Any, toy: str) -> None:
    first, second = toys.pictures(2)
    assert captions(folders, toy, [first, second, first])[2] == captions(folders, toy, [first])[0]
    assert captions(folders, toy, [first]) != captions(folders, toy, [second])


def test_large_pictures_are_made_smaller_for_chat_models() -> None:
    smaller = vlm._smaller(Image.new("RGB", (4000, 1000)))
    assert smaller.size == (2048, 512)
    assert vlm._smaller(Image.new("RGB", (1024, 1024))).size == (1024, 1024)
    assert vlm._smaller(Image.new("RGB", (2_000_000, 1))).height == 1


def test_a_template_in_the_tokenizers_file_will_do(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "copy")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        captioner.load("vlm", folder, Settings(), "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    found = captioner.load("vlm", folder, Settings(max_new_tokens=8), "cpu")(shapes())
    assert found == captions(folders, "qwen2_vl", shapes())


# --- batches and draws --------------------------------------------------------------------------


@every_toy
@pytest.mark.parametrize("how", [{}, {"num_beams": 4}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_batch_gives_what_single_calls_give(folders: Any, toy: str, how: Any) -> None:
    name = TOYS[toy][0]
    caption = captioner.load(name, folders[toy], Settings(**SHORT, **how), "cpu")
    together = caption(shapes())
    assert together == [caption([picture])[0] for picture in shapes()]
    assert together == list(reversed(caption(shapes()[::-1])))
    assert len(set(together)) == 3


def test_a_draw_follows_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draw = generation.Draw(Settings(temperature=2.0), toys.pictures(1))
    drawn = [int(draw(torch.empty(1, 0), logits).argmax()) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    expected = (logits[0] / 2).softmax(0).numpy()  # 0.46, 0.28, 0.17, 0.10
    assert np.abs(shares - expected).max() < 0.025


def test_each_picture_is_drawn_for_by_itself() -> None:
    first, second = toys.pictures(2)
    draw = generation.Draw(Settings(temperature=1.0), [first, second, first])
    noise = draw(torch.empty(3, 0), torch.zeros(3, 5))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, draw(torch.empty(3, 1), torch.zeros(3, 5)))  # the next place


def test_top_p_keeps_the_shortest_beginning_that_reaches_it() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3], [0.05, 0.05, 0.9]]).log()
    kept = generation.likeliest(logits, 0.6).isfinite()
    assert kept.tolist() == [[False, True, True], [False, False, True]]
    assert generation.likeliest(logits, 1.0).isfinite().all()


# --- settings -----------------------------------------------------------------------------------

DRAWN = {"temperature": 1.5}
ACTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"max_new_tokens": 2}),
    ({"num_beams": 1}, {"num_beams": 5}),
    ({"num_beams": 1}, DRAWN),
    (DRAWN, {**DRAWN, "top_p": 0.05}),
    (DRAWN, {**DRAWN, "seed": 43}),
]


@every_toy
def test_every_setting_acts(folders: Any, toy: str) -> None:
    prompt = "<CAPTION>" if toy == "florence2" else "a red"
    for without, with_it in [*ACTS, ({}, {"prompt": prompt})]:
        changed = captions(folders, toy, shapes(), **with_it)
        assert changed != captions(folders, toy, shapes(), **without), with_it


def test_temperature_zero_is_not_random(folders: Any) -> None:
    assert captions(folders, "blip", shapes(), temperature=0.0) == captions(
        folders, "blip", shapes()
    )


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("blip", {}, []),
        ("wd14", {"threshold": 0.2, "underscores": True}, []),
        ("blip", {"temperature": 0.7, "top_p": 0.9, "seed": 1}, []),
        ("wd14", {"num_beams": 3, "prompt": "a"}, ["--num-beams", "--prompt"]),
        ("vlm", {"character_threshold": 0.9}, ["--character-threshold"]),
        ("florence2", {"escape_parentheses": True}, ["--escape-parentheses"]),
        ("blip", {"top_p": 0.9, "seed": 1}, ["--top-p", "--seed"]),
        ("blip", {"top_p": 0.9, "temperature": 0.0}, ["--top-p"]),
        ("blip2", {"temperature": 0.5, "num_beams": 4}, ["--num-beams"]),
    ],
)
def test_misfits(name: str, settings: Any, options: list[str]) -> None:
    assert [p.where for p in captioner.misfits(name, Settings(**settings))] == options


def test_florence2_refuses_what_is_no_task(folders: Any) -> None:
    with pytest.raises(UserError, match=r"--prompt: found 'describe'.*<DETAILED_CAPTION>"):
        captions(folders, "florence2", shapes(), prompt="describe")


# --- where weights lie, and which ---------------------------------------------------------------


def refusal(name: str, model: str | Path | None) -> str:
    with pytest.raises(UserError) as caught:
        captioner.find(name, None if model is None else str(model))
    return str(caught.value)


@every_toy
def test_recognised(folders: Any, toy: str) -> None:
    assert captioner.recognise(folders[toy]) == TOYS[toy][0]


def test_weights_of_another_captioner(folders: Any) -> None:
    assert "these weights are for --captioner vlm, not blip" in refusal("blip", folders["llava"])
    message = refusal("wd14", folders["blip"])
    assert "these weights are for --captioner blip, not wd14" in message
    assert "`hf download SmilingWolf/wd-swinv2-tagger-v3 --local-dir" in message


def test_no_such_folder(tmp_path: Path) -> None:
    message = refusal("blip2", tmp_path / "nothing")
    assert "no such file or folder" in message
    assert "`hf download Salesforce/blip2-opt-2.7b --local-dir models/blip2-opt-2.7b`" in message
    assert message.endswith("--model models/blip2-opt-2.7b")


@pytest.mark.parametrize("name", captioner.NAMES)
def test_offline_without_weights(tmp_path: Path, name: str) -> None:
    code = "import sys; from lora_scripts.label import captioner; captioner.find(sys.argv[1], None)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(captioner.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, name],
        env={**environment, "PYTHONPATH": str(root), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        timeout=60,
    )
    message = result.stderr.strip().splitlines()[-1]
    assert "the hub cannot be reached" in message
    assert f"`hf download {captioner.DEFAULT_MODELS[name]} --" in message
    assert "--local-dir models/" in message


@pytest.fixture
def blip(folders: Any, tmp_path: Path) -> Path:
    return shutil.copytree(folders["blip"], tmp_path / "blip")


def test_only_pickles(blip: Path) -> None:
    (blip / "model.safetensors").rename(blip / "pytorch_model.bin")
    assert "there is only pytorch_model.bin; pickles can run any code" in refusal("blip", blip)


def test_no_weights(blip: Path) -> None:
    (blip / "model.safetensors").unlink()
    message = refusal("blip", blip)
    assert "there are no .safetensors weights (pickles are neither fetched nor opened)" in message
    assert "-base --revision refs/pr/50 --local-dir" in message  # its main branch has a pickle only


def test_half_a_file(blip: Path) -> None:
    content = (blip / "model.safetensors").read_bytes()
    (blip / "model.safetensors").write_bytes(content[:-100])
    assert "the file is damaged" in refusal("blip", blip)


def test_a_part_that_the_index_names(blip: Path) -> None:
    (blip / "model.safetensors").rename(blip / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "two.safetensors"}}'
    (blip / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    assert "there is no two.safetensors" in refusal("blip", blip)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("processor_config.json", "neither preprocessor_config.json nor processor_config.json"),
        ("tokenizer.json", "there is no tokenizer"),
        ("config.json", "there is neither config.json nor model.onnx"),
    ],
)
def test_a_missing_small_file(blip: Path, file: str, said: str) -> None:
    (blip / file).unlink()
    assert said in refusal("blip", blip)


def test_the_demo_away_from_the_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(captioner, "DEMO_FOLDER", tmp_path / "captioner")
    assert "the demo comes with the source tree" in refusal("blip", captioner.DEMO)


def test_a_file_for_a_folder(blip: Path) -> None:
    assert "name the folder" in refusal("blip", blip / "model.safetensors")


def test_microsofts_own_florence2(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["florence2"], tmp_path / "florence2")
    config = (folder / "config.json").read_text(encoding="utf-8")
    config = config.replace("{", '{"auto_map": {"AutoConfig": "configuration_florence2.C"},', 1)
    (folder / "config.json").write_text(config, encoding="utf-8")
    message = refusal("florence2", folder)
    assert "these are Microsoft's own files of Florence-2" in message
    assert "`hf download florence-community/Florence-2-base --local-dir" in message


def test_a_language_model_sees_nothing(blip: Path) -> None:
    (blip / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    assert "the model type 'qwen2', which describes no pictures" in refusal("vlm", blip)


def test_a_model_that_sees_and_does_not_talk(blip: Path) -> None:
    config = '{"model_type": "clip", "vision_config": {}, "text_config": {}}'
    (blip / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match="no chat model for pictures of the type 'clip'"):
        captioner.load("vlm", captioner.find("vlm", str(blip)), Settings(), "cpu")


def test_a_blip_for_another_purpose(blip: Path) -> None:
    """Its missing parts would be random numbers."""
    config = BlipForConditionalGeneration.from_pretrained(blip).config
    answers = BlipForQuestionAnswering(config).state_dict()
    kept = {k: v for k, v in answers.items() if not k.startswith("text_decoder")}
    BlipForQuestionAnswering(config).save_pretrained(blip, state_dict=kept)
    with pytest.raises(UserError, match="parts of the model are not there"):
        captioner.load("blip", captioner.find("blip", str(blip)), Settings(), "cpu")


def test_pixels_come_in_the_precision_of_the_weights(blip: Path) -> None:
    compute = Compute(torch.device("cpu"), "bf16")
    model = generation.open_model(BlipForConditionalGeneration, blip, compute)
    inputs = AutoProcessor.from_pretrained(blip)(toys.pictures(1), text="a", return_tensors="pt")
    told = generation.tensors(inputs, compute)
    assert told["pixel_values"].dtype == model.dtype == torch.bfloat16
    assert told["input_ids"].dtype == torch.int64
    assert generation.compute_on("cpu").dtype == torch.float32
    assert model.generate(**told, max_new_tokens=4).shape[0] == 1


def test_cuda_that_is_not_there(blip: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(UserError, match="found cuda"):
        captioner.load("blip", blip, Settings(), "cuda")
