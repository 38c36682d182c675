"""The loop of a labelling: decode, caption, keep. Every batch is on the disk before the next."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from lora_scripts.errors import UserError, WorkError
from lora_scripts.label import decode
from lora_scripts.label.captioner import Caption
from lora_scripts.label.decode import Decoded
from lora_scripts.label.journal import Journal, Made
from lora_scripts.label.plan import Job
from lora_scripts.label.progress import counting

logger = logging.getLogger(__name__)


def make(
    job: Job, names: Sequence[str], caption: Caption, unlabelled: dict[str, str]
) -> dict[str, Made]:
    """Caption images and keep the captions in the job's journal.

    Args:
        job: What the images belong to.
        names: The images, in order.
        caption: The captioner.
        unlabelled: Takes the name of each image that cannot be captioned, and why.

    Returns:
        The captions by name.

    Raises:
        WorkError: if a caption cannot be kept, or the memory is too small for a batch.
    """
    made: dict[str, Made] = {}
    job.journal.cut_torn_end()
    before = len(unlabelled)
    began = time.monotonic()
    with counting("labelling", len(names)) as progress:
        for new in captions(job, names, caption, unlabelled):
            job.journal.append(new)
            made |= {each.name: each for each in new}
            progress.done(len(made) + len(unlabelled) - before)
    seconds = time.monotonic() - began
    rate = len(made) / seconds
    logger.info("Captioned %d images in %.1f s, %.1f images/s.", len(made), seconds, rate)
    return made


def captions(
    job: Job, names: Sequence[str], caption: Caption, unlabelled: dict[str, str]
) -> Iterator[list[Made]]:
    """The captions of images, batch by batch; see `make`."""
    for batch in decode.batches(
        job.listing.path,
        names,
        size=job.request.batch_size,
        workers=job.request.threads,
        unreadable=unlabelled,
    ):
        yield _captioned(batch, caption, unlabelled, job.journal)


def _captioned(
    batch: Sequence[Decoded], caption: Caption, unlabelled: dict[str, str], journal: Journal
) -> list[Made]:
    """The captions of a batch; of each image alone if the captioner refuses one of them."""
    try:
        said = caption([each.image for each in batch])
    except UserError:
        raise
    except ValueError as error:  # how processors refuse a picture, a very long one for instance
        if len(batch) == 1:
            unlabelled[batch[0].name] = f"the captioner refuses it: {error}"
            return []
        alone = (_captioned([each], caption, unlabelled, journal) for each in batch)
        return [made for each in alone for made in each]
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        raise WorkError(
            f"the memory of the GPU is too small for {len(batch)} images at once; take a smaller "
            f"--batch-size. What is captioned is kept in {journal.path}"
        ) from error
    return [Made(each.name, text, each.stamp) for each, text in zip(batch, said, strict=True)]
