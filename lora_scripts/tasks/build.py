"""From a config to a loaded task: the one place that chooses what is trained."""

from __future__ import annotations

from collections.abc import Sequence

from lora_scripts.config import Config, Dataset
from lora_scripts.data import images
from lora_scripts.data.records import Record
from lora_scripts.device import Compute
from lora_scripts.models import hub
from lora_scripts.models.family import ImageFamily
from lora_scripts.models.signature import Signature, read_signature
from lora_scripts.tasks.diffusion import DiffusionTask


def find_base(base_model: str) -> Signature:
    """Where the base model lies (fetched from the hub if it is not here) and what it is.

    Raises:
        UserError: if it is not to be had, or of a family this version does not train.
    """
    path = hub.local_path(base_model)
    return read_signature(hub.fetch(base_model) if path is None else path)


def load_family(found: Signature, compute: Compute) -> ImageFamily:
    """Read a base model into memory."""
    match found.family:
        case "sd1":
            from lora_scripts.models import sd

            return sd.load(found, compute)


def build(
    config: Config,
    rows: Sequence[tuple[Record, Dataset]],
    found: Signature,
    compute: Compute,
) -> DiffusionTask:
    """The task of a config: model loaded, data dealt out; not yet encoded, no LoRA yet."""
    family = load_family(found, compute)
    data = images.gather(rows, config, family.pixel_multiple)
    return DiffusionTask(config, family, data)
