"""The schema: every mistake answered with its place, and every shipped YAML right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_scripts import config, reference, schema, yaml_source
from lora_scripts.errors import UserError
from lora_scripts.schema import ImageConfig, ImageDataset, TextConfig, other_names

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
GOOD = "base_model: m\ntrain_data_dir: d\noutput_dir: out/my_style\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path for a config; the working directory is its folder, so that names are short."""
    monkeypatch.chdir(tmp_path)
    return Path("my.yaml")


def load(file: Path, text: str, *overrides: str) -> Any:
    file.write_text(text, encoding="utf-8")
    return config.load(file, overrides)


def problems(file: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(file, text, *overrides)
    return [str(problem) for problem in caught.value.problems]


# --- what a good config means ---------------------------------------------------------------------


def test_defaults_are_resolved(file: Path) -> None:
    found = load(file, GOOD + "lora_rank: 24\n")
    assert found.task_type == "image-generation"
    assert found.lora_alpha == 24
    assert found.output_name == "my_style"
    assert (found.seed, found.mixed_precision, found.resume) == (42, "auto", "auto")
    (dataset,) = found.all_datasets()
    assert (dataset.path, dataset.metadata_path, dataset.repeats) == (Path("d"), None, 1)


def test_written_values_win(file: Path) -> None:
    text = GOOD + "lora_alpha: 4\noutput_name: 赛博\nrepeats: 3\nmetadata_path: d/m.csv\n"
    found = load(file, text)
    assert (found.lora_alpha, found.output_name) == (4.0, "赛博")
    (dataset,) = found.all_datasets()
    assert (dataset.metadata_path, dataset.repeats) == (Path("d/m.csv"), 3)


def test_the_promised_config(file: Path) -> None:
    text = """\
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/Stable-diffusion/v1-5-pruned.safetensors"
lora_rank: 8
batch_size: 4
epochs: 10
learning_rate: 2e-4
output_dir: "./output/my_style_lora"
save_steps: 100
"""
    found = load(file, text)
    assert found.learning_rate == 0.0002
    assert found.lora_alpha == 8
    assert found.output_name == "my_style_lora"


def test_datasets(file: Path) -> None:
    text = "base_model: m\noutput_dir: o\ndatasets:\n"
    text += "- {path: a, repeats: 2}\n- path: b\n  role: validation\n"
    first, second = load(file, text).all_datasets()
    assert (first.path, first.repeats, first.role) == (Path("a"), 2, "train")
    assert (second.path, second.role) == (Path("b"), "validation")


def test_sample_prompts_are_texts_or_maps(file: Path) -> None:
    text = GOOD + "sample_prompts: [a cat, {prompt: a dog, guidance_scale: 3, seed: 5}]\n"
    cat, dog = load(file, text).sample_prompts
    assert (cat.prompt, cat.guidance_scale, cat.seed) == ("a cat", 7.5, None)
    assert (dog.prompt, dog.guidance_scale, dog.seed) == ("a dog", 3.0, 5)


def test_home_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    assert load(file, GOOD, "output_dir=~/out").output_dir == Path("/home/someone/out")


def test_a_config_cannot_be_changed(file: Path) -> None:
    found = load(file, GOOD + "sample_prompts: [a cat]\n")
    with pytest.raises(ValidationError):
        found.lora_rank = 4  # type: ignore[misc]
    with pytest.raises(ValidationError):
        found.sample_prompts[0].prompt = "a dog"  # type: ignore[misc]


# --- overrides --------------------------------------------------------------------------------


def test_overrides_are_read_by_the_same_rules(file: Path) -> None:
    found = load(
        file, GOOD + "epochs: 5\n",
        "lora_rank=012", "learning_rate=2e-4", "trigger_word=no", "random_flip=true",
        "sample_prompts=[a cat, 'x=y']", "cache_dir=D:\\train", "epochs = 7",
    )  # fmt: skip
    assert (found.lora_rank, found.lora_alpha, found.learning_rate) == (12, 12, 0.0002)
    assert (found.trigger_word, found.random_flip, found.epochs) == ("no", True, 7)
    assert [prompt.prompt for prompt in found.sample_prompts] == ["a cat", "x=y"]
    assert found.cache_dir == Path("D:\\train")


def test_an_override_mends_a_wrong_line(file: Path) -> None:
    assert load(file, GOOD + "lora_rank: many\n", "lora_rank=4").lora_rank == 4


def test_wrong_overrides(file: Path) -> None:
    found = problems(
        file, GOOD + "lora_rank: 4\nepochs: 0\n",
        "lora_rnk=8", "lora_rank=many", "batch_size", "=5", "seed=!!int 5", "trigger_word=@x",
    )  # fmt: skip
    assert found == [
        "my.yaml line 5: epochs: found 0, must be at least 1",
        "command line: batch_size: must have the form key=value",
        "command line: =5: must have the form key=value",
        "command line: seed line 1: the tag !!int is not allowed; remove it",
        "command line: trigger_word line 1: a value that begins with @ must be in quotes",
        'command line: lora_rank: found the text "many", must be a whole number',
        "command line: lora_rnk: unknown key; did you mean lora_rank?",
    ]


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("lora_rnk: 8", "lora_rnk: unknown key; did you mean lora_rank?"),
        ("learnign_rate: 1", "learnign_rate: unknown key; did you mean learning_rate?"),
        ("zzz: 8", "zzz: unknown key; configs/schema.json lists every key"),
        ("network_dim: 8", "network_dim: unknown key; here it is called lora_rank"),
        ("target_modules: [a]", "target_modules: unknown key; here it is called lora_targets"),
        (
            "lora_targets: some",
            'lora_targets: found the text "some", must be one of attention, linear or all, '
            "or a list",
        ),
        ('lora_targets: [to_q, ""]', 'lora_targets.1: found the text "", must not be empty'),
        (
            "lora_targets: []",
            "lora_targets: found a list, must be one of attention, linear or all, "
            "or a list with at least one entry",
        ),
        (
            "cache_latents: maybe",
            'cache_latents: found the text "maybe", must be auto, or true or false',
        ),
        ("max_caption_tokens: 77", "max_caption_tokens: found 77, must be one of 75, 150 or 225"),
        ('lora_rank: "8"', 'lora_rank: found the text "8", must be a whole number'),
        ("lora_rank: 8.0", "lora_rank: found 8.0, must be a whole number"),
        ("lora_rank: true", "lora_rank: found true, must be a whole number"),
        ("lora_rank:", "lora_rank: found nothing (null), must be a whole number"),
        ("lora_rank: [8]", "lora_rank: found a list, must be a whole number"),
        ("lora_rank: {a: 8}", "lora_rank: found a map of keys, must be a whole number"),
        ("lora_rank: 0", "lora_rank: found 0, must be at least 1"),
        ("lora_rank: 2000", "lora_rank: found 2000, must be at most 1024"),
        (f"epochs: {10**29}", f"epochs: found {10**29}, must be at most 1000000000"),
        ("seed: -1", "seed: found -1, must be at least 0"),
        (f"seed: {2**63}", f"seed: found {2**63}, must be less than {2**63}"),
        ("learning_rate: fast", 'learning_rate: found the text "fast", must be a number'),
        ("learning_rate: 0", "learning_rate: found 0, must be more than 0.0"),
        ("learning_rate: .nan", "learning_rate: found nan, must be a finite number"),
        ("max_grad_norm: .inf", "max_grad_norm: found inf, must be a finite number"),
        ("lora_alpha: 1e999", "lora_alpha: found inf, must be a finite number"),
        ("lora_dropout: 1", "lora_dropout: found 1, must be less than 1.0"),
        ("random_flip: no", 'random_flip: found the text "no", must be true or false'),
        ("random_flip: 1", "random_flip: found 1, must be true or false"),
        ("trigger_word: 5", 'trigger_word: found 5, must be a text (quote it: "…")'),
        ('trigger_word: ""', 'trigger_word: found the text "", must not be empty'),
        (
            "save_dtype: fp64",
            'save_dtype: found the text "fp64", must be one of fp32, fp16 or bf16',
        ),
        ("format_version: 2", "format_version: found 2, must be 1"),
        ("bucket_step: 12", "bucket_step: found 12, must be a multiple of 8"),
        (
            "output_name: a/b",
            'output_name: found the text "a/b", must not hold any of \\ / : * ? " < > |',
        ),
        (f"output_name: {'a' * 101}", "must have at most 100 characters"),
        ("cache_dir: 5", "cache_dir: found 5, must be a path"),
        ('cache_dir: ""', 'cache_dir: found the text "", must not be empty'),
        ('cache_dir: "D:\\train"', 'cache_dir: found the text "D:\\train", must be a path without'),
        ("datasets: d", 'datasets: found the text "d", must be a list'),
        ("datasets: [d]", 'datasets.0: found the text "d", must be a map of keys'),
        ("datasets: [{repeats: 2}]", "datasets.0.path: missing; Folder of pictures."),
        (
            "datasets: [{path: a, rpeats: 2}]",
            "datasets.0.rpeats: unknown key; did you mean repeats?",
        ),
        ("sample_prompts: [5]", "sample_prompts.0: found 5, must be a text or a map of keys"),
        ("sample_prompts: [{seed: 1}]", "sample_prompts.0.prompt: missing; The prompt."),
        (
            "sample_prompts: [a, {promt: b}]",
            "sample_prompts.1.promt: unknown key; did you mean prompt?",
        ),
        (
            "sample_prompts: [{prompt: b, steps: 0}]",
            "sample_prompts.0.steps: found 0, must be at least 1",
        ),
    ],
)
def test_mistake(file: Path, line: str, what: str) -> None:
    (problem,) = problems(file, f"{GOOD}# a comment\n{line}\n")
    assert problem.startswith("my.yaml line 5: ")
    assert what in problem


