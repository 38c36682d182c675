"""Whether a LoRA or a checkpoint belongs to a base model, told before anything is loaded.

Headers and configs are read, no tensor is: layers are compared by name and shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.logs import quiet_libraries
from lora_scripts.models import hub
from lora_scripts.models.header import TensorInfo, read_header, read_metadata
from lora_scripts.models.json_file import read_json
from lora_scripts.models.signature import Signature, read_signature
from lora_scripts.models.text_signature import TextSignature, read_text_signature
from lora_scripts.run_files import ADAPTER_NAME
from lora_scripts.schema import Config, ImageConfig, TextConfig

if TYPE_CHECKING:
    from torch import nn

    from lora_scripts.models.skeleton import Skeleton

ADAPTER = "adapter."  # before the adapters' names in a checkpoint's training.safetensors
_TEXT = ("lora_te", "text_encoder")
_DOWN, _UP = ".lora_A.", ".lora_B."
Base = Signature | TextSignature


def find(base_model: str, *, is_text: bool, own_code: bool = False) -> Base | None:
    """What a base model is, if that is known before it is loaded.

    None if it must be fetched first, or with `own_code` (`trust_remote_code`) brings code of its
    own, which alone knows its layers.

    Raises:
        UserError: if a path names nothing, or what is there cannot be taken.
    """
    path = hub.local_path(base_model)
    if path is not None:
        base = _read(path, is_text=is_text)
    elif (path := _in_cache(base_model)) is not None:
        try:
            base = _read(path, is_text=is_text)
        except UserError:
            return None  # fetched in part only
    else:
        return None
    return None if own_code and isinstance(base, TextSignature) and base.own_code else base


def of(config: Config) -> Base | None:
    """`find` for a config's base model."""
    is_text = isinstance(config, TextConfig)
    own_code = isinstance(config, TextConfig) and config.trust_remote_code
    return find(config.base_model, is_text=is_text, own_code=own_code)


def _read(path: Path, *, is_text: bool) -> Base:
    return read_text_signature(path) if is_text else read_signature(path)


def modules_of(base: Base) -> dict[str, nn.Module] | None:
    """The modules that a LoRA can sit on, by component, without weights (on the meta device).

    None if transformers does not know its kind.

    Raises:
        UserError: if the model cannot be taken.
    """
    quiet_libraries()
    if isinstance(base, TextSignature):
        model = _text_model(base)
        return None if model is None else {"model": model}
    from lora_scripts.models import skeleton

    return dict(skeleton.of_base(base).adapted)


def check_lora(path: Path, base: Base) -> None:
    """See that a finished LoRA is one for this base model.

    Args:
        path: `init_lora`: a file, or a run's folder.
        base: As `find` gives it.

    Raises:
        UserError: naming what the LoRA is for.
    """
    quiet_libraries()
    if isinstance(base, TextSignature):
        _check_text_lora(path, base)
    else:
        _check_image_lora(path, base)


def check_checkpoint(folder: Path, base: Base, trained_on: str) -> None:
    """See that a checkpoint's adapters sit on this base model's layers.

    Args:
        folder: The checkpoint.
        base: As `find` gives it.
        trained_on: `base_model` as the checkpoint's config has it.

    Raises:
        UserError: if its layers are not in the base model, or are of another size.
    """
    modules = modules_of(base)
    if modules is None:
        return
    header = read_header(folder / "training.safetensors")
    own = {n.removeprefix(ADAPTER): info for n, info in header.items() if n.startswith(ADAPTER)}
    trouble = _first_misfit(_by_layer(own), modules)
    if trouble is not None:
        what = f"was trained on another base model ({trained_on}): {trouble}"
        raise user_error(str(folder), what)


# --- images ---------------------------------------------------------------------------------------


def _check_image_lora(path: Path, base: Signature) -> None:
    from lora_scripts.models import lora_file, lora_layouts, lora_names, skeleton

    file = lora_layouts.locate(path)
    header = read_header(file)
    lora_file.refuse_others(file, lora_layouts.sort(header))
    model = skeleton.of_base(base)
    if not lora_names.fits(header, model):
        raise user_error(str(file), _image_misfit(file, header, model, base))


