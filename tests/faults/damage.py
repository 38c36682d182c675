"""Checkpoints that are damaged where they lie, between two starts of a run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from lora_scripts.training import checkpoint
from tests.faults import children, compare, stops
from tests.faults.cases import Case
from tests.faults.soak import Whole
from tests.faults.stops import Stop
from tests.faults.tally import Tally

Damage = Callable[[Path, random.Random], None]
STATE, TRAINING = "state.json", "training.safetensors"


def _truncate(path: Path, chance: random.Random) -> None:
    """Its end is gone: a byte, or all but a few."""
    path.write_bytes(path.read_bytes()[: chance.randrange(1, path.stat().st_size)])


def _flip(path: Path, chance: random.Random) -> None:
    """One bit is another. An `E` for an `e` in a number of a JSON file is no damage."""
    whole = path.read_bytes()
    for _ in range(100):
        broken = bytearray(whole)
        broken[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        if path.suffix != ".json" or not _says_the_same(whole, bytes(broken)):
            break
    path.write_bytes(broken)


def _says_the_same(whole: bytes, broken: bytes) -> bool:
    try:
        return bool(json.loads(whole) == json.loads(broken))
    except ValueError:
        return False


def _swap(path: Path, chance: random.Random) -> None:
    """It has changed places with another file of the checkpoint."""
    other = chance.choice(sorted(p for p in path.parent.iterdir() if p != path))
    between = path.with_name("between")
    path.rename(between)
    other.rename(path)
    between.rename(other)


def _exchange(path: Path, chance: random.Random) -> None:
    """Another checkpoint's file of that kind stands in its place, or another one if they agree."""
    others = [p for p in checkpoint.listed(path.parents[1]) if p != path.parent]
    same_place = sorted(p.name for p in path.parent.iterdir()).index(path.name)
    files = sorted(chance.choice(others).iterdir())
    agree = files[same_place].read_bytes() == path.read_bytes()
    shutil.copyfile(files[same_place - 1] if agree else files[same_place], path)


DAMAGES: dict[str, Damage] = {
    "cut off": _truncate,
    "a bit flipped": _flip,
    "empty": lambda path, chance: path.write_bytes(b"") and None,
    "deleted": lambda path, chance: path.unlink(),
    "swapped with another file": _swap,
    "of another checkpoint": _exchange,
}


def half_done(undisturbed: Whole, work: Path) -> Path:
    """A run that was stopped when it had at least two checkpoints, to be copied."""
    folder = work / "half"
    folder.mkdir(parents=True)
    case = undisturbed.case
    stop = Stop("SIGTERM", "step", 3 if case.variant.kind == "image" else 6, 0.0)
    ended = children.run(lambda: case.start(folder), folder / "said", stop)
    assert ended.code == stops.RESUMABLE, ended.said
    found = checkpoint.listed(case.output(folder) / "checkpoints")
    assert len(found) >= 2, [path.name for path in found]
    return folder


def newest(
    undisturbed: Whole, half: Path, number: int, tally: Tally, chance: random.Random
) -> None:
    """The newest checkpoint is damaged: the one before is gone on from, and that is said."""
    case = undisturbed.case
    folder = half.with_name(f"damaged-{number}")
    shutil.copytree(half, folder)
    tally.runs += 1
    *_, before, last = checkpoint.listed(case.output(folder) / "checkpoints")
    done, path = _damage(last, tally, chance)
    ended = children.run(lambda: case.start(folder), half.parent / f"said-{number}")
    said = ended.said
    named = f"Checkpoint {last.name} is not usable, trying the one before: {last}" in said
    if ended.code != 0 or not named or f"Going on from {before}" not in said:
        tally.fail(case, f"{folder}, {path.name} {done}: code {ended.code}: {said[-2000:]}")
        return
    tally.compare(case, undisturbed.folder, folder, f"{path.name} {done}")


def all_of_them(
    undisturbed: Whole, half: Path, number: int, tally: Tally, chance: random.Random
) -> None:
    """All checkpoints are damaged: the run is refused with code 2, and no file is changed."""
    case = undisturbed.case
    folder = half.with_name(f"all-damaged-{number}")
    shutil.copytree(half, folder)
    tally.runs += 1
    checkpoints = checkpoint.listed(case.output(folder) / "checkpoints")
    done = [_damage(path, tally, chance) for path in checkpoints]
    before = _contents(case, folder)
    ended = children.run(lambda: case.start(folder), half.parent / f"said-all-{number}")
    told = all(path.name in ended.said for path in checkpoints) and "resume=never" in ended.said
    if ended.code != 2 or not told or _contents(case, folder) != before:
        tally.fail(case, f"{folder}, all: {done}: code {ended.code}: {ended.said[-2000:]}")
        return
    shutil.rmtree(folder)


def removed(
    undisturbed: Whole, half: Path, number: int, tally: Tally, chance: random.Random
) -> None:
    """What can be made again, or is only looked at, is gone: the run goes on all the same."""
    case = undisturbed.case
    folder = half.with_name(f"without-{number}")
    shutil.copytree(half, folder)
    what = stops.least(list(REMOVED), {name: tally.rows(name) for name in REMOVED}, chance)
    tally.runs += 1
    tally.hit[what, "deleted"] += 1
    shutil.rmtree(REMOVED[what](case, folder))
    ended = children.run(lambda: case.start(folder), half.parent / f"said-without-{number}")
    found = compare.differences(case, undisturbed.folder, folder) if ended.code == 0 else []
    lost = {"tensorboard": "TensorBoard"}.get(what)  # what was in it
    left = [text for text in found if lost is None or not text.startswith(lost)]
    if ended.code != 0 or left:
        tally.fail(case, f"without {what}: code {ended.code}, {left}: {ended.said[-1500:]}")
        return
    shutil.rmtree(folder)


REMOVED: dict[str, Callable[[Case, Path], Path]] = {
    "cache": lambda case, folder: folder / "cache",
    "tensorboard": lambda case, folder: case.output(folder) / "tensorboard",
}


def _damage(target: Path, tally: Tally, chance: random.Random) -> tuple[str, Path]:
    """Damage a file of a checkpoint, in the way that was used least on that kind of file."""
    kinds = {
        STATE: [target / STATE],
        TRAINING: [target / TRAINING],
        "the ready file": [p for p in target.iterdir() if p.name not in (STATE, TRAINING)],
    }
    kind = stops.least(list(kinds), {name: tally.rows(name) for name in kinds}, chance)
    ways = {way: tally.hit[kind, way] for way in DAMAGES}
    way = stops.least(list(DAMAGES), ways, chance)
    path = chance.choice(sorted(kinds[kind]))
    DAMAGES[way](path, chance)
    tally.hit[kind, way] += 1
    return way, path


def _contents(case: Case, folder: Path) -> dict[str, bytes]:
    """All files of the run, but for the lock."""
    output = case.output(folder)
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}
