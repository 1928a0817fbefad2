"""Map the structure of a pre-tokenizer in tokenizer.json to the name of the same one in llama.cpp.

A name depends only on the structure, not on token ids, so added tokens and other vocabularies do not change it. Tests
compare each row with the runtime; known differences are noted in the row.
Source: llm_tokenizer_bpe and llama_vocab::impl::load in src/llama-vocab.cpp of the llama.cpp inside llama-cpp-python
0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from streamconv.errors import RunWarning, SourceError, UsageError
from streamconv.files.store import Place

# A canonical structure: the patterns split at, in order, before bytes are mapped to letters.
Steps = tuple[str, ...]
DIGITS = "Digits, one by one"
PUNCTUATION = "Punctuation, one by one"
GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # the built-in pattern of ByteLevel
)

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANK = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_PUNCTUATION_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_HALVING_BLANKS = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))


def _either(*alternatives: str) -> str:
    return "|".join(alternatives)


CL100K = _either(_CONTRACTION, _WORD, r"\p{N}{1,3}", _PUNCTUATION, _BLANK)
QWEN2 = _either(_CONTRACTION, _WORD, r"\p{N}", _PUNCTUATION, _BLANK)
QWEN35 = _either(_CONTRACTION, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _BLANK)
UFAKZEKA = _either(_WORD, r"\p{N}", _PUNCTUATION, _BLANK)
SEED_CODER = _either(_CONTRACTION, _WORD, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", _BLANK)
JAIS2 = _either(_CONTRACTION, _WORD, r"\p{N}{1,3}", _PUNCTUATION, r"\s*[\r\n]+", _HALVING_BLANKS, r"\s{1}")
MINICPM5 = _either(_CONTRACTION, _WORD, r"\p{N}+", _PUNCTUATION, _BLANK)
O200K = _either(*(f"{word}{_CONTRACTION}?" for word in _CASED), r"\p{N}{1,3}", _PUNCTUATION_SLASH, _BLANK)
TEKKEN = _either(*_CASED, r"\p{N}", _PUNCTUATION_SLASH, _BLANK)
BAILINGMOE = _either(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"\p{N}",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"\s*[\r\n]",
    r"\s+(?!\S)",
    r"\s+",
)
EXAONE_MOE = _either(
    _CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
    r"\p{N}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
    r"\s*[\r\n]",
    r"\s+(?!\S)",
    r"\s+",
)
THREE_DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)"  # groups of three from the right
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_AFTER_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_MARKED_WORD = "[^\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_HAN_KANA = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK_V3 = _either(
    _AFTER_PUNCTUATION,
    _MARKED_WORD,
    r" ?[\p{P}\p{S}]+" + "[\r\n]*",
    r"\s*" + "[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
SPARK = _either(_AFTER_PUNCTUATION, _MARKED_WORD, r" ?[\p{P}\p{S}]+", "[\r\n]", r"\s+(?!\S)", r"\s+")
YOUTU = (
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    _either(*(f"{word}{_CONTRACTION}?" for word in _CASED), r"\p{N}", _PUNCTUATION_SLASH, _BLANK),
)
CHAMELEON = ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGITS, PUNCTUATION, GPT2)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A pre-tokenizer of llama.cpp.

    Attributes:
        name: Its name.
        ignore_merges: Whether a word that is itself a token is not split by merges.
        differs: Where it is known to split differently from the structure in tokenizer.json.
    """

    name: str
    ignore_merges: bool = False
    differs: str | None = None