def test_a_long_or_strange_text_is_shown_short(file: Path) -> None:
    (problem,) = problems(file, GOOD + f'epochs: "\\e[31m\\n{"x" * 500}"\n')
    assert len(problem) < 160
    assert "found the text" in problem
    assert "\\x1b[31m\\nxxx" in problem


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("datasets: [{path: a}]", ["line 4: datasets: stands beside train_data_dir"]),
        (
            "resolution: 500",
            ["line 4: resolution: found 500, must be a multiple of bucket_step (64)"],
        ),
        (
            "bucket_step: 48",
            ["my.yaml: resolution: found 512, must be a multiple of bucket_step (48)"],
        ),
        (
            "datasets: [{path: a, role: validation}]\nvalidation_split: 0.1\nmetadata_path: m.csv\n"
            "repeats: 2\nresolution: 500",
            [
                "line 4: datasets: stands beside train_data_dir",
                "line 4: datasets: none of them has the role train",
                "line 5: validation_split: a dataset has the role validation already",
                "line 6: metadata_path: belongs to train_data_dir",
                "line 7: repeats: belongs to train_data_dir",
                "line 8: resolution: found 500",
            ],
        ),
    ],
)
def test_keys_that_do_not_fit_together(file: Path, lines: str, expected: list[str]) -> None:
    found = problems(file, f"{GOOD}{lines}\n")
    assert len(found) == len(expected)
    for problem, what in zip(found, expected, strict=True):
        assert what in problem


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("random_crop: true\ncache_latents: true", "cache_latents"),
        ("mask_dir: m", "mask_dir"),
        ("keep_tokens: 1", "keep_tokens"),
        ("zero_terminal_snr: true\nprediction_type: epsilon", "zero_terminal_snr"),
        ("prior_loss_weight: 0.5", "prior_loss_weight"),
        ("lr_num_cycles: 5", "lr_num_cycles"),
        ("text_encoder_learning_rate: 1e-5", "text_encoder_learning_rate"),
        (
            "optimizer: prodigy\ntrain_text_encoder: true\ntext_encoder_learning_rate: 0.5",
            "text_encoder_learning_rate",
        ),
    ],
)
def test_a_key_that_would_do_nothing_or_cannot_be_is_refused(
    file: Path, lines: str, key: str
) -> None:
    assert [p.split(": ")[1] for p in problems(file, f"{GOOD}{lines}\n")] == [key]


