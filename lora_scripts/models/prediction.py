"""What a denoiser predicts, noise (ε) or velocity (v), and whether its schedule ends in pure noise.

Both kinds have the same tensors. What the config, the file or the user says is taken; where nothing
is said, the model is tried on pure noise at the last timestep: an ε-model answers with that noise,
a v-model with the negative of a picture, √ᾱ ε − √(1−ᾱ) x₀ ≈ −x₀ (Salimans & Ho 2022, arXiv
2202.00512, appendix D), which is smooth and hardly depends on the noise.
Tensor suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

from lora_scripts.errors import user_error
from lora_scripts.models import schedule
from lora_scripts.models.family import Options, Prediction
from lora_scripts.models.signature import Signature

logger = logging.getLogger(__name__)

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
TRIAL_SIDE = 64  # of the noise, at most, in latent pixels
NOISE_LEFT = 0.35  # of an ε-model's answer, root mean square, once the noise is taken off
LIKENESS = 0.3  # correlation of a v-model's answer with the noise, at most
ROUGHNESS = 0.4  # of a v-model's answer, at most: a picture is below, white noise is 1
PICTURE_STRENGTH = (0.03, 4.0)  # root mean square of a picture's latent


@dataclass(frozen=True)
class Said:
    """What a model's files say of it, each with the place that says it; None: nothing is said."""

    prediction: Prediction | None = None
    source: str = ""
    zero_snr: bool | None = None
    zero_snr_source: str = ""


@dataclass(frozen=True)
class Settled:
    """What is trained and drawn with."""

    prediction: Prediction
    zero_snr: bool


def said_by(found: Signature, scheduler: SchedulerMixin) -> Said:
    """What a base model's files say: a folder's scheduler config, a single file's marks.

    Raises:
        UserError: if the config names a kind of prediction that is not trained here.
    """
    if found.layout == "diffusers":
        zero_snr = True if schedule.ends_in_noise(scheduler) else None
        told = _known(scheduler.config.prediction_type)
        return Said(told, SCHEDULER_CONFIG, zero_snr, SCHEDULER_CONFIG)
    marks = found.marks
    return Said(marks.prediction, marks.source, marks.zero_snr, "the file's tensor ztsnr")


def _known(prediction_type: str) -> Prediction:
    match prediction_type:
        case "epsilon":
            return "epsilon"
        case "v_prediction":
            return "v_prediction"
        case other:
            what = f"prediction_type is {other}; this version trains epsilon and v_prediction"
            raise user_error(f"base_model: {SCHEDULER_CONFIG}", what)


def settle(options: Options, said: Said, answer: Callable[[], Prediction | None]) -> Settled:
    """Decide by the config's keys, else by what the files say, else by a trial (`answer`).

    The log tells what was decided and from what.

    Raises:
        UserError: if nothing tells, or for ε with zero terminal SNR, naming what to write.
    """
    prediction = _prediction(options, said, answer)
    zero_snr = _zero_snr(options, said)
    if prediction == "epsilon" and zero_snr:
        what = (
            "found true with prediction_type epsilon: pure noise has no picture in it that "
            "predicting the noise could find. Set zero_terminal_snr: false, or prediction_type: "
            "v_prediction if the model predicts that"
        )
        raise user_error("zero_terminal_snr", what)
    return Settled(prediction, zero_snr)


def _prediction(
    options: Options, said: Said, answer: Callable[[], Prediction | None]
) -> Prediction:
    chosen = options.prediction_type
    if chosen != "auto":
        if said.prediction not in (None, chosen):
            _warn_contradiction("prediction_type", chosen, said.prediction, said.source)
        return chosen
    if said.prediction is not None:
        logger.info("prediction_type: %s, by %s", said.prediction, said.source)
        return said.prediction
    tried = answer()
    if tried is None:
        what = (
            "found auto, but neither the base model's files nor a trial on pure noise tell what "
            "it predicts; write prediction_type: epsilon (most models) or v_prediction"
        )
        raise user_error("prediction_type", what)
    logger.info("prediction_type: %s, by a trial on pure noise (no file says it)", tried)
    return tried


def _zero_snr(options: Options, said: Said) -> bool:
    chosen = options.zero_terminal_snr
    if chosen == "auto":
        if said.zero_snr:
            logger.info("zero_terminal_snr: true, by %s", said.zero_snr_source)
        return bool(said.zero_snr)
    if said.zero_snr not in (None, chosen):
        _warn_contradiction("zero_terminal_snr", chosen, said.zero_snr, said.zero_snr_source)
    return chosen


def _warn_contradiction(key: str, chosen: object, found: object, source: str) -> None:
    words = [str(value).lower() for value in (chosen, found)]
    logger.warning("%s: %s is taken, as told; but %s says %s", key, words[0], source, words[1])


@torch.no_grad()
def try_out(
    denoise: Callable[[torch.Tensor], torch.Tensor], channels: int, side: int
) -> Prediction | None:
    """What a denoiser predicts, by its answers to pure noise at the last timestep; None: neither.

    `denoise` takes two latents (2, C, H, W) in float32 and gives the denoiser's output for an empty
    prompt. `side`: of the latents that the model was made for.
    """
    side = min(side, TRIAL_SIDE)
    noise_BCHW = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    output_BCHW = denoise(noise_BCHW).float().cpu()
    return judge(noise_BCHW, output_BCHW)


def judge(noise_BCHW: torch.Tensor, output_BCHW: torch.Tensor) -> Prediction | None:
    """Which reading of an answer to pure noise makes sense: the noise itself, or −1 × a picture."""
    if _rms(output_BCHW - noise_BCHW) < NOISE_LEFT:
        return "epsilon"
    low, high = PICTURE_STRENGTH
    strength = _rms(output_BCHW)
    if not low < strength < high:  # also of what is not a number
        return None
    likeness = (output_BCHW * noise_BCHW).mean().item() / (strength * _rms(noise_BCHW))
    step_BCHW = output_BCHW.diff(dim=-1)  # of white noise √2 times as strong as the noise
    roughness = (_rms(step_BCHW) / strength) ** 2 / 2
    smooth = abs(likeness) < LIKENESS and roughness < ROUGHNESS
    return "v_prediction" if smooth else None


def metadata(prediction: Prediction, scheduler: SchedulerMixin) -> dict[str, str]:
    """The header fields of a LoRA file that tell what its base predicts."""
    return {
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[prediction],
        "ss_zero_terminal_snr": str(schedule.ends_in_noise(scheduler)),
    }


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()
