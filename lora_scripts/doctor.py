"""`lora-scripts doctor`: this machine, and a config's run on it, as one table.

Nothing is written but what was seen of pictures, into the cache, as `check` does. Each section
stands for itself; a new one is one more line in `_machine` or `_looked`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lora_scripts import collector, environment, outlook, preflight, report
from lora_scripts import config as config_file
from lora_scripts.data.rows import AnyRows
from lora_scripts.environment import Finding, State
from lora_scripts.errors import Problem, UserError
from lora_scripts.logs import quiet_libraries, silent
from lora_scripts.processes import Processes
from lora_scripts.schema import Config

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

EXIT_GOOD, EXIT_BAD = 0, 1
WORDS: dict[State, tuple[str, str]] = {  # what stands before a line, and its colour
    "good": ("ok", "green"),
    "note": ("note", "yellow"),
    "bad": ("WRONG", "bold red"),
}
PACKAGES = "Packages"
_STATE, _WHAT = 6, 18  # widths of the first two columns


@dataclass(frozen=True)
class Section:
    """A part of the table.

    Attributes:
        findings: Its rows.
        lines: Plain text below them.
    """

    title: str
    findings: Sequence[Finding]
    lines: Sequence[str] = field(default_factory=list)


def run(path: Path | None, overrides: Sequence[str] = (), *, as_json: bool = False) -> int:
    """Say what is there, what is needed and what to type; with a config also of its run.

    Returns:
        The exit code: 1 if something is wrong with this machine, else 0; with `as_json` also that
        of the error that else is raised.

    Raises:
        UserError: with all problems of the config; a `DataError` if only its data have errors.
    """
    with silent() if as_json else nullcontext():
        sections, problems, error = _looked(path, overrides)
    is_bad = any(f.state == "bad" for section in sections for f in section.findings)
    if as_json:
        print(_as_json(sections, problems))  # noqa: T201
        return error.exit_code if error else EXIT_BAD if is_bad else EXIT_GOOD
    show(sections)
    if error is not None:
        raise error
    preflight.say(problems)
    logger.info("%s", _verdict(sections))
    return EXIT_BAD if is_bad else EXIT_GOOD


def _machine(device: str = "auto") -> list[Section]:
    """What is there, whatever is to be trained. `device`: the config's key."""
    packages = environment.package_rows()
    broken = {finding.what for finding in packages if finding.state == "bad"}
    system = environment.system_rows()
    devices: list[Finding] = []
    if "torch" not in broken:
        from lora_scripts import cards

        devices = [*cards.rows(device), _cpu()]
    if not broken:
        with collector.importing():
            quiet_libraries()  # before they have something to say
            devices.append(_ram())
    if "huggingface_hub" not in broken:
        system += hub_rows()
    return [
        Section("This machine", system),
        Section("Devices", devices),
        Section(PACKAGES, packages),
        Section("Extras: needed for what stands beside them", environment.extra_rows()),
    ]


def hub_rows() -> list[Finding]:
    """Where models of the hub lie and where they come from. Never a token, only that there is one.

    Must not be called if huggingface_hub cannot be loaded.
    """
    from huggingface_hub import constants, get_token

    offline = constants.HF_HUB_OFFLINE
    rows = [
        Finding("models of the hub", constants.HF_HUB_CACHE, "HF_HOME sets it"),
        Finding("the hub", without_secret(constants.ENDPOINT), "HF_ENDPOINT names a mirror"),
        Finding("hub token", "a token is set" if get_token() else "none", "only for gated models"),
    ]
    if offline:
        what = "HF_HUB_OFFLINE is set: nothing is fetched"
        rows.append(Finding("offline", what, "unset it to fetch models", state="note"))
    return rows


def without_secret(address: str) -> str:
    """A web address without a user's name and password, which a mirror's may carry."""
    parts = urlsplit(address)
    if "@" not in parts.netloc:
        return address
    return parts._replace(netloc=f"…@{parts.netloc.rpartition('@')[2]}").geturl()


def _cpu() -> Finding:
    """The CPU's threads, and what `mixed_precision: auto` takes on it, found by timing."""
    import torch

    from lora_scripts import device

    precision = device.choose("cpu", "auto").precision
    said = "bf16 is fast here" if precision == "bf16" else "bf16 is slow here"
    threads = torch.get_num_threads()
    return Finding("CPU", f"threads: {threads}; {said}, mixed_precision: auto takes {precision}")


def _ram() -> Finding:
    import torch

    from lora_scripts.device import Compute
    from lora_scripts.memory import room
    from lora_scripts.memory.estimate import size

    found = room.free(Compute(torch.device("cpu"), "no"))
    there = f"{size(found.ram_total)}, {size(found.ram_free)} free"
    return Finding("RAM", there, "" if found.ram_limit == room.MACHINE else found.ram_limit)


