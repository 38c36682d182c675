"""Every name in a real-sized file of SD 1.5, SD 2.1 and SDXL is one that the WebUIs look for.

The names that we write, of all layers, against the lists that AUTOMATIC1111 and ComfyUI derive.
"""

from __future__ import annotations

import pytest

from lora_scripts.export.readers import A1111_MISSES
from lora_scripts.models import original_names, skeleton, unet
from lora_scripts.models.kinds import Family
from tests.export import webui_facts
from tests.models import ldm_facts

WIDTHS = {"sd1": ldm_facts.REAL, "sd2": ldm_facts.REAL_2, "sdxl": ldm_facts.REAL_XL}
# UNet, text encoders
COUNTS: dict[Family, tuple[int, ...]] = {
    "sd1": (278, 72),
    "sd2": (278, 138),
    "sdxl": (788, 72, 192),
}
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")


def written(family: Family) -> dict[str, dict[str, str]]:
    """Component -> name in the file -> path of the layer, for all layers."""
    model = skeleton.of(family)
    return {
        component: {model.webui_name(component, path): path
                    for path in unet.adaptable(component, module)}
        for component, module in model.adapted.items()
    }  # fmt: skip


def ldm_modules(family: Family) -> set[str]:
    """The modules of the original model that hold tensors, as A1111 names them."""
    names = {fact.ldm.rsplit(".", 1)[0] for part in ldm_facts.parts(WIDTHS[family]).values()
             for fact in part}  # fmt: skip
    starts = ("model.", "cond_stage_model.", "conditioner.embedders.")
    return {
        name.removeprefix(start).replace(".", "_")
        for name in names
        for start in starts
        if name.startswith(start)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_finds_every_layer_where_it_is(family: Family) -> None:
    names = written(family)
    assert tuple(len(part) for part in names.values()) == COUNTS[family]
    known = webui_facts.comfy_unet(family)
    config = dict(skeleton.of(family).adapted["unet"].config)  # type: ignore[arg-type]
    for name, path in names.pop("unet").items():
        assert known[name] == original_names.unet_path(path, config)
    texts = {name for part in names.values() for name in part}
    assert texts <= webui_facts.comfy_texts(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a1111_finds_every_layer_but_one_of_sdxl(family: Family) -> None:
    names = {name for part in written(family).values() for name in part}
    modules = ldm_modules(family)
    lost = {name for name in names if webui_facts.a1111_target(name, family) not in modules}
    assert lost == ({A1111_MISSES} if family == "sdxl" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_encoders_layers_go_to_their_own_places(family: Family) -> None:
    """Six layers a block, four modules of OpenCLIP: query, key and value share one."""
    names = written(family)
    del names["unet"]
    for component, part in names.items():
        targets = {webui_facts.a1111_target(name, family) for name in part}
        is_clip = family == "sd1" or (family, component) == ("sdxl", "text_encoder")
        assert len(targets) == len(part) // 6 * (6 if is_clip else 4)
