"""A finished LoRA for images in other forms: another layout, another rank, merged into its base.

Nothing is overwritten, and everything that is written is read back and compared.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lora_scripts.adapters import Adapter
from lora_scripts.errors import WorkError, user_error
from lora_scripts.files import replace
from lora_scripts.logs import quiet_libraries

if TYPE_CHECKING:
    import torch

    from lora_scripts.models.family import ImageFamily
    from lora_scripts.models.lora import AdaptedLayer
    from lora_scripts.models.lora_names import Named
    from lora_scripts.models.signature import Signature

    Layers = Mapping[str, Sequence[AdaptedLayer]]

logger = logging.getLogger(__name__)

Form = Literal["diffusers", "webui", "merged", "single-file"]
FORMS: tuple[Form, ...] = get_args(Form)
SAME = 1e-4  # of the largest output: one model in float32, its adapters on it or in its weights
BASE_KEYS = ("lora_scripts.base_model", "ss_sd_model_name")  # where a header names the base
ROUNDED = 12  # units of the last place: what rounding the weights may do to the largest output


@dataclass(frozen=True)
class ConvertRequest:
    """What to write. `rank`: resize to it; `output`: by default beside the first LoRA.

    `prediction_type`: of a base whose files do not say it.
    """

    form: Form
    loras: Sequence[Adapter]
    base: str | None
    rank: int | None
    output: Path | None
    device: str
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"


def run(request: ConvertRequest) -> Path:
    """Write the form asked for. Returns its path.

    Raises:
        UserError: if something is not there, does not fit, or is there already.
        WorkError: if what was written does not read back as it should.
    """
    quiet_libraries()
    from lora_scripts.models import lora_file

    is_merge = request.form in ("merged", "single-file")
    if len(request.loras) > 1 and not is_merge:
        raise user_error("--lora", "give one; only --merge takes several")
    if request.rank is not None and is_merge:
        raise user_error("--rank", "does nothing beside --merge")
    file = lora_file.locate(request.loras[0].path)
    output = request.output or _usual(request, file)
    _check_free(request.form, output)
    match request.form:
        case "diffusers" | "webui":
            _rewrite(request, file, output)
        case "merged" | "single-file":
            _merge(request, file, output)
    return output


def _usual(request: ConvertRequest, file: Path) -> Path:
    path = request.loras[0].path
    stem = path.resolve().name if path.is_dir() else file.stem
    match request.form:
        case "merged":
            return file.parent / f"{stem}-merged"
        case "single-file":
            return file.parent / f"{stem}-merged.safetensors"
        case form:
            rank = f"-rank{request.rank}" if request.rank else ""
            return file.parent / f"{stem}{rank}-{form}.safetensors"


def _check_free(form: Form, output: Path) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        what = "is there already; name another place with --output, or move it away"
        raise user_error(str(output), what)
    if form != "merged" and output.suffix.lower() != ".safetensors":
        raise user_error(f"--output {output}", "must be the name of a .safetensors file")


# --- another layout or rank -----------------------------------------------------------------------


def _rewrite(request: ConvertRequest, file: Path, output: Path) -> None:
    from lora_scripts.export import files
    from lora_scripts.models import lora, lora_file
    from lora_scripts.models.header import read_metadata

    known = _layers_for(request, file)
    adapters: Layers = _scaled(lora_file.read(file, known), request.loras[0].scale)
    dtype = _dtype_of(file)
    if request.rank is not None:
        adapters, errors = resized(adapters, request.rank)
        _say_errors(errors)
    metadata = {**known.metadata(), **_carried(read_metadata(file), adapters)}
    output.parent.mkdir(parents=True, exist_ok=True)
    if request.form == "diffusers":
        files.write_diffusers(output, adapters, dtype, metadata)
    else:
        files.write_lora(output, adapters, known.webui_name, dtype, metadata)
    back = lora_file.read(output, known)
    for component, layers in adapters.items():
        rounded = [_rounded(layer, dtype) for layer in layers]
        if not lora.same(back[component], rounded):
            output.unlink()
            raise WorkError(f"{output}: read back it is not what was written; it is not kept")
    count = sum(len(layers) for layers in adapters.values())
    logger.info("Written: %s, %d layers in the layout of %s", output, count, request.form)


def _layers_for(request: ConvertRequest, file: Path) -> Named:
    """What knows the names of the LoRA's layers: a family that it fits, else its base."""
    from lora_scripts.models import lora_names, skeleton
    from lora_scripts.models.header import read_header

    if request.base is None:
        header = read_header(file)
        for name in skeleton.FAMILIES:
            if lora_names.fits(header, skeleton.of(name)):
                return skeleton.of(name)
    family, _ = _load_base(request, file)
    return family


def _scaled(adapters: Layers, scale: float) -> Layers:
    """The same LoRA at a strength: the alphas times it, as PATH:SCALE does elsewhere."""
    return {
        component: [dataclasses.replace(layer, alpha=scale * layer.alpha) for layer in layers]
        for component, layers in adapters.items()
    }


def _carried(metadata: Mapping[str, str], adapters: Layers) -> dict[str, str]:
    """The header of the file that was read, its ranks as they are now."""
    from lora_scripts.models.lora_file import ADAPTER_METADATA

    kept = {k: v for k, v in metadata.items() if k not in (ADAPTER_METADATA, "format")}
    ranks = sorted({layer.rank for layers in adapters.values() for layer in layers})
    alphas = sorted({layer.alpha for layers in adapters.values() for layer in layers})
    if len(ranks) == 1 and len(alphas) == 1:
        kept |= {"ss_network_dim": str(ranks[0]), "ss_network_alpha": f"{alphas[0]:g}"}
    return kept


