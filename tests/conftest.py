"""What several tests share: toy models are made once a session; no test reaches a network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from lora_scripts.models.kinds import Family

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # several processes at once: threads that wait for each other would slow all of them down
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: "long" not in item.keywords)


def pytest_collection_finish() -> None:
    """The libraries are imported and stay: every run's search for garbage need not pass them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy SD1.x model (noise prediction) as a diffusers folder."""
    from tests import toys

    return toys.save_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """A toy model of each family as a diffusers folder."""
    from tests import toys

    folder = tmp_path_factory.mktemp("bases")
    return {name: save(folder / name) for name, (save, _) in toys.FAMILIES.items()}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of 64 pixels with captions."""
    from tests import toys

    return toys.save_pictures(tmp_path_factory.mktemp("data") / "squares")
