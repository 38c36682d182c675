"""Captioners of the genuine classes at toy size, saved as folders that `find` and `load` read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from transformers import (
    BartConfig,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    OPTConfig,
)

from tests.data import chat_toys

WORDS = [
    "a", "the", "of", "and", "in", "on", "red", "green", "blue", "grey", "dark", "light", "square",
    "circle", "stripe", "picture",
]  # fmt: skip
SIDE = 32  # of the pictures that the toys' vision models see


def pictures(count: int = 4, *, side: int = 48, seed: int = 0) -> list[Image.Image]:
    """RGB pictures of coarse random noise, each another."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return [
        Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST) for pixels in coarse
    ]


def toy_blip(folder: Path, *, seed: int = 2) -> Path:
    """A folder with a BLIP of random weights whose captions differ from picture to picture."""
    tokenizer = _bert_tokenizer()
    text = {
        "vocab_size": len(tokenizer) + 2,  # [DEC] and [ENC] are not in BLIP's tokenizer either
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "projection_dim": 32,
        "bos_token_id": len(tokenizer),
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        "projection_dim": 32,
    }
    torch.manual_seed(seed)
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    )
    stir(model, seed)
    return save(folder, model, BlipProcessor(_square(), tokenizer))


def _bert_tokenizer() -> Any:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"0123456789.,"]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def stir(model: Any, seed: int, spread: float = 0.4) -> None:
    """Weights large enough that what a model says depends on what it is shown."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, spread, generator=random)


def save(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def toy_blip2(folder: Path, *, seed: int = 0) -> Path:
    """A folder with a BLIP-2 on OPT of random weights."""
    tokenizer = chat_toys.byte_level(
        ["</s>", "<pad>", "<image>"], bos="</s>", eos="</s>", opening=["</s>"]
    )
    tokenizer.pad_token = "<pad>"
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = OPTConfig(
        **small,
        vocab_size=len(tokenizer),
        word_embed_proj_dim=32,
        ffn_dim=64,
        max_position_embeddings=128,
        **ends(tokenizer),
    )
    config = Blip2Config(
        vision_config={**small, "intermediate_size": 64, "image_size": SIDE, "patch_size": 8},
        qformer_config={**small, "intermediate_size": 64},
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config)
    stir(model, seed)
    return save(folder, model, Blip2Processor(_square(), tokenizer, num_query_tokens=4))


def toy_florence2(folder: Path, *, seed: int = 0) -> Path:
    """A folder with a Florence-2 of random weights, on a BART as published."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    tokenizer = chat_toys.byte_level(special, bos="<s>", eos="</s>")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "unk_token": "<unk>"})
    tokenizer.image_token = "<image>"
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.init_kwargs["model_specific_special_tokens"] = {"image_token": "<image>"}
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_bos_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        **ends(tokenizer),
    )
    vision = Florence2VisionConfig(
        depths=(1, 1),
        patch_size=(7, 3),
        patch_stride=(4, 2),
        patch_padding=(3, 1),
        patch_prenorm=(False, True),
        embed_dim=(16, 32),
        num_heads=(2, 4),
        num_groups=(2, 4),
        window_size=2,
        projection_dim=32,
        max_position_embeddings=8,
    )
    config = Florence2Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=tokenizer.image_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        **ends(tokenizer),
    )
    torch.manual_seed(seed)
    model = Florence2ForConditionalGeneration(config)
    stir(model, seed)
    model.generation_config.update(
        num_beams=3, no_repeat_ngram_size=3, decoder_start_token_id=tokenizer.eos_token_id
    )
    sees = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_seq_length=17
    )
    answers = {kind: {} for kind in ("pure_text", "description_with_bboxes")}
    processor = Florence2Processor(sees, tokenizer, post_processor_config=answers)
    return save(folder, model, processor)


def _square() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def ends(tokenizer: Any) -> dict[str, int]:
    names = ("bos", "eos", "pad")
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}


def toy_tagger(
    folder: Path,
    tags: Sequence[tuple[str, int]],
    looks_at: Sequence[tuple[int, int, int]],
    *,
    side: int = 8,
    batch: int | str = "batch",
    channels_first: bool = False,
) -> Path:
    """A folder with a tagger whose score of a tag is one number of its input, divided by 255.

    Args:
        tags: Names and categories.
        looks_at: For each tag the row, column and channel of that number.
    """
    folder.mkdir(parents=True)
    weight = np.zeros((side * side * 3, len(tags)), np.float32)
    for number, (row, column, channel) in enumerate(looks_at):
        weight[(row * side + column) * 3 + channel, number] = 1 / 255
    shape = np.array([-1, side * side * 3], np.int64)
    picture = [3, side, side] if channels_first else [side, side, 3]
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["pixels", "shape"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, *picture])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, len(tags)])],
        [numpy_helper.from_array(shape, "shape"), numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    rows = [f"{number},{name},{category},1" for number, (name, category) in enumerate(tags)]
    table = "\n".join(["tag_id,name,category,count", *rows]) + "\n"
    (folder / "selected_tags.csv").write_text(table, encoding="utf-8")
    return folder