def _dtype_of(file: Path) -> torch.dtype:
    """The type of the file's matrices."""
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        found = {stored.get_tensor(name).dtype for name in stored.keys()  # noqa: SIM118
                 if not name.endswith(".alpha")}  # fmt: skip
    return found.pop() if len(found) == 1 else torch.float32


def _rounded(layer: AdaptedLayer, dtype: torch.dtype) -> AdaptedLayer:
    import torch

    magnitude = None if layer.magnitude is None else layer.magnitude.to(dtype).float()
    alpha = float(torch.tensor(layer.alpha))  # as float32 holds it
    return dataclasses.replace(
        layer, down=layer.down.to(dtype).float(), up=layer.up.to(dtype).float(),
        alpha=alpha, magnitude=magnitude,
    )  # fmt: skip


def resized(adapters: Layers, rank: int) -> tuple[dict[str, list[AdaptedLayer]], dict[str, float]]:
    """The nearest LoRA of a lower rank: each update's singular values beyond `rank` are dropped.

    The scale alpha / rank stays. Layers of that rank or below are left as they are.

    Returns:
        The adapters; and the relative error (Frobenius norm) of each layer's update, and of all
        together under "" .

    Raises:
        UserError: if no layer has a higher rank.
    """
    from lora_scripts.export import resize

    largest = max(layer.rank for layers in adapters.values() for layer in layers)
    if rank >= largest:
        raise user_error(f"--rank {rank}", f"must be lower than that of the file, {largest}")
    kept: dict[str, list[AdaptedLayer]] = {}
    errors: dict[str, float] = {}
    lost, whole = 0.0, 0.0
    for component, layers in adapters.items():
        for layer in layers:
            smaller, values = resize.truncated(layer, rank)
            kept.setdefault(component, []).append(smaller)
            scale = layer.alpha / layer.rank
            own = [(scale * float(value)) ** 2 for value in values]
            lost += sum(own[rank:])
            whole += sum(own)
            errors[f"{component}.{layer.path}"] = math.sqrt(sum(own[rank:]) / (sum(own) or 1.0))
    errors[""] = math.sqrt(lost / (whole or 1.0))
    return kept, errors


def _say_errors(errors: Mapping[str, float]) -> None:
    layers = {name: error for name, error in errors.items() if name}
    worst = max(layers, key=lambda name: layers[name])
    logger.info(
        "Relative error of the smaller LoRA: %.2f%% over all layers, %.2f%% in the worst (%s)",
        100 * errors[""], 100 * layers[worst], worst,
    )  # fmt: skip


# --- merged into the base -------------------------------------------------------------------------


def _merge(request: ConvertRequest, file: Path, output: Path) -> None:
    """W + scale · alpha / rank · up @ down in every adapted layer (DoRA: rows rescaled)."""
    from lora_scripts.models import lora, lora_file, original_file

    family, found = _load_base(request, file)
    lora_file.put_on(family, [(each.path, each.scale) for each in request.loras])
    expected = _probe(family)
    for module in family.adapted.values():
        lora.merge_into(module)
    _compare(_probe(family), expected, SAME, f"{output}: merged, the model differs")
    rounding = _to_stored_types(family, found)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(output) as folder:
        temporary = folder / output.name
        if request.form == "single-file":
            original_file.write_single_file(temporary, family.parts(), like=found)
        else:
            family.save(temporary)
        del family
        gc.collect()
        tolerance = max(SAME, ROUNDED * rounding)
        written = _probe(_load(str(temporary), request.device, "auto"))
        difference = _compare(written, expected, tolerance, f"{output}: read back it differs")
        if output.is_dir():
            output.rmdir()  # it is empty
        replace(temporary, output)
    logger.info(
        "Written: %s. Read back and beside base with LoRA: outputs differ by %.2g of %.2g at most",
        output, difference, expected.abs().max().item(),
    )  # fmt: skip


def _load_base(request: ConvertRequest, file: Path) -> tuple[ImageFamily, Signature]:
    from lora_scripts.models.header import read_metadata
    from lora_scripts.tasks import build

    base = request.base
    if base is None:
        metadata = read_metadata(file)
        base = next((metadata[key] for key in BASE_KEYS if metadata.get(key)), None)
    if base is None:
        raise user_error("--base-model", f"{file} does not say which base it is for; name it")
    return _load(base, request.device, request.prediction_type), build.find_base(base)


def _load(base: str, device: str, prediction_type: Any) -> ImageFamily:
    """A model in float32. What it predicts is written into a merged model's files."""
    from lora_scripts.device import choose
    from lora_scripts.models.family import Options
    from lora_scripts.tasks import build

    options = Options(prediction_type=prediction_type)
    return build.load_family(build.find_base(base), choose(device, "no"), options)


def _probe(family: ImageFamily) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return family.probe()


def _compare(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> float:
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance * expected.abs().max().item():
        raise WorkError(f"{what} from base with LoRA by {difference:.3g}")
    return difference


def _to_stored_types(family: ImageFamily, found: Signature) -> float:
    """Round each part to the type of the base's files. Returns the coarsest epsilon of these."""
    import torch

    from lora_scripts.models import original_file

    coarsest = 0.0
    for name, module in family.parts().items():
        if isinstance(module, torch.nn.Module):
            dtype = original_file.stored_dtype(found, name)
            module.to(dtype)
            coarsest = max(coarsest, torch.finfo(dtype).eps)
    return coarsest


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A folder beside `output`, gone afterwards: what is moved out of it is whole and proved."""
    folder = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
