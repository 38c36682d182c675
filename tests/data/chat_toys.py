"""Small tokenizers of the real kinds, and six published chat formats in our own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

Prepend = Literal["always", "first", "never"]

_SENTENCES = (
    "What is the weather in Paris today? It is sunny, and the wind is weak.",
    "system user assistant model tool name arguments parameters description",
    "Hello there! Hi. How are you? I am fine, thank you. Yes, no, and so on.",
    "User: Assistant: Question: Answer: You are a helpful assistant. Answer with a short text.",
    "天气怎么样？今天是晴天。你好，世界！",
    '{"name": "weather", "arguments": {"city": "Paris"}}\n\n\nthink\n\n',
)

# Llama-3's and Qwen's way of cutting a text before the merges: newlines go with what is before.
_WORDS = Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")


def byte_level(
    special: Sequence[str],
    *,
    eos: str | None,
    bos: str | None = None,
    opening: Sequence[str] = (),
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as of GPT-2, Llama-3, Qwen; it puts `opening` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens(list(special))
    steps = [processors.ByteLevel(trim_offsets=trim_offsets), *_opener(tokenizer, opening)]
    tokenizer.post_processor = processors.Sequence(steps)
    return _wrap(tokenizer, bos, eos)


def metaspace(
    special: Sequence[str], *, eos: str, bos: str, prepend: Prepend
) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback and "▁" for spaces, as SentencePiece makes them.

    `prepend`: where a "▁" is put that the text does not hold: before every piece of text between
    special tokens (`always`: Llama-2), at the head of the text (`first`: Mistral), or nowhere
    (`never`: Gemma). It puts `bos` before every text.
    """
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    space = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), space])
    trainer = BpeTrainer(vocab_size=700, special_tokens=["<unk>", *fallback], show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = _opener(tokenizer, [bos])[0]
    return _wrap(tokenizer, bos, eos)


def _opener(tokenizer: Tokenizer, opening: Sequence[str]) -> list[processors.TemplateProcessing]:
    if not opening:
        return []
    ids = [(token, tokenizer.token_to_id(token)) for token in opening]
    single, pair = [*opening, "$A"], [*opening, "$A", "$B"]
    return [processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)]


def _wrap(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
    )


# --- ChatML, with a default system text (SmolLM2, Qwen2.5) ----------------------------------------


def chatml_tokenizer(*, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(special, eos="<|im_end|>", trim_offsets=trim_offsets)


CHATML = """\
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a toy.<|im_end|>\\n' }}
{%- endif %}
{%- for turn in messages %}
{{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# --- Llama-3 --------------------------------------------------------------------------------------


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    headers = ["<|start_header_id|>", "<|end_header_id|>"]
    return byte_level(
        [*special, *headers],
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        opening=["<|begin_of_text|>"],
        trim_offsets=True,
    )


LLAMA3 = """\
{%- macro turn(role, text) -%}
{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' ~ text ~ '<|eot_id|>' }}
{%- endmacro -%}
{{ bos_token }}
{%- set ns = namespace(system='', rest=messages) %}
{%- if messages[0].role == 'system' %}
{%- set ns.system = messages[0].content | trim %}
{%- set ns.rest = messages[1:] %}
{%- endif %}
{%- if tools %}
{%- set ns.system = (ns.system ~ '\\nFunctions: ' ~ (tools | tojson)) | trim %}
{%- endif %}
{%- if ns.system %}{{ turn('system', ns.system) }}{% endif %}
{%- for message in ns.rest %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{{- turn('assistant', {'name': call.name, 'parameters': call.arguments} | tojson) }}
{%- elif message.role == 'tool' %}
{{- turn('ipython', message.content | tojson) }}
{%- else %}
{{- turn(message.role, message.content | trim) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# --- Qwen3: thoughts are shown only after the last question ---------------------------------------


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    return byte_level([*special, "<tool_call>", "</tool_call>"], eos="<|im_end|>")


QWEN3 = """\
{%- set ns = namespace(asked=0) %}
{%- for message in messages if message.role == 'user' %}{% set ns.asked = loop.index %}{% endfor %}
{%- if tools %}
{{- '<|im_start|>system\\nTools: ' ~ (tools | tojson) ~ '<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(users=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' ~ message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role != 'assistant' %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- else %}
{%- set said = message.content or '' %}
{%- set thought = message.reasoning_content or '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if seen.users == ns.asked and (loop.last or thought) %}
{{- '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' }}
{%- endif %}
{{- said }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if said or not loop.first else '' }}
{%- set used = {'name': call.function.name, 'arguments': call.function.arguments} %}
{{- '<tool_call>\\n' ~ (used | tojson) ~ '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# --- Gemma ----------------------------------------------------------------------------------------


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "\n\n"]
    return metaspace(special, bos="<bos>", eos="<eos>", prepend="never")


GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(head='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.head = message.content | trim ~ '\\n\\n' %}
{%- else %}
{{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\\n' }}
{{- ns.head ~ message.content | trim ~ '<end_of_turn>\\n' }}
{%- set ns.head = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

# Gemma 1 and 2 know no system message.
GEMMA_REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    + GEMMA
)

# --- Mistral: no generation prompt; the tools stand before the last question ----------------------


def mistral_tokenizer(*, prepend: Prepend = "first") -> PreTrainedTokenizerFast:
    instruction = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    results = ["[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    special = ["<s>", "</s>", *instruction, *results]
    return metaspace(special, bos="<s>", eos="</s>", prepend=prepend)


MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(head='', asked=0) %}
{%- for message in messages if message.role == 'user' %}{% set ns.asked = loop.index %}{% endfor %}
{%- set seen = namespace(users=0) %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.head = message.content ~ '\\n\\n' %}
{%- elif message.role == 'user' %}
{%- set seen.users = seen.users + 1 %}
{%- if tools and seen.users == ns.asked %}
{{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' ~ ns.head ~ message.content ~ '[/INST]' }}
{%- set ns.head = '' %}
{%- elif message.tool_calls %}
{%- for call in message.tool_calls if call.id | length != 9 %}
{{- raise_exception('the id of a call has nine letters or digits') }}
{%- endfor %}
{{- '[TOOL_CALLS] ' ~ (message.tool_calls | map(attribute='function') | list | tojson) }}
{{- eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] ' ~ ({'content': message.content} | tojson) ~ '[/TOOL_RESULTS]' }}
{%- else %}
{{- ' ' ~ message.content ~ eos_token }}
{%- endif %}
{%- endfor %}
"""

# --- GLM-4: the next speaker's token ends an answer -----------------------------------------------


def glm_tokenizer() -> PreTrainedTokenizerFast:
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    special = ["<|endoftext|>", "[gMASK]", "<sop>", *roles]
    return byte_level(special, eos="<|endoftext|>", opening=["[gMASK]", "<sop>"])


GLM = """\
[gMASK]<sop>
{%- if tools %}{{ '<|system|>\\nTools: ' ~ (tools | tojson) }}{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
{{- '<|assistant|>' ~ call.function.name ~ '\\n' ~ (call.function.arguments | tojson) }}
{%- endfor %}
{%- elif message.role == 'tool' %}
{{- '<|observation|>\\n' ~ message.content }}
{%- else %}
{{- '<|' ~ message.role ~ '|>\\n' ~ message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