def test_rates_follow_the_optimizer(file: Path) -> None:
    adamw, prodigy = load(file, GOOD), load(file, GOOD, "optimizer=prodigy")
    assert (adamw.learning_rate, adamw.text_encoder_learning_rate) == (1e-4, 5e-5)
    assert (prodigy.learning_rate, prodigy.text_encoder_learning_rate) == (1.0, 1.0)


def test_every_key_of_another_trainer_leads_to_one_of_ours() -> None:
    ours = {*ImageConfig.model_fields, *TextConfig.model_fields, *ImageDataset.model_fields}
    assert set(other_names.HERE.values()) <= ours
    assert not other_names.HERE.keys() & ours


def test_nothing_written(file: Path) -> None:
    assert problems(file, "") == [
        "my.yaml: base_model: missing; "
        "Hub id, diffusers folder, or original .safetensors: SD1.x, SD2.x, SDXL.",
        "my.yaml: output_dir: missing; Folder of this run.",
        "my.yaml: train_data_dir: missing; name the folder of your pictures",
    ]


def test_all_mistakes_at_once_in_the_order_of_the_lines(file: Path) -> None:
    text = """\
resolution: 500
lora_rnk: 8
epochs: 2
batch_size: two
epochs: 3
sample_prompts:
  - promt: a cat
    steps: 0
seed: !!int 5
base_modell: m
"""
    assert problems(file, text, "output_dri=o", "save_steps=no") == [
        "my.yaml line 1: resolution: found 500, must be a multiple of bucket_step (64)",
        "my.yaml line 2: lora_rnk: unknown key; did you mean lora_rank?",
        'my.yaml line 4: batch_size: found the text "two", must be auto, or a whole number',
        "my.yaml line 5: epochs stands twice, first in line 3; keep one",
        "my.yaml line 7: sample_prompts.0.promt: unknown key; did you mean prompt?",
        "my.yaml line 8: sample_prompts.0.steps: found 0, must be at least 1",
        "my.yaml line 9: the tag !!int is not allowed; remove it",
        "my.yaml line 10: base_modell: unknown key; did you mean base_model?",
        'command line: save_steps: found the text "no", must be a whole number',
        "command line: output_dri: unknown key; did you mean output_dir?",
        "my.yaml: train_data_dir: missing; name the folder of your pictures",
    ]