# The first name is used unless the recipe asks for another, or only another has the file's `ignore_merges`.
PRE_TOKENIZERS: dict[Steps, tuple[Runtime, ...]] = {
    (CL100K,): (
        *(Runtime(name, True) for name in ("llama-bpe", "lfm2", "glm4")),
        *(Runtime(name) for name in ("smaug-bpe", "dbrx", "chatglm-bpe")),
    ),
    (GPT2,): tuple(
        Runtime(name) for name in ("gpt-2", "olmo", "exaone4", "mpt", "jais", "trillion", "granite-docling")
    ),
    (DIGITS, GPT2): tuple(
        Runtime(name)
        for name in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")
    ),
    (QWEN2,): tuple(
        Runtime(name)
        for name in ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2", "solar-open")
    ),
    (QWEN35,): (Runtime("qwen35"),),
    (UFAKZEKA,): (Runtime("ufakzeka"),),
    (SEED_CODER,): (Runtime("seed-coder"),),
    (JAIS2,): (Runtime("jais-2"),),
    (r"\p{N}{1,3}", MINICPM5): (Runtime("minicpm5", True),),
    (r"\p{N}{1,3}", _HAN_KANA, DEEPSEEK_V3): tuple(
        Runtime(name) for name in ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")
    ),
    (r"\p{N}{1,3}", _HAN_KANA, SPARK, r"\p{N}"): (Runtime("spark2_5"),),
    YOUTU: (Runtime("youtu", True, differs="at words such as iPhone"),),
    ("[^\\n]+|[\\n]+", QWEN2): (Runtime("laguna"),),
    CHAMELEON: (Runtime("chameleon"),),
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS): (
        Runtime("deepseek-coder", differs="beside spaces that are not ASCII"),
    ),
    (O200K,): (
        *(Runtime(name, differs="at combining marks") for name in ("gpt-4o", "llama4", "minimax-m2", "kanana2")),
        Runtime("granite-embed-multi-97m", True),
    ),
    (THREE_DIGITS, O200K): tuple(
        Runtime(name, differs="at digits before letters and at words such as iPhone")
        for name in ("tiny_aya", "cohere2moe")
    ),
    (BAILINGMOE,): tuple(Runtime(name) for name in ("bailingmoe", "bailingmoe2", "llada-moe")),
    (EXAONE_MOE,): (Runtime("exaone-moe"),),
    (r"\p{N}+", r"(?=(\d{3})+(?!\d))"): (Runtime("superbpe", differs="at digits of other scripts"),),
    (BLOOM,): tuple(Runtime(name) for name in ("bloom", "poro-chat", "gpt3-finnish")),
    (BLOOM, DIGITS): (Runtime("viking"),),
    (TEKKEN,): (Runtime("tekken", True, differs="at combining marks"),),
}


