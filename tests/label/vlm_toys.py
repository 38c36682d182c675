"""Chat models that see, of the genuine classes at toy size, as folders of the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from tests.data import chat_toys
from tests.label import toys

# What a picture and a question look like in the published templates, cut to what is used here.
_QWEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}{{ '\\n' }}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
_PLAIN = (
    "{% for message in messages %}User: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def toy_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """A folder with a Qwen2-VL of random weights; 28 pixels of a picture are one token."""
    tokenizer, numbers = _qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**_DECODER, **toys.ends(tokenizer), "rope_parameters": rope,
                     "vocab_size": len(tokenizer)},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        **numbers,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    toys.stir(model, seed)
    _save_template(folder, _QWEN)
    return toys.save(folder, model, tokenizer, Qwen2VLImageProcessorPil())


def toy_qwen3_vl(folder: Path, *, seed: int = 0) -> Path:
    """A folder with a Qwen3-VL of random weights; 32 pixels of a picture are one token."""
    tokenizer, numbers = _qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = Qwen3VLConfig(
        text_config={**_DECODER, **toys.ends(tokenizer), "rope_parameters": rope,
                     "head_dim": 8, "vocab_size": len(tokenizer)},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **numbers,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    toys.stir(model, seed)
    _save_template(folder, _QWEN)
    # as published: Qwen2-VL's way with pictures, with other numbers
    sees = Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 256 * 256}
    )
    return toys.save(folder, model, tokenizer, sees)


def _qwen_tokenizer() -> tuple[Any, dict[str, int]]:
    """The tokenizer, and the numbers of its tokens for pictures as a config calls them."""
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *ids.values()]
    tokenizer = chat_toys.byte_level(special, eos="<|im_end|>")
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer, {key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()}


def _save_template(folder: Path, template: str) -> None:
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def toy_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """A folder with a SmolVLM of random weights; each tile of a picture is 4 tokens."""
    special = ["<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>"]
    special += ["<end_of_utterance>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = chat_toys.byte_level(special, bos="<s>", eos="</s>")
    tokenizer.pad_token = "<pad>"
    text = LlamaConfig(**_DECODER, **toys.ends(tokenizer), vocab_size=len(tokenizer))
    config = SmolVLMConfig(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": toys.SIDE,
            "patch_size": 8,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        **toys.ends(tokenizer),
    )
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(config)
    toys.stir(model, seed)
    _save_template(folder, _PLAIN)
    settings = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    sees = SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * toys.SIDE}, max_image_size={"longest_edge": toys.SIDE}
    )
    return toys.save(folder, model, tokenizer, sees)


def toy_llava(folder: Path, *, seed: int = 0) -> Path:
    """A folder with a LLaVA of random weights; every picture is 16 tokens."""
    tokenizer = chat_toys.byte_level(["<s>", "</s>", "<pad>", "<image>"], bos="<s>", eos="</s>")
    tokenizer.pad_token = "<pad>"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**small, num_hidden_layers=3, image_size=toys.SIDE, patch_size=8)
    text = LlamaConfig(**_DECODER, **toys.ends(tokenizer), vocab_size=len(tokenizer))
    config = LlavaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        **toys.ends(tokenizer),
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    toys.stir(model, seed)
    sees = CLIPImageProcessorPil(
        size={"shortest_edge": toys.SIDE}, crop_size={"height": toys.SIDE, "width": toys.SIDE}
    )
    processor = LlavaProcessor(
        sees,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_PLAIN,
    )
    return toys.save(folder, model, processor)