def test_the_folder_of_a_run_has_a_name(file: Path) -> None:
    (problem,) = problems(file, GOOD, "output_dir=/")
    assert "output_name" in problem


def test_a_draft_keeps_what_is_right(file: Path) -> None:
    file.write_text(GOOD + "lora_rank: many\n", encoding="utf-8")
    draft = config.read(file)
    assert draft.config is None
    assert draft.values == {"base_model": "m", "train_data_dir": "d", "output_dir": "out/my_style"}


# --- the file itself ----------------------------------------------------------------------------


def test_file_not_there(file: Path) -> None:
    file.write_text(GOOD, encoding="utf-8")
    for name, what in [
        ("mi.yaml", "mi.yaml: no such file; did you mean my.yaml?"),
        ("other.yaml", "other.yaml: no such file; there are: my.yaml"),
        ("configs/my.yaml", "no such file; there is no folder configs either"),
        (".", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ]:
        with pytest.raises(UserError) as caught:
            config.load(Path(name))
        (problem,) = caught.value.problems
        assert what in str(problem)


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_other_encodings_are_refused(file: Path, encoding: str) -> None:
    file.write_text(GOOD + "trigger_word: 赛博朋克\n", encoding=encoding)
    with pytest.raises(UserError, match="not written in UTF-8"):
        config.load(file)


def test_byte_order_mark(file: Path) -> None:
    file.write_text(GOOD, encoding="utf-8-sig")
    assert config.load(file).base_model == "m"


# --- dump ---------------------------------------------------------------------------------------


def texts() -> st.SearchStrategy[str]:
    ambiguous = [
        "no",
        "012",
        "2e-4",
        ".5e3",
        "0x1F",
        "~",
        "",
        "a: b",
        "# x",
        "<<",
        "\x85",
        "\ufeff",
    ]
    return st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(ambiguous)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=texts(), rate=st.floats(1e-12, 1), rank=st.integers(1, 1024), some=st.none() | st.just(7)
)
def test_dump_is_loaded_again(
    file: Path, text: str, rate: float, rank: int, some: int | None
) -> None:
    written = schema.ImageConfig.model_validate(
        {
            "base_model": "m", "output_dir": "输出/o", "datasets": [{"path": "a"}, {"path": "b c"}],
            "caption_prefix": text, "learning_rate": rate, "lora_rank": rank,
            "max_train_steps": some, "sample_prompts": [text, {"prompt": "x", "seed": some}],
        }
    )  # fmt: skip
    file.write_text(config.dump(written), encoding="utf-8", newline="\n")
    assert config.load(file) == written


