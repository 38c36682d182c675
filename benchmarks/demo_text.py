"""Does the text demo's LoRA bring the shop's manner, and is nothing forgotten?

    make demo-text
    python benchmarks/demo_text.py [--lora output/demo_text]

Prints, for the base and for the base with the LoRA,

* the loss on the 40 held-out letters, whose matters and wordings are not in the training data, with
  the system prompt of the config, for the base too;
* the loss on 50 general questions with their answers, which have nothing to do with the shop, asked
  without that system prompt;
* of the answers to the 40 held-out letters (the likeliest token each time, at most 200): how many
  end by themselves, how many open and close in the shop's manner, and how long they are;
* near-duplicates between the training and the held-out letters, which there should be none of;
* all answers, with --answers FILE.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lora_scripts.config import load
from lora_scripts.data.chat import ChatFormat
from lora_scripts.data.conversations import TextRecord, read_texts
from lora_scripts.data.duplicates import near_duplicates
from lora_scripts.device import Compute, choose
from lora_scripts.logs import quiet_libraries
from lora_scripts.models import causal_lm, lora
from lora_scripts.schema import TextConfig
from lora_scripts.tasks import build

DATA = Path("assets/demo")
TRAINING, HELD_OUT = DATA / "support_dialogues.jsonl", DATA / "support_heldout.jsonl"
GENERAL = DATA / "general_prompts.jsonl"
CONFIG = Path("configs/demo_text.yaml")
BASE = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
LIMIT = 200
OPENING = "Thank you for writing to Tollenby Lanterns."
CLOSING = "Keep the light on, your Tollenby team."


@dataclass(frozen=True)
class Answer:
    """What the model wrote to a question, and whether it ended by itself before the limit."""

    question: str
    text: str
    ended: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--lora", type=Path, default=Path("output/demo_text"))
    parser.add_argument("--answers", type=Path, help="write all answers here")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    quiet_libraries()
    started = time.time()
    compute = choose("auto", "auto")
    base = causal_lm.load(build.find_text_base(arguments.base), compute)
    tokenizer = causal_lm.read_tokenizer(arguments.lora)
    config = load(CONFIG)
    assert isinstance(config, TextConfig)
    shop, plain = ChatFormat(tokenizer, None, config.system_prompt), ChatFormat(tokenizer)
    rows, written = {}, {}
    rows["base"], written["base"] = measure(base.model, tokenizer, shop, plain, compute)
    adapted = lora.with_adapters(base.model, [(arguments.lora, 1.0)])
    rows["base + LoRA"], written["base + LoRA"] = measure(adapted, tokenizer, shop, plain, compute)
    report(rows, time.time() - started)
    if arguments.answers:
        arguments.answers.write_text(side_by_side(written), encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def measure(
    model: Any, tokenizer: Any, shop: ChatFormat, plain: ChatFormat, compute: Compute
) -> tuple[dict[str, float], list[Answer]]:
    """All figures of one model, and its answers to the held-out letters."""
    answers = [answer(model, tokenizer, shop, record, compute) for record in records(HELD_OUT)]
    texts = [one.text.strip() for one in answers]
    return {
        "held-out loss": mean_loss(model, shop, records(HELD_OUT), compute),
        "general loss": mean_loss(model, plain, records(GENERAL), compute),
        "ended": sum(one.ended for one in answers) / len(answers),
        "opened": sum(text.startswith(OPENING) for text in texts) / len(texts),
        "closed": sum(text.endswith(CLOSING) for text in texts) / len(texts),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }, answers


def records(path: Path) -> list[TextRecord]:
    """The conversations of a file."""
    found = read_texts(path, None)
    assert not found.problems, found.problems
    return list(found.records)


@torch.no_grad()
def mean_loss(model: Any, chat: ChatFormat, rows: Sequence[TextRecord], compute: Compute) -> float:
    """Mean cross entropy over the tokens of the answers, all rows together."""
    total, count = 0.0, 0
    for record in rows:
        for rendered in chat.render(record.messages):
            encoded = chat.encode(rendered)
            ids = torch.from_numpy(encoded.ids).long().to(model.device)
            learned = torch.from_numpy(encoded.supervised)[1:].to(model.device)
            with compute.autocast():
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            losses = functional.cross_entropy(logits, ids[1:], reduction="none")
            total += losses[learned].sum().item()
            count += int(learned.sum())
    return total / count


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, chat: ChatFormat, record: TextRecord, compute: Compute
) -> Answer:
    """The likeliest answer to the first turn of a record."""
    question = str(record.messages[0]["content"])
    prompt_BT = torch.tensor([chat.prompt_ids([{"role": "user", "content": question}])])
    with compute.autocast():
        output_BT = model.generate(
            input_ids=prompt_BT.to(model.device),
            attention_mask=torch.ones_like(prompt_BT).to(model.device),
            max_new_tokens=LIMIT,
            do_sample=False,
            eos_token_id=list(chat.stop_ids),
            pad_token_id=chat.stop_ids[0],
        )
    ids = output_BT[0, prompt_BT.shape[1] :].tolist()
    ended = bool(ids) and ids[-1] in chat.stop_ids
    return Answer(question, tokenizer.decode(ids, skip_special_tokens=True), ended)


def report(rows: Mapping[str, Mapping[str, float]], seconds: float) -> None:
    """The figures as the table of docs/benchmarks.md."""
    base, adapted = rows["base"], rows["base + LoRA"]
    print("| answers of | held-out loss | general loss | ended | opened | closed | words |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['held-out loss']:.3f} | {row['general loss']:.3f} | "
            f"{row['ended']:.0%} | {row['opened']:.0%} | {row['closed']:.0%} | {row['words']:.0f} |"
        )
    fallen = 1 - adapted["held-out loss"] / base["held-out loss"]
    risen = adapted["general loss"] / base["general loss"] - 1
    pairs = near_duplicates(questions_and_middles(TRAINING), questions_and_middles(HELD_OUT))
    print("\n| | reached | asked for |\n|---|---|---|")
    print(f"| held-out loss fallen by | {fallen:.0%} | at least 33% |")
    print(f"| answers that end by themselves | {adapted['ended']:.0%} | at least 95% |")
    print(f"| general loss risen by | {risen:.1%} | less than 5% |")
    print(f"| near-duplicates between training and held-out | {len(pairs)} | 0 |")
    print(f"\n{seconds:.0f} s")


def questions_and_middles(path: Path) -> list[str]:
    """Each exchange without the opening and the closing that all answers share."""
    texts = []
    for record in records(path):
        for question, reply in zip(record.messages[::2], record.messages[1::2], strict=True):
            middle = str(reply["content"]).removeprefix(OPENING).removesuffix(CLOSING)
            texts.append(f"{question['content']}\n{middle.strip()}")
    return texts


def side_by_side(written: Mapping[str, Sequence[Answer]]) -> str:
    """Every question with the answers of all models below it."""
    parts = []
    for number, first in enumerate(next(iter(written.values()))):
        parts.append(f"## {first.question}\n")
        parts += [f"**{name}**: {answers[number].text}\n" for name, answers in written.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
