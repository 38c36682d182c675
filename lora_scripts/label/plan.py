"""What there is to label: the images of a folder, less those that have a caption already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_scripts.data.image_folder import ImageFolder, find_kohyas_folders, list_folder
from lora_scripts.data.reading import count
from lora_scripts.errors import Problem, UserError
from lora_scripts.label import captioner
from lora_scripts.label.journal import Journal, Made, stamp_of
from lora_scripts.label.request import LabelRequest, problems, problems_with
from lora_scripts.label.rows import CaptionsFile, captions_file, key
from lora_scripts.models import hub


@dataclass(frozen=True)
class Job:
    """A request that can be worked on.

    Attributes:
        captioner: The name of the captioner.
        model: The folder of its weights.
        listing: What lies in the folder of images.
        names: The images that shall have a caption.
        target: Where captions are stored.
        journal: Where they are kept while the work is unfinished.
    """

    request: LabelRequest
    captioner: str
    model: Path
    listing: ImageFolder
    names: list[str]
    target: CaptionsFile
    journal: Journal


@dataclass(frozen=True)
class Plan:
    """Where a job stands.

    Attributes:
        there: Captions that are stored, by `rows.key` of the image's name.
        made: Captions of an unfinished labelling whose images are as they were, by name.
        todo: The images that are to be captioned, in order.
    """

    there: dict[str, str]
    made: dict[str, Made]
    todo: list[str]


def prepare(request: LabelRequest) -> Job:
    """The job that a request describes; no image is opened and nothing is written.

    Raises:
        UserError: with everything wrong: options, weights, folder, captions file.
    """
    found = problems(request)
    if any(problem.where.startswith("--captioner") for problem in found):
        raise UserError(found)  # what else would be wrong depends on it
    listing = list_folder(request.input)
    found += [problem for problem in listing.problems if problem.severity == "error"]
    names = [name for name in listing.images if request.recursive or "/" not in name]
    if not names and not found:
        found.append(_no_image(listing))
    name, model = _weights(request, found)
    if found:
        raise UserError(found)
    job = Job(
        request=request,
        captioner=name,
        model=model,
        listing=listing,
        names=names,
        target=captions_file(request.format_name, listing, request.output_path),
        journal=Journal(_journal_path(request), _maker(request, name, model)),
    )
    plan(job)
    return job


def plan(job: Job) -> Plan:
    """What is stored, what was made by an unfinished labelling, what is left to do.

    Raises:
        UserError: if the captions file or the journal cannot be gone on with.
    """
    overwrite = job.request.overwrite
    there = job.target.read()
    before = {} if overwrite and job.journal.is_of_another() else _by_name(job.journal)
    lacking = [n for n in job.listing.images if overwrite or not there.get(key(n), "").strip()]
    # also of sub-folders, which a run with --recursive may have captioned: nothing made is lost
    made = {n: before[n] for n in lacking if n in before and _is_unchanged(job, before[n])}
    named = set(job.names)
    return Plan(there, made, [name for name in lacking if name in named and name not in made])


def remarks(job: Job, there: Mapping[str, str]) -> Iterator[str]:
    """What the user should know of the folder and of the files that are there."""
    listing, request = job.listing, job.request
    for problem in listing.problems:
        yield str(problem)
    if below := [name for name in listing.images if "/" in name and not request.recursive]:
        yield f"{count(below, 'image')} in sub-folders are left out; --recursive labels them"
    images = {key(name) for name in listing.images}
    if request.format_name == "txt":
        for other in ("metadata.csv", "metadata.jsonl"):
            if (listing.path / other).exists():
                yield f"{other} is in the folder; a training reads it instead of the .txt files"
                return
        return
    if strangers := [name for name in there if name not in images]:
        what = "is not in the folder" if len(strangers) == 1 else "are not in the folder"
        yield f"{request.output_path}: {count(strangers, 'image')} named in it {what}; kept"
    if listing.captions:
        what = "are not read any more once there is"
        names = count(list(listing.captions.values()), "caption file")
        yield f"{names} beside the images {what} {request.output_path.name}; see --format txt"
    find_kohyas_folders(listing)
    if listing.repeats:
        yield "in folders named as kohya's scripts want them, repeats count with --format txt only"


def _no_image(listing: ImageFolder) -> Problem:
    if listing.images:
        what = f"no image in it; {count(listing.images, 'image')} in sub-folders: --recursive"
        return Problem(str(listing.path), what)
    return Problem(str(listing.path), "no image found; expected .png, .jpg, .webp or .bmp files")


def _weights(request: LabelRequest, found: list[Problem]) -> tuple[str, Path]:
    """The captioner and its weights; adds to `found` what is wrong with them.

    While something else is wrong, nothing is fetched from the hub.
    """
    name, model = request.captioner, request.model
    here = None if model is None else _folder(model)
    path = Path()
    try:
        if name is None:
            name = captioner.NAMES[0] if here is None else captioner.recognise(here)
        found += problems_with(request, name)
        if not found or not _is_fetched(model, here):
            path = captioner.find(name, model)
    except UserError as error:
        found += error.problems
    return name or captioner.NAMES[0], path


def _folder(model: str) -> Path | None:
    """The folder that `--model` names, if there is one; `captioner.find` says why not."""
    try:
        return hub.local_path(model)
    except UserError:
        return None


def _is_fetched(model: str | None, here: Path | None) -> bool:
    return model is None or (here is None and hub.HUB_ID.fullmatch(model) is not None)


def _journal_path(request: LabelRequest) -> Path:
    if request.format_name == "txt":
        return request.input / "captions.unfinished"
    return request.output_path.with_name(f"{request.output_path.name}.unfinished")


def _maker(request: LabelRequest, name: str, model: Path) -> dict[str, object]:
    return {"captioner": name, "model": str(model.resolve()), **vars(request.settings)}


def _by_name(journal: Journal) -> dict[str, Made]:
    return {each.name: each for each in journal.read()}


def _is_unchanged(job: Job, made: Made) -> bool:
    try:
        return stamp_of(job.listing.path / made.name) == made.stamp
    except OSError:
        return False
