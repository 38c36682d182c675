"""Which programs read a LoRA file of a family that is known here, and how.

Rebuilt from the key matching and the formulas in their sources: AUTOMATIC1111 1.10, Forge of
2025-06, ComfyUI 0.3.77, diffusers 0.42; see docs/decisions.md and tests/export/webui_facts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lora_scripts.models.header import TensorInfo
from lora_scripts.models.kinds import Family
from lora_scripts.models.lora_layouts import Module, Sorted

DIFFUSERS_STARTS = ("unet.", "text_encoder.", "text_encoder_2.")
# The one layer of SDXL that A1111 looks for in another place than where it is.
A1111_MISSES = "lora_unet_up_blocks_0_upsamplers_0_conv"


@dataclass(frozen=True)
class Facts:
    """What the answers depend on."""

    family: Family
    found: Sorted
    header: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def share(self, knows: Callable[[Module], bool]) -> tuple[int, int]:
        """How many layers a program knows by name, of how many."""
        modules = self.found.modules.values()
        return sum(map(knows, modules)), len(modules)

    @property
    def dora(self) -> str | None:
        """Whether magnitudes are by output (the method's way) or by input; None: no DoRA."""
        for module in self.found.modules.values():
            if "magnitude" in module.tensors:
                shape = self.header[module.tensors["magnitude"]].shape
                by_input = module.layout == "kohya" and len(shape) > 1 and shape[0] == 1
                return "input" if by_input else "output"
        return None


def programs(facts: Facts) -> dict[str, str]:
    """Program -> "yes", or what it makes of the file."""
    return {
        "AUTOMATIC1111": _a1111(facts),
        "ComfyUI, Forge": _comfy(facts),
        "diffusers": _diffusers(facts),
        "lora-scripts": _ours(facts),
    }


def _a1111(facts: Facts) -> str:
    known, every = facts.share(lambda m: m.name.startswith("lora_") and m.layout == "kohya")
    if not known and every:
        return "no: it knows none of these names"
    if facts.dora == "output":
        return "reads it, but not as trained: it takes DoRA's norms by input"
    if A1111_MISSES in facts.found.modules and facts.family == "sdxl":
        return f"all layers but {A1111_MISSES}"
    if (filed := _filed_as(facts.metadata)) not in (None, facts.family):
        return f"yes, but lists it under {filed}: its header says so{_scale(facts)}"
    return _share(known, every) + _scale(facts)


def _filed_as(metadata: Mapping[str, str]) -> Family | None:
    """The family under which A1111 lists a file; None: with any base."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    if metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if metadata else None


def _comfy(facts: Facts) -> str:
    known, every = facts.share(_comfy_knows)
    if not known and every:
        return "no: it knows none of these names"
    if facts.dora == "output":
        return f"{_share(known, every)}; DoRA near to what was trained: norms of the base alone"
    return _share(known, every) + _scale(facts)


def _comfy_knows(module: Module) -> bool:
    """Whether a name is in ComfyUI's list; of diffusers' attention only the oldest form is."""
    name = module.name
    if name.startswith(("lora_", "lycoris_", "diffusion_model.")):
        return True
    if name.startswith(("text_encoder.", "text_encoder_2.")):
        return ".text_model." in name
    is_path = name.removeprefix("unet.").startswith(("down_blocks.", "mid_block.", "up_blocks."))
    return module.layout == "old diffusers" or (is_path and ".to_" not in name)


def _diffusers(facts: Facts) -> str:
    if facts.found.others:
        return "no: it reads LoRA of two matrices only"
    names = facts.found.modules
    is_flat = all(name.startswith(("lora_unet_", "lora_te")) for name in names)
    if not is_flat and not all(name.startswith(DIFFUSERS_STARTS) for name in names):
        return "no: it knows none of these names"
    if is_flat and facts.dora:
        return "no: it drops .dora_scale"
    if (lost := _left_out(facts)) > 0:
        return f"partly: {len(names) - lost} of {len(names)} layers, named in one way"
    original = any("input_blocks_" in name or "output_blocks_" in name for name in names)
    if is_flat and original and facts.family != "sdxl":
        return "no: of this family it reads diffusers' block names only"
    return "yes" + (_scale(facts) if is_flat else "")


def _left_out(facts: Facts) -> int:
    """UNet layers that diffusers leaves out: by its first key it takes all to be named alike."""
    unet = [m for m in facts.found.modules.values() if m.name.startswith("unet.")]
    first = next((name for name in facts.header if name.startswith("unet.")), "")
    return sum(module.layout != "peft" for module in unet) if "lora_A" in first else 0


def _ours(facts: Facts) -> str:
    if facts.found.others:
        return "no: it reads LoRA, rsLoRA and DoRA only"
    return "no: DoRA's magnitudes are by input" if facts.dora == "input" else "yes"


def _share(known: int, every: int) -> str:
    return "yes" if known == every else f"partly: {known} of {every} layers"


def _scale(facts: Facts) -> str:
    """What is to be said where a file of the WebUI's layout has no alphas."""
    modules = [m for m in facts.found.modules.values() if m.layout == "kohya"]
    missing = any("alpha" not in module.tensors for module in modules)
    return "; it has no alpha, so its scale is 1" if missing else ""
