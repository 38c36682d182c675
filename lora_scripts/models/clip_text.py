"""Prompts for CLIP text encoders: token ids in parts, hidden states, batches of unequal length.

A CLIP encoder reads 77 tokens: a start mark, 75 of the prompt, an end mark. Longer prompts are read
in parts of 75, each with its own marks, and the parts' states are laid end to end, as AUTOMATIC1111
and ComfyUI do. Tensor suffixes: B batch, P parts, S tokens, D width of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_scripts.errors import user_error
from lora_scripts.models.caption_parts import TOKENS_A_PART, split
from lora_scripts.models.family import DrawRequest, Options

MASK = "embedding_mask"  # (B, S): 1 where a state belongs to the prompt, 0 where it fills up


def tokenize(tokenizer: CLIPTokenizer, prompt: str, max_tokens: int) -> torch.Tensor:
    """The prompt's ids, int64 (P, S), each part as the tokenizer itself marks and pads it."""
    parts, _ = split(tokenizer, prompt, max_tokens)
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    room = tokenizer.model_max_length
    rows = [[start, *part, end] for part in parts]
    return torch.tensor([row + [pad] * (room - len(row)) for row in rows])


def check_skip(encoders: Mapping[str, Any], clip_skip: int | None) -> None:
    """Refuse a `clip_skip` past the first layer.

    Raises:
        UserError: naming the number of layers that there are.
    """
    depth = min(encoder.config.num_hidden_layers for encoder in encoders.values())
    if clip_skip is not None and clip_skip > depth:
        what = f"found {clip_skip}, but this model's text encoder has {depth} layers"
        raise user_error("clip_skip", f"{what}; write a number from 1 to {depth}, or null")


def reading_of(tokenizers: Sequence[CLIPTokenizer], options: Options) -> list[str]:
    """What prompts' states depend on beside the encoders' weights, as texts to hash.

    What is as in most models is left out, so that their hashes stay what they always were.
    """
    vocabulary = [str(sorted(tokenizer.get_vocab().items())) for tokenizer in tokenizers]
    pads = [t.pad_token_id for t in tokenizers if t.pad_token_id != t.eos_token_id]
    unusual = {"padding": pads, "clip_skip": options.clip_skip}
    if options.max_caption_tokens != TOKENS_A_PART:
        unusual["max_caption_tokens"] = options.max_caption_tokens
    return vocabulary + [f"{name} {value}" for name, value in unusual.items() if value]


def last_states(encoder: CLIPTextModel, ids_PS: torch.Tensor, skip: int) -> torch.Tensor:
    """States (P, S, D) after the `skip`-th layer from the end and the final norm; 1 is the last."""
    if skip == 1:
        last_PSD: torch.Tensor = encoder(ids_PS).last_hidden_state
        return last_PSD
    states = encoder(ids_PS, output_hidden_states=True).hidden_states
    normed_PSD: torch.Tensor = encoder.final_layer_norm(states[-skip])
    return normed_PSD


def raw_states(
    encoder: CLIPTextModel | CLIPTextModelWithProjection, ids_PS: torch.Tensor, skip: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (P, S, D) after the `skip`-th layer from the end, not normed; and the first output.

    That is the projected state of the end mark (P, D) for an encoder with a projection.
    """
    output = encoder(ids_PS, output_hidden_states=True)
    return output.hidden_states[-skip], output[0]


def laid_out(states_PSD: torch.Tensor, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The states of all prompts' parts as one (tokens, D) a prompt. `prompts`: ids (P, S) each."""
    counts = [len(ids_PS) for ids_PS in prompts]
    return [parts_PSD.flatten(0, 1) for parts_PSD in torch.split(states_PSD, counts)]


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows with an `embedding` (S, D) each as one batch; the other tensors are stacked.

    Where the lengths differ the short ones are filled up with zeros and a mask tells the denoiser
    to look past them, so that each prompt acts as it does alone. Without need there is no mask.
    """
    batch = {
        name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "embedding"
    }
    embeddings = [row["embedding"] for row in rows]
    batch["embedding"] = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
    lengths = [len(embedding_SD) for embedding_SD in embeddings]
    if min(lengths) < max(lengths):
        positions_S = torch.arange(max(lengths))
        mask_BS = positions_S < torch.tensor(lengths)[:, None]
        batch[MASK] = mask_BS.to(embeddings[0])
    return batch


def told(
    request: DrawRequest,
    tokenize: Callable[[str], dict[str, torch.Tensor]],
    encode: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    """What the denoiser is told of a prompt and of its negative prompt, as `encode` gives it."""
    wanted = [tokenize(text) for text in (request.prompt, request.negative_prompt)]
    return [encode(tokens) for tokens in balanced(wanted, tokenize(""))]


def balanced(
    prompts: Sequence[Mapping[str, torch.Tensor]], empty: Mapping[str, torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """Tokenized prompts with one number of parts: short ones go on with empty parts, as in WebUI.

    Ids by encoder, each (P, S); `empty` is the empty prompt, one part.
    """
    length = max(len(ids_PS) for prompt in prompts for ids_PS in prompt.values())
    return [
        {
            name: torch.cat([ids_PS, *[empty[name]] * (length - len(ids_PS))])
            for name, ids_PS in prompt.items()
        }
        for prompt in prompts
    ]
