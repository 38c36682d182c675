"""Keys that are right each alone and wrong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def misfits_of(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that are right each alone and wrong together; keys not in `values` are not judged."""
    if {"train_data_dir", "datasets"} <= values.keys():
        folder, datasets = values["train_data_dir"], values["datasets"]
        roles = {data.get("role", "train") for data in datasets}
        if folder is None and not datasets:
            is_text = values.get("task_type") == "text-generation"
            what = "file or folder of your data" if is_text else "folder of your pictures"
            yield "train_data_dir", f"missing; name the {what}"
        if folder is not None and datasets:
            yield "datasets", "stands beside train_data_dir; give one of the two"
        if datasets and values.get("metadata_path") is not None:
            yield "metadata_path", "belongs to train_data_dir; name it in the datasets"
        for key, unset in (("repeats", 1), ("caption_keys", None), ("mask_dir", None)):
            if datasets and values.get(key, unset) != unset:
                yield key, "belongs to train_data_dir; name it in the datasets"
        if datasets and "train" not in roles:
            yield "datasets", "none of them has the role train"
        if values.get("validation_split") and "validation" in roles:
            yield "validation_split", "a dataset has the role validation already"
        measured = values.get("validation_split") or "validation" in roles
        if values.get("early_stopping_patience") and not measured:
            yield "early_stopping_patience", "needs held-out data: set validation_split"
    if {"resolution", "bucket_step"} <= values.keys():
        resolution, step = values["resolution"], values["bucket_step"]
        if resolution % step:
            yield "resolution", f"found {resolution}, must be a multiple of bucket_step ({step})"
    if {"stride", "max_seq_length"} <= values.keys():
        stride, length = values["stride"], values["max_seq_length"]
        if stride >= length:
            yield "stride", f"found {stride}, must be less than max_seq_length ({length})"
    base_model = values.get("base_model")
    gguf = isinstance(base_model, str) and base_model.lower().endswith(".gguf")
    if gguf and values.get("quantization"):
        yield "quantization", "not on a .gguf file, which is dequantised; name the original model"
    if values.get("quantization") and values.get("distributed") == "fsdp":
        yield "distributed", "fsdp cannot spread weights of 4 or 8 bits: leave out quantization"
    if values.get("offload") and values.get("quantization"):
        yield "offload", "weights of 4 or 8 bits stay on the card: leave out one of the two"
    if values.get("offload") and values.get("device") == "cpu":
        yield "offload", "found true beside device: cpu; there is no card to spare"
    yield from _of_pictures(values)
    yield from _of_training(values)


def _of_pictures(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("cache_latents") is True and values.get("random_crop"):
        yield "cache_latents", "found true beside random_crop: what is cut anew cannot be cached"
    if values.get("mask_dir") is not None and not values.get("masked_loss"):
        yield "mask_dir", "does nothing without masked_loss: true"
    if not values.get("masked_loss") and any(d.get("mask_dir") for d in values.get("datasets", ())):
        yield "datasets", "a mask_dir does nothing without masked_loss: true"
    shuffled = values.get("shuffle_tags") or values.get("tag_dropout")
    if values.get("keep_tokens") and not shuffled:
        yield "keep_tokens", "does nothing without shuffle_tags or tag_dropout"
    if values.get("zero_terminal_snr") is True and values.get("prediction_type") == "epsilon":
        yield "zero_terminal_snr", "needs v_prediction: from pure noise no noise can be told"
    roles = {data.get("role", "train") for data in values.get("datasets", ())}
    if values.get("prior_loss_weight", 1.0) != 1.0 and "regularisation" not in roles:
        yield "prior_loss_weight", "does nothing without a dataset of the role regularisation"


def _of_training(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("batch_size") == "auto" and values.get("gradient_accumulation_steps") == 1:
        what = "found auto; write in gradient_accumulation_steps how many samples make a step: 8"
        yield "batch_size", what
    if values.get("lr_num_cycles", 3) != 3 and values.get("lr_scheduler") != "cosine_with_restarts":
        yield "lr_num_cycles", "does nothing without lr_scheduler: cosine_with_restarts"
    rate, text_rate = values.get("learning_rate"), values.get("text_encoder_learning_rate")
    if rate is None or text_rate is None:
        return
    share = 1.0 if values.get("optimizer") == "prodigy" else 0.5
    if not values.get("train_text_encoder") and text_rate != share * rate:
        yield "text_encoder_learning_rate", "does nothing without train_text_encoder: true"
    elif values.get("optimizer") == "prodigy" and text_rate != rate:
        yield "text_encoder_learning_rate", "prodigy takes one rate for all; leave this key out"