def _image_misfit(
    file: Path, header: Mapping[str, TensorInfo], model: Skeleton, base: Signature
) -> str:
    """What a file is for that does not fit, and what the base model is."""
    from lora_scripts.models import lora_families, lora_layouts, lora_names

    family = lora_families.FAMILY_NAMES[base.family]
    own = f"base_model is {family}"
    meant = lora_families.recognise(header, read_metadata(file))
    if meant is not None and not meant.startswith(family):
        return f"is a LoRA for {meant}; {own}"
    places = lora_names.names_of(model)
    for name, module in lora_layouts.sort(header).modules.items():
        place = places.get(lora_layouts.bare(name))
        if place is None:
            return f"is a LoRA for another model: {name} is no layer of base_model ({own})"
        shape = lora_names.shape_of(model, *place)
        down, up = (header[module.tensors[part]].shape for part in ("down", "up"))
        if (up[0], down[1]) != shape[:2]:
            return (
                f"is a LoRA for another model: {_sizes(name, (up[0], down[1]), shape[:2])}; {own}"
            )
    return f"is a LoRA for another model; {own}"


# --- texts ----------------------------------------------------------------------------------------


def _check_text_lora(folder: Path, base: TextSignature) -> None:
    from lora_scripts.models.lora import PREFIX

    file = folder / ADAPTER_NAME
    model = _text_model(base)
    if model is None:
        return
    header = {name.removeprefix(PREFIX): info for name, info in read_header(file).items()}
    trouble = _first_misfit(((f"model.{name}", s) for name, s in _by_layer(header)),
                            {"model": model})  # fmt: skip
    if trouble is None:
        return
    settings = folder / "adapter_config.json"
    named = read_json(settings).get("base_model_name_or_path") if settings.is_file() else None
    its = f"; its adapter_config.json names {named}" if named else ""
    raise user_error(str(file), f"is a LoRA for another base model: {trouble}{its}")


def _text_model(base: TextSignature) -> nn.Module | None:
    """The language model without weights; None if transformers does not know its kind."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from lora_scripts.models import causal_lm

    is_known = base.config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if base.layout == "transformers" and not is_known:
        return None
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(causal_lm.load_config(base))
    return model


# --- layers ---------------------------------------------------------------------------------------


def _by_layer(header: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Of PEFT's names: each layer's path, and the sizes (out, in) that its adapter is for."""
    for name, info in header.items():
        path, found, rest = name.partition(_DOWN)
        up = header.get(f"{path}{_UP}{rest}")
        if found and up is not None and len(info.shape) > 1:
            yield path, (up.shape[0], info.shape[1])


def _first_misfit(
    adapters: Iterator[tuple[str, tuple[int, int]]], modules: Mapping[str, nn.Module]
) -> str | None:
    """The first adapter that has no layer, or one of another size, in words."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    shapes = {
        f"{component}.{path}": outputs_and_inputs(layer)
        for component, module in modules.items()
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | Conv1D)
    }
    for path, sizes in adapters:
        if path not in shapes:
            return f"{path} is no layer of base_model"
        if sizes != shapes[path]:
            return _sizes(path, sizes, shapes[path])
    return None


def outputs_and_inputs(layer: Any) -> tuple[int, int]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, weight (in, out)

    first, second = layer.weight.shape[:2]
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def _sizes(layer: str, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    its, here = ("×".join(str(side) for side in sizes) for sizes in (found, needed))
    return f"{layer} is {here} in base_model, {its} in the model it was made for"


def _in_cache(hub_id: str) -> Path | None:
    """Where the hub's files of a model lie on this machine, None if they are not all here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def problems(lora: Path, base: Base, where: str) -> list[Problem]:
    """What `check_lora` finds, said of the key `init_lora` at its place."""
    try:
        check_lora(lora, base)
    except UserError as error:
        return [Problem(where, f"{problem.where}: {problem.what}") for problem in error.problems]
    return []


def misfits(path: Path, config: Config) -> list[str]:
    """How a finished LoRA that a run goes on from is not as the config's keys say.

    Raises:
        UserError: if there is no such file, or it is damaged.
    """
    from lora_scripts.models import lora_layouts

    header = read_header(lora_layouts.locate(path))
    modules = lora_layouts.sort(header).modules
    ranks = {header[m.tensors["down"]].shape[0] for m in modules.values() if "down" in m.tensors}
    found = []
    if other := ", ".join(str(rank) for rank in sorted(ranks - {config.lora_rank})):
        found.append(f"found {path}, which has the rank {other}, not {config.lora_rank}: lora_rank "
                     "must be that of the file")  # fmt: skip
    is_dora = any("magnitude" in module.tensors for module in modules.values())
    if modules and is_dora != (config.lora_type == "dora"):
        found.append(
            f"found {path}, which is {'' if is_dora else 'not '}DoRA, and lora_type: "
            f"{config.lora_type}: one of the two is DoRA, the other is not"
        )
    has_text = any(lora_layouts.bare(name).startswith(_TEXT) for name in modules)
    if isinstance(config, ImageConfig) and has_text and not config.train_text_encoder:
        found.append(f"found {path}, which has layers of text_encoder; train_text_encoder is false")
    return found
