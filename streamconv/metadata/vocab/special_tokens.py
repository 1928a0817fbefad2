"""The ids of the special tokens, and which of them enclose a text: `tokenizer.ggml.*_token_id`, `add_*_token`.

Wherever gguf-py's SpecialVocab finds an id, the result here is the same. An id that is written is always a row of the
model. Source: gguf-py/gguf/vocab.py of the llama.cpp inside llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import Keys

from streamconv.errors import RunWarning
from streamconv.files.hub import CONFIG
from streamconv.files.store import Place
from streamconv.metadata.vocab.companions import Companions, token_id, token_text
from streamconv.metadata.vocab.files import GENERATION_CONFIG, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, TOKENIZER_JSON
from streamconv.metadata.vocab.tokenizer_json import shown
from streamconv.recipe import SpecialTokens

NO_SPECIAL_TOKENS = SpecialTokens()

ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
}
ADD_KEYS = {"bos": Keys.Tokenizer.ADD_BOS, "eos": Keys.Tokenizer.ADD_EOS, "sep": Keys.Tokenizer.ADD_SEP}

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_BY_TEXT = {"eot": "▁<EOT>"}  # Code Llama's end of infilling, which no file names and llama.cpp does not recognise

# Roles whose missing token changes how a model is used, each with a remark on the effect.
_IN_VAIN = {"bos": "", "eos": ": it cannot end an answer"}

# llama.cpp ends an answer at these, whatever eos is (special_eog_ids in llama-vocab.cpp, llama-cpp-python 0.3.36).
END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>",
)  # fmt: skip

Lookup = Callable[[str], int | None]


@dataclass(slots=True)
class Roles:
    """The texts of special tokens by role, and whether each is added to a text, as far as the files state it."""

    texts: dict[str, str] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)


def find_roles(companions: Companions, post_processor: Any) -> Roles:
    """Return the roles that tokenizer_config.json and the post-processor of tokenizer.json define.

    The post-processor takes precedence on which tokens are added.
    """
    config = companions.tokenizer_config
    roles = Roles({role: text for role in _ROLES if (text := token_text(config.get(f"{role}_token")))})
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if role not in roles.texts and stand_in in roles.texts:
            roles.texts[role] = roles.texts[stand_in]
    for processor in _flattened(post_processor):
        match processor.get("type"):
            case "ByteLevel":
                roles.add.setdefault("bos", False)
                roles.add.setdefault("eos", False)
            case "RobertaProcessing":
                _read_pair_processing(processor, roles)
            case "TemplateProcessing":
                _read_template(processor, roles)
    for role in _ROLES:
        adds = config.get(f"add_{role}_token")
        if isinstance(adds, bool):
            roles.add.setdefault(role, adds)
    return roles


def _flattened(processor: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(processor, Mapping):
        inner = processor.get("processors")
        yield from (part for part in inner if isinstance(part, Mapping)) if isinstance(inner, list) else (processor,)


def _read_pair_processing(processor: Mapping[str, Any], roles: Roles) -> None:
    roles.add.update(bos=True, eos=True, sep=True)
    for role in ("cls", "sep"):
        pair = processor.get(role)
        if isinstance(pair, Sequence) and pair and isinstance(pair[0], str):
            roles.texts.setdefault(role, pair[0])


def _read_template(processor: Mapping[str, Any], roles: Roles) -> None:
    """`single` is BOS, text, EOS, and `pair` has a separator between two texts; BOS and EOS are optional."""
    single, pair = _pieces(processor.get("single")), _pieces(processor.get("pair"))
    texts, first, last = roles.texts, None, None
    if len(single) > 1:
        first, last = single[0].special, single[-1].special
    if first is not None:
        if first not in (texts.get("bos"), texts.get("cls")):
            texts.setdefault("bos", first)
            texts.setdefault("cls", first)
        roles.add["bos"] = first in (texts.get("bos"), texts.get("cls"))
    if last is not None:
        if last != texts.get("eos") and "eos" in texts:
            # Then the configured EOS ends a turn instead.
            texts["eom" if "eot" in texts else "eot"] = texts["eos"]
        texts["eos"] = last
        roles.add["eos"] = True
    if pair and pair[0].special == first is not None:
        pair = pair[1:]
    if pair and pair[-1].special == last is not None:
        pair = pair[:-1]
    if len(pair) > 2 and (pair[0].sequence, pair[-1].sequence) == ("A", "B"):
        ends = (texts.get("sep"), texts.get("eos"))
        between = [piece.special in ends and piece.special is not None for piece in pair[1:-1]]
        roles.add["sep"] = (between[0] and last is None) or (len(between) == 2 and between[1])
        if roles.add["sep"] and "sep" not in texts and "eos" in texts:
            texts["sep"] = texts["eos"]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One piece of a template: a special token or one of the texts."""

    special: str | None
    sequence: str | None


def _pieces(template: Any) -> list[_Piece]:
    pieces = template if isinstance(template, list) else []
    return [_Piece(_id_of(piece, "SpecialToken"), _id_of(piece, "Sequence")) for piece in pieces]


