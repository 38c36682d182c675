"""Real shapes with random weights: load, train, export, reload. Slow: `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import image_shapes
from lora_scripts.models.kinds import Family
from lora_scripts.tasks import diffusion
from tests import runs, toys


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("family", "resolution", "checkpointing"),
    [("sd1", 512, False), ("sd1", 768, True), ("sd2", 768, True), ("sdxl", 1024, True)],
)
def test_a_run_at_real_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: Family,
    resolution: int,
    checkpointing: bool,
) -> None:
    """SDXL takes minutes on two cores, and 16 GB of memory (docs/benchmarks.md)."""
    image_shapes.save_base(tmp_path / "base", family)
    monkeypatch.setattr(diffusion, "MEASURED_VIEWS", 1)
    data = toys.save_pictures(tmp_path / "data", count=1, side=resolution)
    code, output = runs.run(
        tmp_path / "base", data, tmp_path,
        resolution=resolution, batch_size=1, epochs=2, mixed_precision="auto", max_train_steps=2,
        gradient_checkpointing=checkpointing, learning_rate=1e-4,
    )  # fmt: skip
    assert code == 0
    rows = [row for row in runs.metrics(output) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert (output / "pytorch_lora_weights.safetensors").is_file()
