"""`init_lora`: a LoRA that begins where a finished one ended."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from lora_scripts.errors import user_error
from lora_scripts.files import file_hash
from lora_scripts.models import lora
from lora_scripts.models.lora import AdaptedLayer

logger = logging.getLogger(__name__)


def noted(file: Path | None) -> dict[str, str]:
    """What a task's fingerprint says of the finished LoRA's file: its hash; {} without one."""
    return {} if file is None else {"init_lora": file_hash(file)}


def start_from(
    path: Path,
    modules: Mapping[str, nn.Module],
    finished: Mapping[str, Sequence[AdaptedLayer]],
) -> None:
    """Give the LoRAs attached to `modules` the matrices of a finished one, component by component.

    Raises:
        UserError: if it has another rank or kind, or layers that this run does not adapt.
    """
    if extra := [name for name in finished if finished[name] and name not in modules]:
        what = f"found {path}, which has layers of {', '.join(extra)}; train_text_encoder is false"
        raise user_error("init_lora", what)
    fresh = []
    for component, module in modules.items():
        try:
            left = lora.initialise(module, finished.get(component, ()))
        except ValueError as error:
            advice = "lora_rank, lora_type and lora_targets must be those of that file"
            raise user_error("init_lora", f"found {path}, but {error}; {advice}") from None
        fresh += [f"{component}.{name}" for name in left]
    logger.info("The LoRA goes on from %s", path)
    if fresh:
        logger.warning(
            "%d layers are not in %s and start afresh: %s, …", len(fresh), path, fresh[0]
        )