# --- any text -----------------------------------------------------------------------------------

KEYS = [
    *schema.ImageConfig.model_fields,
    *schema.TextConfig.model_fields,
    "path",
    "prompt",
    "lora_rnk",
    "<<",
    "",
]
SCALARS = st.text(max_size=8) | st.sampled_from(
    [
        "5", "-1", "2e-4", ".nan", ".inf", "1e999", "9" * 40, "0x" + "f" * 50, "no", "true", "~",
        "''", '"\\ud800"', '"\\0"', "/", "~nobody/x", "!!str 5", "*a", "&a 5", "[1, {a: b}]",
        "赛博", "'a: b'", "{<<: 1}", "[[]]",
    ]
)  # fmt: skip
LINES = st.tuples(st.sampled_from(["", "  ", "- "]), st.sampled_from(KEYS), SCALARS).map(
    lambda parts: f"{parts[0]}{parts[1]}: {parts[2]}"
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text() | st.lists(LINES, max_size=12).map("\n".join),
    overrides=st.lists(LINES, max_size=2),
)
def test_any_text_is_a_draft_or_refused(file: Path, text: str, overrides: list[str]) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        draft = config.read(file, [override.replace(": ", "=", 1) for override in overrides])
    except UserError as error:
        assert error.problems
    else:
        assert isinstance(draft, config.Draft)
        assert (draft.config is None) <= bool(draft.problems)
        if draft.config is not None:
            config.dump(draft.config)


@given(st.binary())
def test_any_bytes_are_a_draft_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(data)
    try:
        config.read(file)
    except UserError as error:
        assert error.problems


# --- two kinds of task ----------------------------------------------------------------------------

TEXT = GOOD + "task_type: text-generation\n"


def test_a_text_config_has_the_same_keys_and_its_own_defaults(file: Path) -> None:
    found = load(file, TEXT + "lora_rank: 8\n")
    assert isinstance(found, schema.TextConfig)
    assert (found.lora_alpha, found.learning_rate, found.weight_decay) == (16, 2e-4, 0)
    assert (found.lr_scheduler, found.lr_warmup_steps) == ("cosine", None)
    assert found.batch_size * found.gradient_accumulation_steps == 16
    assert (found.train_on, found.packing, found.validation_split) == ("responses", True, 0.05)
    (dataset,) = found.all_datasets()
    assert dataset.weight == 1
    common = set(schema.CommonConfig.model_fields)
    assert common <= set(schema.ImageConfig.model_fields)
    assert common <= set(schema.TextConfig.model_fields)


