"""The parts of an image model beside its denoiser: in memory while they are needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from lora_scripts import allocator
from lora_scripts.models.components import content_digest
from lora_scripts.models.sharding import is_sharded

T = TypeVar("T")
Read = Callable[[str, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


class Encoders:
    """VAE and text encoders: float32, frozen, on the device for their visits alone.

    With a way to read them again they rest: between visits their weights are let go of (their
    tensors are on the meta device then, names and shapes stay), but for those that are kept.
    """

    def __init__(self, device: torch.device, read: Read | None = None) -> None:
        """`read`: gives a part's tensors by its name, like those given; without it none rests."""
        self.device = device
        self._read = read
        self._modules: dict[str, nn.Module] = {}
        self._digests: dict[str, Any] = {}
        self._kept: set[str] = set()
        self._visiting: set[str] = set()
        self._made: dict[tuple[Hashable, ...], Any] = {}

    def add(self, name: str, module: nn.Module) -> None:
        """Take charge of a part. One that rests is hashed now, while its weights are there."""
        self._modules[name] = module.float().requires_grad_(False).eval()
        if self._read is not None:
            self._digests[name] = content_digest(module)
            _let_go(module)

    def rests(self, name: str) -> bool:
        """Whether a part is let go of between visits."""
        return self._read is not None and name not in self._kept

    def content_id(self, name: str, *more: str) -> str:
        """SHA-256 over a part's tensors, their names and `more`: the key of what it produces."""
        known = self._digests.get(name)
        digest = content_digest(self._modules[name]) if known is None else known.copy()
        for text in more:
            digest.update(text.encode("utf-8"))
        found: str = digest.hexdigest()
        return found

    def asked(self, names: Sequence[str], key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives while parts visit. Of parts that rest it is asked once for each key, as
        they stay as they are."""
        known = (*names, key)
        if known in self._made and all(map(self.rests, names)):
            found: T = self._made[known]
            return found
        with self.visiting(*names):
            made = make()
        if all(map(self.rests, names)):
            self._made[known] = made
        return made

    @contextmanager
    def visiting(self, *names: str) -> Iterator[None]:
        """Parts on the device within this context; after it back where they were, or at rest.

        One that is sharded comes by itself. A visit within a visit costs nothing: looking through
        a module's parts takes as long as encoding a small picture."""
        new = [n for n in names if n not in self._visiting and not is_sharded(self._modules[n])]
        homes = {n: _device_of(self._modules[n]) for n in new}
        self._visiting |= homes.keys()
        try:
            for name in homes:
                self._wake(name)
                self._modules[name].to(self.device)
            yield
        finally:
            self._visiting -= homes.keys()
            for name, home in homes.items():
                if home.type == "meta" and self.rests(name):
                    _let_go(self._modules[name])
                elif home.type != "meta":
                    self._modules[name].to(home)

    def keep(self, *names: str) -> None:
        """From now on these do not rest: they are changed, or needed as a whole."""
        for name in names:
            self._wake(name)
            self._kept.add(name)

    def keep_on_device(self, *names: str) -> None:
        """From now on these stay on the device."""
        self.keep(*names)
        for name in names:
            self._modules[name].to(self.device)

    def _wake(self, name: str) -> None:
        module = self._modules[name]
        if self._read is None or _device_of(module).type != "meta":
            return
        module.load_state_dict(self._read(name, module.state_dict()), assign=True)


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _let_go(module: nn.Module) -> None:
    """Parameters lose their numbers and keep their shapes. Buffers stay: files do not have all."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
    allocator.give_back()
