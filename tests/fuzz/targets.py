"""All targets by name."""

from __future__ import annotations

from tests.fuzz import targets_data, targets_models, targets_runs
from tests.fuzz.trial import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (*targets_data.TARGETS, *targets_models.TARGETS, *targets_runs.TARGETS)
}
