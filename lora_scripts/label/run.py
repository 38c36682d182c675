"""`lora-scripts label`: a caption for every image of a folder, resumable at any moment.

Captions go to a journal as they are made; the captions file is written at the end, in one step,
and the journal is removed. The journal holds the captioner's own words: prefix, suffix, trigger
word and blacklist are those of the run that finishes, while another captioner, model or setting
is refused until `--overwrite`. An image that has changed since it was captioned is captioned again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_scripts.data.reading import count, plain
from lora_scripts.errors import WorkError, user_error
from lora_scripts.label import captioner, making, review
from lora_scripts.label.captioner import Caption
from lora_scripts.label.journal import Made
from lora_scripts.label.plan import Job, Plan, plan, prepare, remarks
from lora_scripts.label.request import TAGGER, LabelRequest
from lora_scripts.label.review import Entry
from lora_scripts.label.rows import key
from lora_scripts.label.wording import cleaned, worded
from lora_scripts.logs import quiet_libraries

logger = logging.getLogger(__name__)
SHOWN = 3  # captions that a dry run shows
LISTED = 20  # unreadable images that are named one by one


def run(request: LabelRequest) -> None:
    """Caption what has no caption yet, and write the captions file.

    Raises:
        UserError: with everything wrong that can be known before an image is opened.
        WorkError: if images could not be read (all others are captioned), or a file not written.
    """
    job = prepare(request)

    def load() -> Caption:
        if job.captioner != TAGGER:
            quiet_libraries()
        return captioner.load(job.captioner, job.model, request.settings, request.device)

    if request.dry_run:
        _rehearse(job, load)
        return
    with _alone(job):
        unreadable = label(job, load)
    if unreadable:
        raise WorkError(
            f"{count(list(unreadable), 'image')} could not be labelled; all others are in "
            f"{job.target.place}. Replace or remove these, and run the same command again"
        )


def label(job: Job, load: Callable[[], Caption]) -> dict[str, str]:
    """Caption, store, and write the page for a look.

    Args:
        job: From `plan.prepare`; nobody else works on it.
        load: Loads the captioner; called only if there is an image to caption.

    Returns:
        The images that could not be labelled, and why.
    """
    begun = plan(job)
    _say(job, begun)
    unreadable = _refused(job)
    if job.journal.is_of_another():
        logger.warning("%s was made otherwise; its captions are not used", job.journal.path)
        job.journal.remove()
    made = dict(begun.made)
    if begun.todo:
        made |= making.make(job, begun.todo, load(), unreadable)
    stored = _store(job, made)
    for name, why in list(unreadable.items())[:LISTED]:
        logger.warning("%s: %s", plain(name), why)
    if job.request.review is not None:
        entries = [Entry(name, stored.get(key(name), ""), name in made) for name in job.names]
        _write_review(job, job.request.review, entries)
    return unreadable


def _rehearse(job: Job, load: Callable[[], Caption]) -> None:
    """What would be done, and the first few captions. Nothing is written."""
    begun = plan(job)
    _say(job, begun)
    shown = begun.todo[:SHOWN]
    if shown:
        unreadable: dict[str, str] = {}
        made = making.captions(job, shown, load(), unreadable)
        for each in (each for batch in made for each in batch):
            caption = worded(_kept(job, each), job.request.wording)
            logger.info("%s: %s", plain(each.name), plain(caption) or "(an empty caption)")
        for name, why in unreadable.items():
            logger.warning("%s: %s", plain(name), why)
    if job.request.review is not None:
        logger.info("%s would be written.", job.request.review)
    logger.info("Nothing was written (--dry-run).")


def _say(job: Job, begun: Plan) -> None:
    for remark in remarks(job, begun.there):
        logger.warning("%s", remark)
    have = sum(bool(begun.there.get(key(name), "").strip()) for name in job.names)
    logger.info("%s: %s", job.listing.path, count(job.names, "image"))
    verb = "get a new one (--overwrite)" if job.request.overwrite else "keep it"
    if have:
        logger.info("%d of them have a caption in %s and %s", have, job.target.place, verb)
    if begun.made:
        logger.info("%d were captioned by an unfinished labelling", len(begun.made))
    how = f"{job.captioner} ({job.model})"
    logger.info("%d to caption with %s, into %s", len(begun.todo), how, job.target.place)


def _refused(job: Job) -> dict[str, str]:
    """Images whose files cannot be used, and why."""
    refused = job.listing.refused.items()
    return {name: str(why) for name, why in refused if job.request.recursive or "/" not in name}


def _kept(job: Job, made: Made) -> str:
    """What is left of the captioner's words."""
    return cleaned(made.said, job.request.wording, tags=job.captioner == TAGGER)


def _store(job: Job, made: Mapping[str, Made]) -> dict[str, str]:
    """Write the captions file, read it back, remove the journal. All captions, by `rows.key`."""
    kept = {name: _kept(job, made[name]) for name in job.listing.images if name in made}
    captions = {name: worded(text, job.request.wording) for name, text in kept.items()}
    try:
        if captions:
            job.target.write(captions, overwrite=job.request.overwrite)
        stored = job.target.read()
        assert all(key(name) in stored for name in captions)
        job.journal.remove()
    except OSError as error:
        raise WorkError(
            f"{job.target.place} cannot be written ({error.strerror}); is it open in another "
            f"program? The captions are in {job.journal.path}; run the same command again"
        ) from error
    if blank := [name for name, text in kept.items() if not text]:
        what = "the captioner said nothing of use; write these captions by hand"
        logger.warning("%s: %s", count(blank, "image"), what)
    have = sum(bool(stored.get(key(name), "").strip()) for name in job.names)
    logger.info("%d of %d images have a caption: %s", have, len(job.names), job.target.place)
    return stored


def _write_review(job: Job, path: Path, entries: Sequence[Entry]) -> None:
    try:
        review.write(path, job.listing.path, entries, job.request.threads)
    except OSError as error:
        raise WorkError(f"{path} cannot be written ({error.strerror})") from error
    logger.info("Look at them: %s", path)


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Hold the captions file for this labelling alone.

    Raises:
        UserError: if another labelling writes to it.
    """
    path = job.journal.path
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        what = "another labelling is writing there now; wait for it, or end it"
        raise user_error(job.target.place, what) from None
    try:
        yield
    finally:
        lock.release()
