"""Where a base model lies: a local path first, else the Hugging Face Hub or a mirror of it.

A mirror is named by the environment variable HF_ENDPOINT, an offline machine by HF_HUB_OFFLINE=1;
huggingface_hub reads both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from lora_scripts.errors import user_error

# "owner/name" as the hub allows it: no "--", no "..", neither part ends with "-" or "."
_NAME = r"[A-Za-z0-9](?:(?!--|\.\.)[\w.-]){0,94}(?<![.-])"
HUB_ID = re.compile(rf"{_NAME}/{_NAME}(?<!\.git)", re.ASCII)
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
# What an SD or SDXL pipeline needs: configs, tokenizers, .safetensors weights; no pickles, nothing
# for onnx, openvino or flax, no copies such as `vae_1_0/` or a single file beside the folders.
WANTED = (
    "model_index.json",
    *(f"{part}/*.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")),
    *(f"{part}/*.safetensors" for part in ("unet", "vae", "text_encoder", "text_encoder_2")),
    *(f"{part}/*" for part in ("tokenizer", "tokenizer_2")),
)
# Of a VAE alone, or of a pipeline whose VAE is wanted.
WANTED_OF_VAE = (
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    "model_index.json",
    "vae/*.json",
    "vae/*.safetensors",
)
UNWANTED = ("*non_ema*", "*.fp16.*", "*.bf16.*", "*flax*", "*openvino*", "*onnx*")


def local_path(base_model: str) -> Path | None:
    """The path that `base_model` names, or None if it has the form of a hub id.

    Raises:
        UserError: if it has the form of a path and nothing is there.
    """
    try:
        path = Path(base_model).expanduser()
        there = path.exists()
    except (OSError, RuntimeError) as error:  # too long, not allowed; or no such home folder
        raise user_error(base_model, f"cannot be looked at: {error}") from None
    if there:
        return path
    if HUB_ID.fullmatch(base_model) and not base_model.lower().endswith(FILE_SUFFIXES):
        return None
    raise user_error(base_model, f"no such file or folder{_nearest(path)}")


def fetch(
    hub_id: str,
    wanted: Sequence[str] = WANTED,
    unwanted: Sequence[str] = UNWANTED,
    revision: str | None = None,
) -> Path:
    """The hub's files of a model in the local cache, downloaded if need be.

    `wanted` and `unwanted` are patterns of file names; by default those of a diffusers pipeline.
    `revision`: a branch or commit; by default the main branch.

    Raises:
        UserError: if the model cannot be had: offline, unknown, or closed to this user.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
            )
        )
    except GatedRepoError:
        what = "the hub asks for your consent: accept the model's terms there, then `hf auth login`"
    except RepositoryNotFoundError:
        what = (
            "no such folder here and no such model on the hub (or it is private: `hf auth login`)"
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = (
            f"no such folder here, and the hub cannot be reached ({reason}). Offline, name a "
            "folder or file on this machine; behind a mirror, set HF_ENDPOINT to its address"
        )
    raise user_error(hub_id, what)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
