"""Several processes: the run of one, whoever takes which part; one that is lost ends them all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from lora_scripts import pipeline, pulse
from lora_scripts.errors import EXIT_INTERRUPTED, UserError
from lora_scripts.processes import joined
from lora_scripts.pulse import Work
from lora_scripts.training import checkpoint
from tests import forked, runs, text_toys, toys

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ACCUMULATION = "gradient_accumulation_steps"
SAME_FOR_ALL = ("step", "epoch", "samples", "tokens", "learning_rate")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.name != "posix", reason="torchrun needs libuv on Windows"),
]


def train(
    config: Path, processes: int, *overrides: str, torchrun: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """The command as people type it; a process computes on one thread."""
    several = [*TORCHRUN, *torchrun, "--nproc_per_node", str(processes)]
    start = several if processes > 1 else [sys.executable]
    return subprocess.Popen(
        [*start, str(ROOT / "train.py"), "--config", str(config), *overrides],
        cwd=ROOT,
        # torchrun waits so many seconds for the others when one has ended
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "26"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained(config: Path, processes: int, *overrides: str) -> str:
    """What a run says that ends well; one process alone is this one, several are forked."""
    if processes == 1:
        assert pipeline.run(config, overrides) == pipeline.EXIT_DONE
        return ""
    return forked_run(config, processes, *overrides)


def forked_run(config: Path, processes: int, *overrides: str, code: int = 0) -> str:
    """What a run says that ends with this code, all of its processes forked."""
    arguments = ["train", "--config", str(config), *overrides]
    return forked.together(processes, forked.command, arguments, code=code)


def trained_by_torchrun(config: Path, processes: int, *overrides: str) -> str:
    """The same by the command as people type it."""
    run = train(config, processes, *overrides)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, said + errors
    return said


def write(folder: Path, name: str, values: Mapping[str, Any], **changes: Any) -> Path:
    keys = {**values, "output_dir": str(folder / name), **changes}
    return toys.write_config(folder / f"{name}.yaml", **keys)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    """Rows of unequal lengths, dropout, a last step with less than the others."""
    base = text_toys.save_model(tmp_path / "base")
    rows = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    return runs.text_values(
        base, rows, tmp_path, batch_size=1, gradient_accumulation_steps=4, epochs=2,
        validation_split=0.2, eval_steps=2, lora_dropout=0.1, save_steps=2,
    )  # fmt: skip


def same(one: Path, several: Path) -> None:
    """The metrics and the exported weights of two runs, but for rounding."""
    found, expected = runs.metrics(several), runs.metrics(one)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name in wanted.keys() - {"time"}:
            close = 0 if name in SAME_FOR_ALL else 1e-5
            assert row[name] == pytest.approx(wanted[name], rel=close, abs=0), name
    weights = sorted(path.name for path in one.glob("*.safetensors"))
    assert weights
    for name in weights:
        assert_close(load_file(several / name), load_file(one / name), rtol=1e-3, atol=1e-5)


def test_two_processes_train_on_text_as_one_does(tmp_path: Path, texts: dict[str, Any]) -> None:
    trained(write(tmp_path, "one", texts), 1)
    config = write(tmp_path, "two", texts, gradient_accumulation_steps=2)
    said = trained_by_torchrun(config, 2)
    same(tmp_path / "one", tmp_path / "two")
    assert said.count("Done in") == said.count("Trainable:") == 1, "each tells it"
    assert "6 steps of up to 4 samples" in said
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert "| batch | 1 × 2 accumulated × 2 processes |" in card


def test_two_processes_train_on_pictures_as_one_does(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """With two adapted modules, and buckets of their own shapes in each process."""
    values = runs.values(
        sd_folder, pictures, tmp_path, batch_size=1, gradient_accumulation_steps=2, epochs=2,
        train_text_encoder=True, learning_rate=1e-3, output_name="lora",
    )  # fmt: skip
    trained(write(tmp_path, "one", values), 1)
    trained(write(tmp_path, "two", values, gradient_accumulation_steps=1), 2)
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("first", "then"), [((2, 1), (1, 2)), ((1, 4), (2, 2))])
def test_another_number_of_processes_goes_on_with_steps_of_as_many_samples(
    tmp_path: Path, texts: dict[str, Any], first: tuple[int, int], then: tuple[int, int]
) -> None:
    """The losses are those of the run that was not stopped, the samples come in its order."""
    trained(write(tmp_path, "whole", texts, **accumulated(first)), first[0])
    parts = write(tmp_path, "parts", texts, **accumulated(first))
    trained(parts, first[0], "max_train_steps=2")
    said = forked_run(parts, then[0], f"{ACCUMULATION}={then[1]}")
    assert "step-000002" in said
    same(tmp_path / "whole", tmp_path / "parts")


def accumulated(counts: tuple[int, int]) -> dict[str, Any]:
    """Keys of a run by so many processes that accumulate so many micro-batches."""
    return {ACCUMULATION: counts[1], "lr_scheduler": "constant"}


def test_steps_of_more_or_less_samples_are_refused(tmp_path: Path, texts: dict[str, Any]) -> None:
    run = write(tmp_path, "run", texts, gradient_accumulation_steps=4)
    trained(run, 2, "max_train_steps=1")
    with pytest.raises(UserError) as caught:
        pipeline.run(run)
    told = " ".join(str(caught.value).split())
    assert "found 4, but step-000001 was trained with 2 processes × 4: with 1 process set" in told
    assert "gradient_accumulation_steps: 8" in told
    assert runs.metrics(tmp_path / "run")[-1]["step"] == 1, "nothing was written"


@pytest.mark.parametrize(
    ("rank", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),  # it hangs, and nobody is told
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_gone_ends_the_run_by_name_and_the_run_goes_on(
    tmp_path: Path, texts: dict[str, Any], rank: int, how: signal.Signals
) -> None:
    config = write(tmp_path, "run", texts, gradient_accumulation_steps=2, epochs=400)
    run = train(config, 2)
    children = wait_for_checkpoint(run, tmp_path / "run")
    os.kill(children[rank], how)
    began = time.monotonic()
    said, errors = run.communicate(timeout=75)
    assert time.monotonic() - began < 60
    assert run.returncode != 0
    assert f"Stopped: rank {rank} on {socket.gethostname()} " in said, said + errors
    checkpoints = checkpoint.listed(tmp_path / "run" / "checkpoints")
    checkpoint.read_state(checkpoints[-1])  # it is whole
    step = int(checkpoints[-1].name.removeprefix("step-"))
    said = trained(config, 2, f"max_train_steps={step + 2}")
    assert f"Going on from {checkpoints[-1]}" in said
    steps = [row["step"] for row in runs.metrics(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, step + 3)), "no step twice, none missing"


@pytest.mark.slow
def test_torchrun_starts_all_again_which_go_on(tmp_path: Path, texts: dict[str, Any]) -> None:
    config = write(tmp_path, "run", texts, gradient_accumulation_steps=2, epochs=20)
    run = train(config, 2, torchrun=("--max-restarts", "1"))
    os.kill(wait_for_checkpoint(run, tmp_path / "run")[1], signal.SIGKILL)
    said, errors = run.communicate(timeout=200)
    assert run.returncode == 0, said + errors
    assert "Going on from" in said and "Done in" in said


def wait_for_checkpoint(run: subprocess.Popen[str], output: Path) -> list[int]:
    """The processes of a run by rank, once a checkpoint is there."""
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/step-*")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    found = subprocess.run(
        ["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True
    )
    by_rank = {}
    for pid in map(int, found.stdout.split()):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        by_rank.update({int(e[5:]): pid for e in environment if e.startswith(b"RANK=")})
    return [by_rank[rank] for rank in sorted(by_rank)]


def test_all_stop_after_the_same_step_and_go_on_to_the_same_bits(
    tmp_path: Path, texts: dict[str, Any]
) -> None:
    """One of them is told to stop; the bits are those of a whole run."""
    changes = {"gradient_accumulation_steps": 2, "epochs": 20, "save_steps": 5}
    config = write(tmp_path, "parts", texts, **changes)
    run = train(config, 2)
    os.kill(wait_for_checkpoint(run, tmp_path / "parts")[1], signal.SIGTERM)
    said, errors = run.communicate(timeout=75)
    assert run.returncode != 0
    assert "Interrupted after step" in said, said + errors
    trained(config, 2)
    trained(write(tmp_path, "whole", texts, **changes), 2)
    expected, found = (
        load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "parts")
    )
    assert_close(found, expected, rtol=0, atol=0)


def test_a_problem_that_all_have_is_told_once(tmp_path: Path, texts: dict[str, Any]) -> None:
    said = forked_run(write(tmp_path, "wrong", texts, lora_rank=0), 2, code=2)
    assert said.count("lora_rank") == 1


def fail_in_the_second() -> None:
    """The work of a process among three."""
    try:
        with joined() as here:
            here.wait()
            if here.rank == 1:
                raise RuntimeError("no such luck")
            here.wait()
    except RuntimeError:
        raise SystemExit(EXIT_INTERRUPTED) from None


def test_all_others_learn_which_one_has_failed() -> None:
    """The first one, with which the store goes, stays until each has read it."""
    said = forked.together(3, fail_in_the_second, code=EXIT_INTERRUPTED)
    assert said.count(f"Stopped: rank 1 on {socket.gethostname()} has ended: no such luck") == 2


def test_a_dry_run_of_several_is_refused(tmp_path: Path, texts: dict[str, Any]) -> None:
    said = forked_run(write(tmp_path, "dry", texts), 2, "--dry-run", code=2)
    assert said.count("--dry-run: tries one process; start it without torchrun") == 1


def test_work_that_takes_far_longer_than_before_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Work(began=0.0, longest=None).seconds_too_long(1000.0) == 0, "the first may take long"
    assert Work(began=None, longest=1.0).seconds_too_long(1000.0) == 0, "between two"
    assert Work(began=0.0, longest=1.0).seconds_too_long(pulse.STUCK - 1) == 0
    assert Work(began=0.0, longest=1.0).seconds_too_long(pulse.STUCK + 1) > 0
    slow = Work(began=0.0, longest=100.0)
    assert slow.seconds_too_long(400.0) == 0
    assert slow.seconds_too_long(501.0) == 501.0
