"""The tokenizers of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B, rebuilt as fast ones.

Their `tokenizer.model` is a sentencepiece BPE (ChatGLM2 and 3; google/sentencepiece,
`sentencepiece_model.proto`), or a list of byte sequences with ranks as tiktoken reads it (GLM-4).
Either is read here directly, so that no further package is needed, and gives the same ids.

White space: sentencepiece puts one space before every text it is given, and keeps or squeezes the
others as the rules in the file say, which are followed; newlines and tabs are bytes of its own.
The originals encode every message by itself, so each begins with that space; the templates below
write it. GLM-4 adds and drops nothing.

Special tokens are found in the text, which the originals allow only for the roles, and on demand.
ChatGLM2 and 3 call two of theirs `sop` and `eop`, letters that stand in "philosophy": they are
spelled `<sop>` and `<eop>` here, as in GLM-4; the ids are the same.

The chat templates are ours even where the folder has one: those of ChatGLM3 differ between
revisions (one puts a space before the first newline), and name `sop` by its bare letters.
An answer's end is not written: ChatGLM2 and 3 end one with `</s>`, ChatGLM3 and GLM-4 with the
next role (`<|user|>`, `<|observation|>`), GLM-4 also with `<|endoftext|>`.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from lora_scripts.errors import user_error

if TYPE_CHECKING:
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

Generation = Literal[2, 3, 4]  # ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B

_OPENING = ["[gMASK]", "<sop>"]  # stands before every text
_COMMON = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
_PICTURES = [f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")]
_END = "<|endoftext|>"
# In the order of their ids, which follow those of tokenizer.model.
_SPECIAL: Mapping[Generation, list[str]] = {
    2: _COMMON,
    3: _COMMON + _ROLES,
    4: [_END, *_COMMON, *_ROLES, *_PICTURES],
}
# Where GLM-4 cuts a text before any merging: the regular expression of its tokenizer (a fact; it
# is that of OpenAI's cl100k_base but for the runs of spaces).
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=*[ \t]+\d+")
_SPACE = "\u2581"  # sentencepiece's mark for a space

# [Round 1]\n\n问：{question}\n\n答：{answer}\n\n[Round 2]… The last answer is encoded by itself in
# the original's training (ptuning/main.py), so it begins with a space; earlier ones are part of the
# prompt and do not.
_CHATGLM2 = """\
{%- if tools %}{{ raise_exception('ChatGLM2 has no place for tools') }}{% endif %}
{{- '[gMASK]<sop>' }}
{%- set seen = namespace(rounds=0, role='assistant') %}
{%- for message in messages %}
{%- if message.role not in ['user', 'assistant'] or message.tool_calls %}
{{- raise_exception('ChatGLM2 knows questions (user) and answers (assistant) only') }}
{%- elif message.role == seen.role %}
{{- raise_exception('ChatGLM2 needs a question first, then answers and questions in turn') }}
{%- endif %}
{%- set seen.role = message.role %}
{%- if message.role == 'user' %}
{%- set seen.rounds = seen.rounds + 1 %}
{{- '[Round ' ~ seen.rounds ~ ']\\n\\n问：' ~ message.content ~ '\\n\\n答：' }}
{%- elif not loop.last %}
{{- message.content ~ '\\n\\n' }}
{%- elif message.content %}
{{- ' ' ~ message.content }}
{%- endif %}
{%- endfor %}
"""

# What ChatGLM3 and GLM-4 share: the list of functions, and who may speak.
_WITH_ROLES = """\
{%- set known = namespace(functions=[]) %}
{%- for tool in tools or [] %}
{%- set known.functions = known.functions + [tool.function or tool] %}
{%- endfor %}
{%- if known.functions and (not messages or messages[0].role != 'system') %}
{{- raise_exception('tools are listed in the system message: begin with one') }}
{%- endif %}
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
{%- set role = 'observation' if message.role == 'tool' else message.role %}
{%- if role not in ['system', 'user', 'assistant', 'observation'] %}
{{- raise_exception('there is no role ' ~ role) }}
{%- endif %}
{%- set content = message.content or '' %}
"""

# <|user|>\n {question}<|assistant|>\n {answer}: head and content are encoded one by one, hence the
# space. A message's `metadata` (a tool's name) ends its head.
_CHATGLM3 = (
    _WITH_ROLES
    + """\
{%- if message.tool_calls %}
{{- raise_exception("ChatGLM3 calls a tool in words: give its name as the answer's 'metadata' \
and, as its content, ```python tool_call(name='value')``` on three lines") }}
{%- endif %}
{%- if loop.first and known.functions %}
{%- set content = content ~ '\\n' ~ known.functions | tojson(indent=4) %}
{%- endif %}
{{- '<|' ~ role ~ '|>' ~ (message.metadata or '') ~ '\\n' ~ (' ' if content else '') ~ content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
)

# <|user|>\n{question}<|assistant|>\n{answer}; a call is <|assistant|>{name}\n{arguments as JSON}.
_GLM4 = (
    _WITH_ROLES
    + """\
{%- if loop.first %}
{%- set hint = '在调用上述函数时，请使用 Json 格式表示调用的参数。' %}
{%- for function in known.functions %}
{%- set listed = '\\n\\n## ' ~ function.name ~ '\\n\\n' ~ function | tojson(indent=4) %}
{%- set known.text = (known.text or '') ~ listed ~ '\\n' ~ hint %}
{%- endfor %}
{%- set content = content ~ (known.text or '') %}
{%- endif %}
{%- if content or not message.tool_calls %}
{{- '<|' ~ role ~ '|>' ~ (message.metadata or '') ~ '\\n' ~ content }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set called = call.function or call %}
{{- '<|assistant|>' ~ called.name ~ '\\n' }}
{{- called.arguments if called.arguments is string else called.arguments | tojson }}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
)

CHAT_TEMPLATES: Mapping[Generation, str] = {2: _CHATGLM2, 3: _CHATGLM3, 4: _GLM4}


@dataclass(frozen=True)
class _Piece:
    """An entry of a sentencepiece vocabulary; `score` is high for what is merged first."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class _Sentencepiece:
    """What of a sentencepiece model decides the ids. Defaults as in sentencepiece_model.proto."""

    pieces: Sequence[_Piece]
    model_type: int
    byte_fallback: bool
    unknown: str
    end: str
    replaces: bool
    suffixes: bool
    dummy_prefix: bool
    squeeze_spaces: bool


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # 6: a byte
_BPE = 2


def is_rank_file(path: Path) -> bool:
    """Whether `tokenizer.model` is a list of byte sequences with ranks, as GLM-4's is."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _RANK_LINE.fullmatch(file.readline(4096).strip()) is not None


def load(path: Path, generation: Generation, *, length: int | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the folder `path`; `length`: the most tokens that the model takes.

    With special tokens added, a text begins with `[gMASK]<sop>`. Padding goes left, as the
    originals pad.

    Raises:
        UserError: `tokenizer.model` is missing, damaged, or of a kind that cannot be expressed.
    """
    from transformers import PreTrainedTokenizerFast

    file = path / "tokenizer.model"
    if not file.is_file():
        raise user_error(str(path), "there is no tokenizer.model; fetch the folder whole")
    if generation == 4:
        tokenizer, unknown, end, pad = _from_ranks(file), None, _END, _END
    else:
        model = _read_sentencepiece(file)
        tokenizer, unknown, end, pad = _from_pieces(model), model.unknown, model.end, model.unknown
    _add_special(file, tokenizer, _SPECIAL[generation])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATES[generation],
        **({} if length is None else {"model_max_length": length}),
    )


def _add_special(file: Path, tokenizer: Tokenizer, names: Sequence[str]) -> None:
    """Special tokens under the ids that follow, and the opening before every text."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    ids = {name: id for id, name in enumerate(names, start=tokenizer.get_vocab_size())}
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    if moved := [name for name, id in ids.items() if tokenizer.token_to_id(name) != id]:
        raise user_error(str(file), f"its vocabulary holds {', '.join(moved)} already")
    opening = " ".join(_OPENING)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{opening} $A",
        pair=f"{opening} $A $B",
        special_tokens=[(name, ids[name]) for name in _OPENING],
    )


# --- sentencepiece -------------------------------------------------------------------------------


def _from_pieces(model: _Sentencepiece) -> Tokenizer:
    """sentencepiece's BPE: the neighbours whose union scores highest are merged, until none is."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = {piece.text: id for id, piece in enumerate(model.pieces)}
    normal = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    order = sorted(normal, key=lambda text: -normal[text])
    own = [piece.text for piece in model.pieces if piece.kind == _USER_DEFINED]
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            _merges(order, vocabulary),
            unk_token=model.unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(own),
        )
    )
    if own:  # never merged, never cut; the longest that fits
        fits = "|".join(re.escape(text) for text in sorted(own, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(fits), "isolated")
    tokenizer.normalizer = _normalizer(model)
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    control = [piece.text for piece in model.pieces if piece.kind in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    return tokenizer


def _normalizer(model: _Sentencepiece) -> normalizers.Normalizer:
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = []
    if model.squeeze_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _read_sentencepiece(file: Path) -> _Sentencepiece:
    content = file.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        what = "this is a Git LFS pointer, to be replaced by the file itself (`git lfs pull`)"
        raise user_error(str(file), what)
    try:
        model = _parse(content)
    except (ValueError, LookupError, TypeError, AssertionError, struct.error):
        raise user_error(
            str(file), "this is no whole sentencepiece model; fetch it again"
        ) from None
    if problems := [what for odd, what in _odd(model) if odd]:
        raise user_error(str(file), f"ChatGLM's is a BPE on the text as it is; {problems[0]}")
    return model


def _odd(model: _Sentencepiece) -> Iterator[tuple[bool, str]]:
    """What a fast tokenizer would not do as sentencepiece does it to the letter."""
    yield model.model_type != _BPE, "this model is not of the type BPE"
    yield model.replaces, "this model replaces characters (a normalization rule such as NFKC)"
    yield model.suffixes, "this model marks spaces after words, or not at all"
    yield any(p.kind == _UNUSED for p in model.pieces), "this model has pieces marked as unused"


def _parse(content: bytes) -> _Sentencepiece:
    """A ModelProto: pieces (1), trainer_spec (2), normalizer_spec (3)."""
    pieces: list[_Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(dict(_fields(value))))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return _Sentencepiece(
        pieces=pieces,
        model_type=int(trainer.get(3, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        unknown=pieces[int(trainer.get(40, 0))].text,
        end=pieces[int(trainer.get(42, 2))].text,
        replaces=bool(normalizer.get(2)),
        suffixes=bool(trainer.get(24, 0)) or not normalizer.get(5, 1),
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze_spaces=bool(normalizer.get(4, 1)),
    )


def _piece(fields: Mapping[int, int | bytes]) -> _Piece:
    text, score = fields[1], fields.get(2, b"\0\0\0\0")
    assert isinstance(text, bytes) and isinstance(score, bytes)
    return _Piece(text.decode(), struct.unpack("<f", score)[0], int(fields.get(3, _NORMAL)))


def _fields(message: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protobuf message's fields; what they mean, the caller knows.

    See protobuf.dev/programming-guides/encoding: a varint, or so many bytes.
    """
    if isinstance(message, int):
        raise ValueError("a number where a message is expected")
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"there is no wire type {wire}")
            size, at = _varint(message, at)
        if at + size > len(message):
            raise ValueError("cut short")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no number is that long")


# --- ranks ---------------------------------------------------------------------------------------


def _from_ranks(file: Path) -> Tokenizer:
    """tiktoken's BPE on bytes: the neighbours whose union has the lowest rank are merged first.

    A piece that is itself in the list is taken whole (`ignore_merges`).
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    ranks = _read_ranks(file)
    order = sorted(ranks, key=lambda token: ranks[token])
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    tokenizer = Tokenizer(
        BPE(
            {spell(token): rank for token, rank in ranks.items()},
            [(spell(left), spell(right)) for left, right in _merges(order, ranks)],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            what = f"line {number} is no token in base64 with its rank; fetch the file again"
            raise user_error(str(file), what) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        what = f"its {len(ranks)} ranks are not 0, 1, 2 … in some order; fetch the file again"
        raise user_error(str(file), what)
    if missing := 256 - sum(len(token) == 1 for token in ranks):
        raise user_error(str(file), f"{missing} of the 256 single bytes are not in it")
    return ranks


def _byte_letters() -> list[str]:
    """The letter by which byte-level tokenizers write each byte (GPT-2, `bytes_to_unicode`).

    Printable Latin-1 letters stand for themselves, the other bytes for U+0100, U+0101 …
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


Token = TypeVar("Token", str, bytes)


def _merges(order: Iterable[Token], ids: Mapping[Token, int]) -> list[tuple[Token, Token]]:
    """Every way to put each token together from two others, tokens in the order given."""
    tokens = list(order)
    known = set(tokens)
    merges: list[tuple[Token, Token]] = []
    for token in tokens:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in known and right in known]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
