"""How much memory a run will take: from shapes alone before it, corrected by one real micro-step.

found = foretell(config, rows, compute)              # no weight is read; seconds
problems = refuse_or_warn(found, free(compute))      # an error if it surely cannot fit
changes = advice(config, rows, compute, free(compute))
...                                                  # the task is built, encoded, attached
found = corrected(found, micro_step(task, config, compute))
"""

from __future__ import annotations

from lora_scripts.memory.advising import Change, advice, largest_batch, refuse_or_warn
from lora_scripts.memory.estimate import Estimate, Phase
from lora_scripts.memory.foretelling import foretell
from lora_scripts.memory.measuring import Peak, corrected, micro_step
from lora_scripts.memory.room import Room, free

__all__ = [
    "Change",
    "Estimate",
    "Peak",
    "Phase",
    "Room",
    "advice",
    "corrected",
    "foretell",
    "free",
    "largest_batch",
    "micro_step",
    "refuse_or_warn",
]
