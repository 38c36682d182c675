"""Text generation: the next-token loss on the tokens that are to be learned.

Tensor suffixes: B batch, T tokens of a row (packed: of all rows), N tokens to learn, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

from lora_scripts.data import cache, samples, text
from lora_scripts.data.chat import ChatFormat
from lora_scripts.device import Compute
from lora_scripts.models import causal_lm, head, lora, packing
from lora_scripts.models.causal_lm import CausalLM
from lora_scripts.models.head import Learned
from lora_scripts.randomness import seed_of
from lora_scripts.run_files import ADAPTER_NAME, SYSTEM_PROMPT
from lora_scripts.schema import TextConfig, TextPrompt
from lora_scripts.tasks.going_on import noted, start_from
from lora_scripts.tasks.task import Batch, Indices, Key, Loss

logger = logging.getLogger(__name__)

FEW_STEPS = 30

Progress = Callable[[str, int, int], None]


class LanguageTask:
    """Learns conversations or texts as a LoRA on a language model."""

    def __init__(self, config: TextConfig, base: CausalLM, rows: text.TextRows) -> None:
        self.config = config
        self.batch = config.micro_batch
        self.base = base
        self.rows = rows
        self.format = ChatFormat(base.tokenizer, config.chat_template, config.system_prompt)
        self.targets = causal_lm.targets(base.model, config.lora_targets)
        contents = (
            (content, data.weight, data.role)
            for records, data in rows.parts
            for content in records.contents()
        )
        self.fingerprint: Mapping[str, str] = {
            "data": cache.key_of(contents, self.format.tokenizer_id, self.format.template),
            "base_model": base.weights_id,
            **noted(config.init_lora / ADAPTER_NAME if config.init_lora else None),
        }
        self.own_attention: str = base.model.config._attn_implementation
        self.in_parts = head.may_come_in_parts(base.model)  # the logits
        self.packed = config.packing and self._may_pack()
        self._dealt: text.Dealt | None = None

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        return {"model": self.base.model}

    @property
    def learning_rates(self) -> Mapping[str, float]:
        return {"model": self.config.learning_rate}

    @property
    def data(self) -> text.Dealt:
        """The samples, once `encode` has made them."""
        assert self._dealt is not None, "encode() comes first"
        return self._dealt

    @property
    def items(self) -> int:
        """How many different samples are learned from."""
        return len(self.data.train.samples)

    @property
    def held_out(self) -> bool:
        return self.data.held_out

    def encode(self, progress: Progress) -> None:
        """Tokenise the rows that are not in the cache yet, and split them."""
        self._dealt = text.deal(
            self.rows,
            self.format,
            self.config,
            lambda done, total: progress("rows", done, total),
        )
        logger.info("Chat template: %s", self.format.name)
        for remark in text.remarks(self.format, self.data.encoding, self.rows, self.config):
            logger.warning("%s", remark)
        if self.targets.skipped:
            logger.warning("No adapter on: %s", "; ".join(self.targets.skipped))

    def attach(self) -> None:
        """Freeze the model and put the LoRA on it."""
        lora.attach(
            self.base.model,
            self.targets.adapted,
            rank=self.config.lora_rank,
            alpha=self.config.lora_alpha,
            dropout=self.config.lora_dropout,
            seed=seed_of(self.config.seed, "lora", "model"),
            kind=self.config.lora_type,
        )
        if self.config.init_lora is not None:
            finished = lora.read_peft(self.config.init_lora)
            start_from(self.config.init_lora, self.adapted, {"model": finished})
        if self.config.gradient_checkpointing:
            causal_lm.checkpoint_gradients(self.base.model)

    def shard(self, compute: Compute) -> None:
        causal_lm.shard(self.base.model, compute)

    def plan(self, key: Key) -> Sequence[Indices]:
        if key.split == "validation":
            views = self.data.validation.samples
        else:
            views = self.data.train.views(key.seed, key.split, "order", epoch=key.epoch)
        lengths = None if self.packed else self.data.encoding.lengths()
        parts = (key.seed, key.split, "batches", key.epoch)
        return samples.batches(views, self.batch, lengths, *parts)

    def load(self, indices: Indices, key: Key) -> Batch:
        rows = [self.data.encoding.read(index) for index in indices]
        return _packed(rows) if self.packed else _padded(rows)

    def place(self, index: int, key: Key) -> str:
        record, _ = self.rows[int(self.data.encoding.rows[index])]
        return str(record.where)

    def loss(self, batch: Batch, key: Key) -> Loss:
        """Cross entropy of the learned tokens, summed; logits only where there is one."""
        learned = Learned(batch["columns"], batch["row"], batch["column"], batch["targets"])
        inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        total = head.loss(self.base.model, inputs, learned, in_parts=self.in_parts)
        return Loss(total, count=len(learned.targets_N), tallies={"tokens": batch["tokens"]})

    def sample(self, key: Key) -> Mapping[str, Image | str]:
        with packing.attention(self.base.model, self.own_attention):
            return {
                f"{number:02d}": f"{prompt.prompt}\n\n---\n\n{self._answer(prompt, key)}\n"
                for number, prompt in enumerate(self.config.sample_prompts)
            }

    def metadata(self) -> dict[str, str]:
        return {
            "lora_scripts.base_model": self.config.base_model,
            "lora_scripts.base_model_hash": self.base.weights_id,
            **{f"lora_scripts.{name}": value for name, value in self.base.facts.items()},
            "lora_scripts.chat_template": self.format.name,
            SYSTEM_PROMPT: self.config.system_prompt or "",
            "lora_scripts.train_on": self.config.train_on,
        }

    def describe(self) -> str:
        """The data in a few words."""
        held_out = f"{len(self.data.validation.samples):,}" if self.held_out else "none"
        lengths = self.data.encoding.lengths()[self.data.train.samples]
        learned = self.data.encoding.learned_of(self.data.train.samples)
        return (
            f"{len(self.rows):,} rows: {self.items:,} samples to learn from with "
            f"{int(lengths.sum()):,} tokens ({learned:,} learned; the longest sample has "
            f"{lengths.max():,}), {held_out} held out"
        )

    def inventory(self) -> Iterator[tuple[str, str]]:
        """Where each row stands, and a hash of what it says and how often it is learned."""
        return (
            (record.where, cache.key_of(content, data.weight, data.role))
            for records, data in self.rows.parts
            for record, content in zip(records, records.contents(), strict=True)
        )

    def advice(self, steps: int, views: float) -> str | None:
        """What a person with so few steps should know."""
        if steps >= FEW_STEPS:
            return None
        return (
            f"That is little: a LoRA seldom learns much in fewer than {FEW_STEPS} steps. Raise "
            "epochs, or lower batch_size or gradient_accumulation_steps."
        )

    def release(self) -> None:
        """Let go of the model, so that another fits into memory."""
        del self.base

    # --- private ----------------------------------------------------------------------------------

    def _may_pack(self) -> bool:
        reason = packing.why_not(self.base.model)
        if reason is None:
            packing.register()
            self.base.model.set_attn_implementation(packing.NAME)
            return True
        logger.warning("packing is off: %s. Rows of like length are padded instead.", reason)
        return False

    def _answer(self, prompt: TextPrompt, key: Key) -> str:
        system = prompt.system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt.prompt})
        return causal_lm.generate(
            self.base.model,
            self.base.tokenizer,
            self.format.prompt_ids(messages),
            stop_ids=self.format.stop_ids,
            max_new_tokens=prompt.max_new_tokens,
            temperature=prompt.temperature,
            seed=key.seed if prompt.seed is None else prompt.seed,
        )


_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q")
_Row = tuple[torch.Tensor, torch.Tensor]


def _packed(rows: Sequence[_Row]) -> Batch:
    """Rows end to end. Every token but a row's first is predicted from the one before it."""
    starts = np.cumsum([0, *(len(ids) for ids, _ in rows)])[:-1]
    learned = zip(rows, starts, strict=True)
    columns = torch.cat([mask[1:].nonzero()[:, 0] + start for (_, mask), start in learned])
    ids_T = torch.cat([ids for ids, _ in rows])
    return {
        "input_ids": ids_T[None],
        **packing.layout([len(ids) for ids, _ in rows]),
        "columns": columns,
        "row": torch.zeros_like(columns),
        "column": torch.arange(len(columns)),
        "targets": ids_T[columns + 1],
        "tokens": len(ids_T),
    }


def _padded(rows: Sequence[_Row]) -> Batch:
    """Rows side by side, filled up behind their ends with a token that nothing looks at."""
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    learned_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, (ids, learned) in enumerate(rows):
        ids_BT[number, : len(ids)] = ids
        mask_BT[number, : len(ids)] = 1
        learned_BT[number, : len(ids)] = learned
    row, column = learned_BT[:, 1:].nonzero(as_tuple=True)
    columns, where = torch.unique(column, return_inverse=True)
    return {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "columns": columns,
        "row": row,
        "column": where,
        "targets": ids_BT[row, column + 1],
        "tokens": int(mask_BT.sum()),
    }