def _looked(
    path: Path | None, overrides: Sequence[str]
) -> tuple[list[Section], list[Problem], UserError | None]:
    """The sections of machine and run, all that was found, and the error that stops a run."""
    if path is None:
        return _machine(), [], None
    try:
        draft = config_file.read(path, overrides)
    except UserError as error:
        return _machine(), error.problems, error
    device = draft.values.get("device")
    sections = _machine(device if isinstance(device, str) else "auto")
    packages = next(section for section in sections if section.title == PACKAGES)
    if any(finding.state == "bad" for finding in packages.findings):
        unknown = Finding("the run", "not looked at before the packages are in order", state="note")
        return [*sections, Section("The run", [unknown])], draft.problems, _error(draft.problems)
    found = outlook.look(draft)
    parts = {
        f"Needed by {path.name}": found.wanted,
        "Paths": found.paths,
        "The run": found.run,
    }
    sections += [Section(title, rows) for title, rows in parts.items() if rows]
    if found.rows is not None and draft.config is not None:
        sections.append(_memory(draft.config, found.rows))
    try:
        preflight.refuse(found.problems, draft)
    except UserError as error:
        told = [p for p in found.problems if p.severity == "warning" and p not in error.problems]
        return sections, found.problems, type(error)([*error.problems, *told])
    return sections, found.problems, None


def _memory(config: Config, rows: AnyRows) -> Section:
    """What the run will take, by the model's shapes; nothing of a base that is not here yet."""
    import torch

    from lora_scripts import batch_size, device, memory_check
    from lora_scripts.models import hub

    if config.offload:
        try:
            preflight.needs_card()
        except UserError as error:
            mend = "leave offload out of the config"
            return Section("Memory", [Finding("offload", error.problems[0].what, "", mend, "bad")])
    if hub.local_path(config.base_model) is None:
        unknown = Finding("memory", "not known before the base model is fetched", state="note")
        return Section("Memory", [unknown])
    try:
        compute = device.choose(config.device, config.mixed_precision, offloaded=config.offload)
        said = []
        if config.distributed == "fsdp":
            count = max(2, torch.cuda.device_count())
            several = Processes(size=count, local_size=count)
            compute = replace(compute, processes=several, sharded=True)
            said = [f"As one of {count} processes (distributed: fsdp)"]
        settled = batch_size.settle(config, rows, compute, None)
        found, parts = memory_check.findings(settled, rows, compute)
        return Section("Memory", found, [*said, *parts])
    except UserError as error:
        return Section("Memory", [Finding("memory", f"not known: {error}", state="note")])


def _error(problems: Sequence[Problem]) -> UserError | None:
    return UserError(problems) if problems else None


def _verdict(sections: Sequence[Section]) -> str:
    wrong = [f.what.strip() for section in sections for f in section.findings if f.state == "bad"]
    if not wrong:
        return "Nothing is wrong here."
    return f"Wrong here: {', '.join(dict.fromkeys(wrong))}. What to do stands below each, at ->."


# --- showing --------------------------------------------------------------------------------------


def show(sections: Sequence[Section]) -> None:
    """Print the table for people; in a terminal with colours."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    widths = _widths(console)
    _show_row(console, widths, ("", "what", "found", "needed"), "bold")
    for section in sections:
        if not section.findings and not section.lines:
            continue
        console.print(f"\n{section.title}", style="bold")
        for finding in section.findings:
            word, colour = WORDS[finding.state]
            texts = (word, finding.what, finding.found, finding.needed)
            _show_row(console, widths, texts, "", colour)
            if finding.to_type:
                # not wrapped by us, so that it can be copied
                console.print(f"       -> {finding.to_type}", soft_wrap=True, style=colour)
        for line in section.lines:
            console.print(line)
    console.print()


def _widths(console: Console) -> list[int]:
    """Of the four columns, one blank between them."""
    rest = max(24, min(console.width, 140) - _STATE - _WHAT - 3)
    found = rest * 3 // 5
    return [_STATE, _WHAT, found, rest - found]


def _show_row(
    console: Console, widths: Sequence[int], texts: Sequence[str], style: str, first: str = ""
) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1, 0, 0))
    for width in widths:
        grid.add_column(width=width, overflow="fold")
    grid.add_row(*(Text(text, first if n == 0 else style) for n, text in enumerate(texts)))
    console.print(grid)


def _as_json(sections: Sequence[Section], problems: Sequence[Problem]) -> str:
    """All of it for machines: the sections, and the problems as `check --json` has them."""
    told = json.loads(report.as_json(problems, None))
    del told["report"]  # figures of the data are `check`'s
    wrong = [f.what for section in sections for f in section.findings if f.state == "bad"]
    values = {"sections": [asdict(section) for section in sections], "wrong": wrong, **told}
    return json.dumps(values, ensure_ascii=False, indent=2)