# All names that the runtime accepts; it refuses a file with another one ("unknown pre-tokenizer type").
NAMES = frozenset(
    """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx
    deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon
    falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m
    granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code
    jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3
    llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 mmbert modern-bert mpt olmo phi-2 pixtral
    poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2
    starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking whitespace youtu
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Match:
    """The value of `tokenizer.ggml.pre`. `ignore_merges` is the runtime's, None if the name is not in the table."""

    name: str
    ignore_merges: bool | None
    warnings: tuple[RunWarning, ...] = ()


def identify(
    pre_tokenizer: Any, normalizer: Any, ignore_merges: bool, *, file: Place, default: str | None, override: str | None
) -> Match:
    """Return the pre-tokenizer of a byte-level BPE.

    Args:
        pre_tokenizer: That part of tokenizer.json.
        normalizer: That part of tokenizer.json.
        ignore_merges: The flag of the tokenizer model.
        file: The file that errors name.
        default: Name for an unknown structure, with a warning.
        override: Name that the user chose.

    Raises:
        SourceError: The structure is unknown and there is no `default` or `override`, or it is not byte-level.
    """
    steps = canonical_steps(pre_tokenizer)
    known = PRE_TOKENIZERS.get(steps or (), ()) if _is_kept(normalizer) else ()
    if override is not None:
        return _overridden(override, known)
    if not known:
        what = "the pre-tokenizer" if _is_kept(normalizer) else "the normalizer"
        if default is None or not is_byte_level(pre_tokenizer):
            problem = f"{what} does not match any pre-tokenizer of llama.cpp"
            raise SourceError(problem, file=file, hint="choose one of llama.cpp's with --pre NAME", code="pre-unknown")
        message = f"{what} is unknown; {default!r} was written, the usual one of this architecture"
        return Match(default, _ignores_merges(default), (RunWarning("pre-tokenizer-unknown", message),))
    names = [runtime.name for runtime in known]
    fitting = [runtime for runtime in known if runtime.ignore_merges == ignore_merges]
    chosen = known[names.index(default)] if default in names else (fitting or known)[0]
    return Match(chosen.name, chosen.ignore_merges, tuple(_faults(chosen, normalizer)))


def canonical_steps(pre_tokenizer: Any) -> Steps | None:
    """Return the structure as a key of the table, without flags that have no effect; None if it has other steps."""
    steps: list[str] = []
    is_byte_level = False
    for part in _flattened(pre_tokenizer, "pretokenizers"):
        step = _step(part)
        if (
            is_byte_level or step is None
        ):  # after ByteLevel the text consists of byte letters, where character classes match differently
            return None
        is_byte_level = part["type"] == "ByteLevel"
        steps += step
    return tuple(steps) if is_byte_level else None


def is_byte_level(part: Any) -> bool:
    """Return whether a pre-tokenizer or decoder has a ByteLevel step."""
    inner = "pretokenizers" if isinstance(part, Mapping) and "pretokenizers" in part else "decoders"
    return any(step.get("type") == "ByteLevel" for step in _flattened(part, inner))


def space_prefix(normalizer: Any, pre_tokenizer: Any) -> bool | None:
    """Return whether a llama-style tokenizer.json puts a space before a text; None if it does anything else."""
    # Gemma splits at spaces, but its normalizer has already replaced them all.
    match _flattened(normalizer, "normalizers"), _flattened(pre_tokenizer, "pretokenizers"):
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], [
            {"type": "Split", "pattern": {"String": " "}}
        ]:
            return False
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], []:
            return False
        case [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ], []:
            return True
        case [], [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            return {"first": True, "always": True, "never": False}.get(scheme) if isinstance(scheme, str) else None
        case _:
            return None


def space_fault(pre_tokenizer: Any) -> str | None:
    """Return where llama.cpp inserts a space that a Metaspace pre-tokenizer does not; None if they agree."""
    match _flattened(pre_tokenizer, "pretokenizers"):
        case [{"prepend_scheme": "first"}]:
            return "after special tokens and before texts that begin with a space"
        case [{"prepend_scheme": "always"}]:
            return "before texts that begin with a space"
        case _:
            return None


def check_name(name: str) -> None:
    """Raise UsageError if llama.cpp has no pre-tokenizer of this name."""
    if name not in NAMES:
        alike = get_close_matches(name, sorted(NAMES), n=3) or ["llama-bpe", "gpt-2", "qwen2"]
        hint = f"llama.cpp has {', '.join(alike)} and {len(NAMES) - len(alike)} more"
        raise UsageError(
            f"--pre {name!r} is not a pre-tokenizer of llama.cpp, which would not load the file",
            hint=hint,
            code="pre-unknown",
        )


def _step(part: Mapping[str, Any]) -> Sequence[str] | None:
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [] if part.get("use_regex", True) is False else [GPT2]
        case {"type": "Digits", "individual_digits": True}:
            return [DIGITS]
        case {"type": "Punctuation", "behavior": "Isolated"}:
            return [PUNCTUATION]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}:
            return [regex]  # inverted or not: the text between matches is isolated as well
        case _:
            return None


def _flattened(part: Any, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if not isinstance(part, Mapping):
        return [{}]
    if part.get("type") != "Sequence":
        return [part]
    parts = part.get(inner)
    return [step for element in parts for step in _flattened(element, inner)] if isinstance(parts, list) else [{}]


def _is_kept(normalizer: Any) -> bool:
    """Whether BPE works without this normalizer, since llama.cpp has none. NFC changes few texts and is accepted."""
    return all(part.get("type") == "NFC" for part in _flattened(normalizer, "normalizers"))


def _overridden(name: str, known: tuple[Runtime, ...]) -> Match:
    if known and name not in [runtime.name for runtime in known]:
        message = f"{name!r} was written as requested; the structure in tokenizer.json is that of {known[0].name!r}"
        return Match(name, _ignores_merges(name), (RunWarning("pre-tokenizer-override", message),))
    return Match(name, _ignores_merges(name))


def _ignores_merges(name: str) -> bool | None:
    return next((r.ignore_merges for row in PRE_TOKENIZERS.values() for r in row if r.name == name), None)


def _faults(runtime: Runtime, normalizer: Any) -> list[RunWarning]:
    faults = []
    if runtime.differs:
        message = f"llama.cpp's {runtime.name!r} splits some texts differently: {runtime.differs}"
        faults.append(RunWarning("pre-tokenizer-differs", message))
    if _flattened(normalizer, "normalizers"):
        faults.append(
            RunWarning("normalizer-ignored", "the tokenizer composes characters (NFC), but llama.cpp does not")
        )
    return faults
