"""What a run will hold in memory, part by part and phase by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Place = Literal["gpu", "ram"]
# parts that come and go within a phase
PASSING = ("activations", "logits", "gathered weights", "gaps", "copies at work")
STEP = "training step"  # the name of the phase that a micro-step measures


@dataclass(frozen=True)
class Phase:
    """A part of the run and what lies in memory when it needs most.

    Attributes:
        name: "loading", "caching", "training step", "samples", "export".
        gpu: Bytes by name, on the card; empty on a CPU.
        ram: Bytes by name, in the process's resident set; what the imports take among them.
    """

    name: str
    gpu: Mapping[str, int]
    ram: Mapping[str, int]

    def total(self, place: Place) -> int:
        """All bytes of one place."""
        return sum((self.gpu if place == "gpu" else self.ram).values())


@dataclass(frozen=True)
class Estimate:
    """The phases of a run. Its peak in each place is that of the phase that needs most there.

    Attributes:
        phases: In the order of the run.
        batch: The heaviest micro-batch in words: "4 rows, 3,100 tokens", "2 × 512×512 pixels".
        later: Bytes by name that come on the device after the first micro-step only: what the
            optimizer keeps, gradients of earlier micro-batches, a moving average.
        measured: Whether a real micro-step has corrected it.
    """

    phases: Sequence[Phase]
    batch: str
    later: Mapping[str, int]
    measured: bool = False

    @property
    def peak_gpu(self) -> int:
        """Bytes on the card, 0 for a run on the CPU."""
        return self.largest("gpu").total("gpu")

    @property
    def peak_ram(self) -> int:
        """Bytes of the resident set."""
        return self.largest("ram").total("ram")

    def largest(self, place: Place) -> Phase:
        """The phase that needs most in a place."""
        return max(self.phases, key=lambda phase: phase.total(place))

    def table(self) -> list[str]:
        """Lines for people: a place each with its peak, the phase and the parts of it."""
        places: list[Place] = ["gpu", "ram"] if self.peak_gpu else ["ram"]
        return [line for place in places for line in self._lines(place)]

    def _lines(self, place: Place) -> list[str]:
        phase = self.largest(place)
        parts = phase.gpu if place == "gpu" else phase.ram
        name = {"gpu": "GPU memory", "ram": "RAM"}[place]
        how = "measured" if self.measured else "about"
        said = ", ".join(f"{part} {size(bytes)}" for part, bytes in parts.items() if bytes)
        others = ", ".join(f"{p.name} {size(p.total(place))}" for p in self.phases if p != phase)
        return [
            f"{name}: {how} {size(phase.total(place))} in the {phase.name} ({self.batch}): {said}",
            f"{name} of the other phases: {others}",
        ]


def size(bytes: int) -> str:
    """Bytes for people, in powers of ten: `1.72 GB`, `3 MB`, `-20 MB`."""
    if abs(bytes) >= 995e6:
        return f"{bytes / 1e9:.2f} GB"
    return f"{bytes / 1e6:.0f} MB" if abs(bytes) >= 1e6 else f"{bytes / 1e3:.0f} kB"