def test_task_type_mistyped(file: Path) -> None:
    found = problems(file, GOOD + "task_type: text-generatoin\nmax_seq_length: 512\n")
    assert found == [
        'my.yaml line 4: task_type: found the text "text-generatoin", must be image-generation '
        "or text-generation"
    ]
    (found_number,) = problems(file, GOOD + "task_type: 3\n")
    assert "found 3, must be image-generation or text-generation" in found_number


@pytest.mark.parametrize(
    ("text", "key", "other"),
    [
        (GOOD, "max_seq_length: 512", "text-generation"),
        (TEXT, "resolution: 512", "image-generation"),
    ],
)
def test_a_key_of_the_other_task(file: Path, text: str, key: str, other: str) -> None:
    (problem,) = problems(file, text + key + "\n")
    assert problem.endswith(f"unknown key; it belongs to task_type: {other}")


def test_keys_of_a_text_config_that_do_not_fit_together(file: Path) -> None:
    text = TEXT.replace("base_model: m", "base_model: m.gguf")
    found = problems(file, text + "max_seq_length: 64\nstride: 64\nquantization: nf4\n")
    assert [problem.split(": ", 2)[1] for problem in found] == ["stride", "quantization"]
    assert "must be less than max_seq_length (64)" in found[0]
    (patience,) = problems(file, TEXT + "early_stopping_patience: 2\nvalidation_split: 0\n")
    assert "early_stopping_patience: needs held-out data" in patience


def test_weights_and_roles_of_text_datasets(file: Path) -> None:
    text = "base_model: m\noutput_dir: o\ntask_type: text-generation\ndatasets:\n"
    rows = "  - {path: a.jsonl, weight: 0.5}\n  - {path: b.jsonl, role: validation}\n"
    found = load(file, text + rows)
    assert [data.weight for data in found.all_datasets()] == [0.5, 1]
    assert found.validation_split == 0
    assert load(file, config.dump(found)) == found
    (problem,) = problems(file, text + "  - {path: a.jsonl, repeats: 2}\n")
    assert problem.startswith("my.yaml line 5: datasets.0.repeats: unknown key")


# --- the schema for editors -----------------------------------------------------------------------


def test_every_key_has_a_sentence() -> None:
    for section in (
        schema.ImageConfig, schema.ImageDataset, schema.SamplePrompt,
        schema.TextConfig, schema.TextDataset, schema.TextPrompt, schema.CommonConfig,
    ):  # fmt: skip
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith("."), f"{section.__name__}.{name}"
            assert len(field.description) < 100, f"{section.__name__}.{name}"


def test_schema_and_key_list_are_in_step() -> None:
    for name, text in [
        ("configs/schema.json", reference.json_schema()),
        ("docs/config.md", reference.key_list()),
    ]:
        written = (ROOT / name).read_text(encoding="utf-8")
        assert written == text, f"{name} is behind; run: python scripts/dev.py schema"
    jsonschema.Draft202012Validator.check_schema(config.schema())


def shipped_values(path: Path) -> dict[str, Any]:
    document = yaml_source.parse(path.read_text(encoding="utf-8"), path.name)
    assert not document.problems
    return document.values


def test_configs_are_shipped() -> None:
    assert {"lora_default.yaml", "demo_image.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    jsonschema.validate(shipped_values(path), config.schema())
    assert config.load(path).output_dir.parts[0] == "output"


@pytest.mark.parametrize(
    "change", [{"lora_rnk": 8}, {"lora_rank": "8"}, {"epochs": 0}, {"save_dtype": "fp64"}]
)
def test_schema_refuses_what_the_loader_refuses(change: dict[str, Any]) -> None:
    values = {**shipped_values(ROOT / "configs/lora_default.yaml"), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, config.schema())


def test_template_shows_each_picture_about_forty_times() -> None:
    template = config.load(ROOT / "configs/lora_default.yaml")
    assert 30 <= template.epochs * template.repeats <= 60
    steps = 80 * template.epochs * template.repeats / template.batch_size
    assert 1000 <= steps <= 3000