def _id_of(piece: Any, kind: str) -> str | None:
    inner = piece.get(kind) if isinstance(piece, Mapping) else None
    value = inner.get("id") if isinstance(inner, Mapping) else None
    return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Lookups of special tokens in a vocabulary.

    Attributes:
        n_rows: Number of rows of the embedding.
        added: Returns the id of the added token with a given text, or None.
        any: The same for all tokens.
        has: Returns whether a row has a token.
    """

    n_rows: int
    added: Lookup
    any: Lookup
    has: Callable[[int], bool] = lambda id_: True


def find_ids(
    roles: Roles, companions: Companions, tokens: Tokens, special: SpecialTokens = NO_SPECIAL_TOKENS
) -> tuple[dict[str, int], list[RunWarning]]:
    """Return ids by role, with warnings for tokens that do not exist and for disagreements between files.

    Args:
        roles: Texts by role from the tokenizer files.
        companions: The small files beside the tokenizer.
        tokens: Lookups in the vocabulary.
        special: Special tokens that the architecture defines.
    """
    ids: dict[str, int] = {}
    warnings: list[RunWarning] = []
    for role in ID_KEYS:
        inside: list[tuple[str, int]] = []
        for source, id_ in _candidates(role, roles, companions, tokens, special):
            if id_ >= tokens.n_rows:
                message = f"{source} names token {shown(id_)} as {role}, but the model has only {tokens.n_rows:,} rows"
                warnings.append(RunWarning("special-token-range", message + _IN_VAIN.get(role, "")))
            elif role in _IN_VAIN and not tokens.has(id_):
                message = f"{source} names token {id_} as {role}, but the vocabulary has no such token"
                warnings.append(RunWarning("special-token-unknown", message + _IN_VAIN[role]))
            else:
                inside.append((source, id_))
        warnings += _unknown(role, roles, companions, tokens)
        if inside:
            source, ids[role] = inside[0]
        decided = {str(path) for path, _ in _brought(role, companions)}
        if inside and source not in decided and role not in special.keys:
            warnings += _disagreement(role, source, ids[role], companions, tokens)
    return ids, warnings


def _candidates(
    role: str, roles: Roles, companions: Companions, tokens: Tokens, special: SpecialTokens
) -> Iterator[tuple[str, int]]:
    """Files and ids in order of precedence: an adapter's own, then those of gguf-py's SpecialVocab."""
    for path, named in _brought(role, companions):
        id_ = named if isinstance(named, int) else _first(tokens.added(named), tokens.any(named))
        if id_ is not None:
            yield str(path), id_
    text = roles.texts.get(role) or _BY_TEXT.get(role)
    mapped = token_text(companions.special_tokens_map.get(f"{role}_token"))
    written = _config_id(role, companions)
    own = special.texts.get(role)
    found = (
        (CONFIG, token_id(companions.config.get(special.keys.get(role, "")))),
        (TOKENIZER_CONFIG, tokens.added(text) if text else None),
        (CONFIG, None if isinstance(written, list) else token_id(written)),
        (TOKENIZER_CONFIG, tokens.any(text) if text else None),
        (SPECIAL_TOKENS_MAP, tokens.any(mapped) if mapped else None),
        (GENERATION_CONFIG, token_id(companions.generation_config.get(f"{role}_token_id"))),
        (CONFIG, token_id(written) if isinstance(written, list) else None),
        (TOKENIZER_JSON, tokens.added(own) if own else None),
    )
    yield from ((source, id_) for source, id_ in found if id_ is not None)


def _brought(role: str, companions: Companions) -> Iterator[tuple[Place, str | int]]:
    yield from (companions.brought[key] for key in (f"{role}_token", f"{role}_token_id") if key in companions.brought)


def _first(*ids: int | None) -> int | None:
    return next((id_ for id_ in ids if id_ is not None), None)


def _unknown(role: str, roles: Roles, companions: Companions, tokens: Tokens) -> Iterator[RunWarning]:
    """A warning for each token name that is not in the vocabulary, if the role matters for running the model."""
    mapped = token_text(companions.special_tokens_map.get(f"{role}_token"))
    sources = {mapped: SPECIAL_TOKENS_MAP, roles.texts.get(role): TOKENIZER_CONFIG}
    for text, source in sources.items():
        if role in _IN_VAIN and text and tokens.added(text) is None and tokens.any(text) is None:
            message = f"{source} names {shown(text)} as {role}, but the vocabulary does not have it"
            yield RunWarning("special-token-unknown", message + _IN_VAIN[role])


def _config_id(role: str, companions: Companions) -> Any:
    value, inner = companions.config.get(f"{role}_token_id"), companions.config.get("text_config")
    return inner.get(f"{role}_token_id") if value is None and isinstance(inner, Mapping) else value


def _disagreement(role: str, source: str, chosen: int, companions: Companions, tokens: Tokens) -> Iterator[RunWarning]:
    """A warning for each file that gives this role another id, or a list without the chosen one."""
    others = (
        (CONFIG, _config_id(role, companions)),
        (GENERATION_CONFIG, companions.generation_config.get(f"{role}_token_id")),
    )
    for name, value in others:
        named = value if isinstance(value, list) else [value]
        first = token_id(value)
        if first is not None and first < tokens.n_rows and tokens.has(first) and chosen not in named:
            message = f"{role} is token {chosen} in {source} but {shown(value)} in {name}; {chosen} was written"
            if role == "eos":
                message += _whether_to_act([id_ for id_ in named if isinstance(id_, int)], tokens)
            yield RunWarning("special-token-disagreement", message)


def _whether_to_act(others: Sequence[int], tokens: Tokens) -> str:
    """Advice on an end token that is not written."""
    ends = {tokens.added(text) for text in END_TEXTS} | {tokens.any(text) for text in END_TEXTS}
    if ends.issuperset(others):
        return "; nothing to do: llama.cpp ends an answer at either"
    return "; only if answers do not end, correct eos_token in tokenizer_config.json and convert again"
