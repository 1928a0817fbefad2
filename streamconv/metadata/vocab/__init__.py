"""Make the `tokenizer.*` keys of a GGUF file from the tokenizer files of a checkpoint.

The keys depend only on these files and on the number of rows of the embedding. A tokenizer that llama.cpp cannot run
raises a SourceError; one that it runs slightly differently gives a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf.constants import Keys, TokenType

from streamconv.errors import RunWarning, SourceError
from streamconv.files.store import Place
from streamconv.gguf.format import KeyValue
from streamconv.metadata.vocab.agreement import FastTokens
from streamconv.metadata.vocab.bpe_tokens import byte_fallback_tokens, byte_level_tokens
from streamconv.metadata.vocab.chat_templates import NO_TEMPLATES, chat_template_keys
from streamconv.metadata.vocab.companions import Companions
from streamconv.metadata.vocab.files import SENTENCEPIECE_MODEL, TEKKEN, TOKENIZER_JSON, TokenizerFiles
from streamconv.metadata.vocab.footprint import vocabulary_nbytes
from streamconv.metadata.vocab.pretokenizers import check_name, identify, is_byte_level, space_fault, space_prefix
from streamconv.metadata.vocab.sentencepiece_model import read_sentencepiece_model
from streamconv.metadata.vocab.special_tokens import (
    ADD_KEYS,
    END_TEXTS,
    ID_KEYS,
    NO_SPECIAL_TOKENS,
    Tokens,
    find_ids,
    find_roles,
)
from streamconv.metadata.vocab.spm_tokens import sentencepiece_tokens
from streamconv.metadata.vocab.tekken import TEKKEN_ROLES, read_tekken
from streamconv.metadata.vocab.token_list import TokenList
from streamconv.metadata.vocab.tokenizer_json import Merges, TokenizerJson, read_tokenizer_json, shown
from streamconv.recipe import SpecialTokens

__all__ = ["Vocabulary", "read_vocabulary", "vocabulary_nbytes"]


@dataclass(frozen=True)
class Vocabulary:
    """All `tokenizer.*` keys in the order in which llama.cpp's converter writes them."""

    keys: tuple[KeyValue, ...]
    warnings: tuple[RunWarning, ...]


def read_vocabulary(
    directory: Place,
    *,
    config: Mapping[str, Any],
    n_vocab: int,
    default_pre: str | None,
    pre: str | None,
    over: Place | None = None,
    special: SpecialTokens = NO_SPECIAL_TOKENS,
    templates: Mapping[str, str] = NO_TEMPLATES,
) -> Vocabulary:
    """Return the tokenizer in `directory` as GGUF keys.

    Args:
        directory: The folder with the tokenizer files.
        config: The model's config.json.
        n_vocab: Number of rows of the embedding, and so of tokens.
        default_pre: Name of the pre-tokenizer for an unknown structure, with a warning; None makes that an error.
        pre: Name of the pre-tokenizer that the user chose.
        over: A folder whose files take precedence over those of `directory`, such as an adapter's.
        special: Special tokens that the architecture defines.
        templates: Named chat templates that the architecture adds to those in the files.

    Raises:
        SourceError: A file is missing, malformed or not supported.
        UsageError: llama.cpp has no pre-tokenizer of the name `pre`.
    """
    if pre is not None:
        check_name(pre)
    companions = Companions.load(TokenizerFiles(directory, over), config)
    source = _read_source(companions, n_vocab)
    tokens = source.tokens
    name = _pre_tokenizer(source, default_pre, pre) if source.model == "gpt2" else pre or "default"
    keys = [KeyValue.string(Keys.Tokenizer.MODEL, source.model), KeyValue.string(Keys.Tokenizer.PRE, name)]
    ids = _special_keys(source, companions, n_vocab, replace(special, texts={**source.roles.texts, **special.texts}))
    texts, types, scores = tokens.packed()
    keys.append(KeyValue.array(Keys.Tokenizer.LIST, texts))
    if scores is not None:
        keys.append(KeyValue.array(Keys.Tokenizer.SCORES, scores))
    keys.append(KeyValue.array(Keys.Tokenizer.TOKEN_TYPE, types))
    if source.model == "gpt2" and source.merges is not None:
        keys.append(KeyValue.array(Keys.Tokenizer.MERGES, source.merges.lines))
    of_chat, warnings = chat_template_keys(companions, templates)
    return Vocabulary((*keys, *ids, *of_chat), (*tokens.warnings, *warnings))


@dataclass(slots=True)
class _Source:
    """A tokenizer that llama.cpp supports: model `gpt2` is byte-level BPE, `llama` SentencePiece BPE."""

    model: str
    tokens: TokenList
    tokenizer: TokenizerJson | None
    add_space_prefix: bool = True
    roles: SpecialTokens = NO_SPECIAL_TOKENS  # special tokens that the file format itself defines

    @property
    def merges(self) -> Merges | None:
        return self.tokenizer.merges if self.tokenizer else None


def _read_source(companions: Companions, n_vocab: int) -> _Source:
    files = companions.files
    path, model_path = files.find(TOKENIZER_JSON), files.find(SENTENCEPIECE_MODEL)
    tokenizer = None
    if not path.exists() and files.find(TEKKEN).exists():  # takes precedence over tokenizer.model, as in mistral-common
        return _read_tekken(files.find(TEKKEN), companions, n_vocab)
    if model_path.exists():
        # Llama 3 has a byte-level tokenizer.json beside a tokenizer.model that is not SentencePiece.
        tokenizer = read_tokenizer_json(path, n_vocab, tokens=False) if path.exists() else None
        if tokenizer is None or not _is_byte_level(tokenizer):
            fast = FastTokens(read_tokenizer_json(path, n_vocab, merges=False), n_vocab) if tokenizer else None
            model = read_sentencepiece_model(model_path, n_vocab)
            added = tokenizer.added if tokenizer else ()
            tokens = sentencepiece_tokens(model, companions, added, n_vocab)
            difference = fast.difference(tokens, len(model.texts)) if fast and fast.has_tokens else None
            if difference is None:
                return _Source("llama", tokens, tokenizer, model.add_dummy_prefix)
            del model, tokens
            return _read_fast(path, companions, n_vocab, difference)
    if not path.exists():
        problem = f"no tokenizer: neither {TOKENIZER_JSON} nor {SENTENCEPIECE_MODEL} nor {TEKKEN}"
        hint = "download the tokenizer files too; for a slow tokenizer, save_pretrained makes a tokenizer.json"
        raise SourceError(problem, file=files.folder, hint=hint, code="tokenizer-missing")
    return _read_fast(path, companions, n_vocab)


def _read_tekken(path: Place, companions: Companions, n_vocab: int) -> _Source:
    tokenizer = read_tekken(path, n_vocab)
    tokens = byte_level_tokens(tokenizer, companions, n_vocab)
    tokens.scores = np.zeros(
        n_vocab, dtype=np.float32
    )  # llama.cpp's converter writes them, though no loader needs them
    return _Source("gpt2", tokens, tokenizer, roles=TEKKEN_ROLES)


def _read_fast(path: Place, companions: Companions, n_vocab: int, difference: str | None = None) -> _Source:
    """The tokenizer in a tokenizer.json; `difference` describes why the tokenizer.model beside it is ignored."""
    if difference is None:
        return _read_json(path, companions, n_vocab)
    try:
        source = _read_json(path, companions, n_vocab)
    except SourceError as error:
        problem = f"the two tokenizers differ: {difference}; {error.message}"
        hint = f"remove the one that the model was not trained with; transformers reads {TOKENIZER_JSON}"
        raise SourceError(problem, file=path, hint=hint, code="tokenizers-differ") from None
    message = f"{SENTENCEPIECE_MODEL} was ignored, since transformers reads {TOKENIZER_JSON}: {difference}"
    source.tokens.warnings.append(RunWarning("tokenizers-differ", message))
    return source


def _read_json(path: Place, companions: Companions, n_vocab: int) -> _Source:
    tokenizer = read_tokenizer_json(path, n_vocab)
    merges = _check_supported(tokenizer)
    if _is_byte_level(tokenizer):
        return _Source("gpt2", byte_level_tokens(tokenizer, companions, n_vocab), tokenizer)
    if not tokenizer.model.get("byte_fallback"):
        problem = "a character-level BPE (no ByteLevel step, no byte_fallback); llama.cpp supports only byte-level BPE"
        raise SourceError(
            problem,
            file=path,
            hint=f"if the model has a {SENTENCEPIECE_MODEL}, put it beside tokenizer.json",
            code="tokenizer-unsupported",
        )
    prefix = space_prefix(tokenizer.parts["normalizer"], tokenizer.parts["pre_tokenizer"])
    if prefix is None:
        hint = f"put the model's {SENTENCEPIECE_MODEL} beside tokenizer.json"
        raise SourceError(
            "the normalizer and pre-tokenizer are not those of a Llama tokenizer",
            file=path,
            hint=hint,
            code="tokenizer-unsupported",
        )
    tokens = byte_fallback_tokens(tokenizer, merges, companions, n_vocab)
    if fault := space_fault(tokenizer.parts["pre_tokenizer"]):
        message = f"llama.cpp inserts a space {fault}, but the tokenizer (Metaspace) does not"
        tokens.warnings.append(RunWarning("space-prefix", message))
    return _Source("llama", tokens, tokenizer, prefix)


def _is_byte_level(tokenizer: TokenizerJson) -> bool:
    return is_byte_level(tokenizer.parts["pre_tokenizer"]) or is_byte_level(tokenizer.parts["decoder"])


def _check_supported(tokenizer: TokenizerJson) -> Merges:
    if tokenizer.model_type != "BPE":
        problem = f"tokenizer model {shown(tokenizer.model_type)} is not supported; BPE and SentencePiece are"
        raise SourceError(
            problem,
            file=tokenizer.path,
            hint=f"if the model has a {SENTENCEPIECE_MODEL}, put it beside tokenizer.json",
            code="tokenizer-unsupported",
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if tokenizer.model.get(name):
            raise SourceError(
                f"the tokenizer model uses {name!r}, which llama.cpp does not support",
                file=tokenizer.path,
                code="tokenizer-unsupported",
            )
    for name in ("byte_fallback", "ignore_merges"):
        if not isinstance(tokenizer.model.get(name, False), bool | None):
            problem = f"{name!r} is {shown(tokenizer.model[name])}; it must be true or false"
            raise SourceError(problem, file=tokenizer.path, code="tokenizer-malformed")
    if not tokenizer.vocab or tokenizer.merges is None:
        raise SourceError(
            "the tokenizer model has no vocabulary or no merges", file=tokenizer.path, code="tokenizer-unsupported"
        )
    return tokenizer.merges


def _pre_tokenizer(source: _Source, default_pre: str | None, pre: str | None) -> str:
    """The name for `tokenizer.ggml.pre`; warnings are added to those of the tokens."""
    tokenizer, merges, tokens = source.tokenizer, source.merges, source.tokens
    assert tokenizer is not None and merges is not None
    ignore_merges = bool(tokenizer.model.get("ignore_merges"))
    found = identify(
        tokenizer.parts["pre_tokenizer"],
        tokenizer.parts["normalizer"],
        ignore_merges,
        file=tokenizer.path,
        default=default_pre,
        override=pre,
    )
    tokens.warnings += found.warnings
    if found.ignore_merges not in (None, ignore_merges):
        unmade = [
            tokens.texts[id_] or b"" for id_ in np.flatnonzero((merges.ranks < 0) & (tokens.types == TokenType.NORMAL))
        ]
        n_words = sum(len(text.decode("utf-8")) > 1 for text in unmade)
        if n_words:
            state = "ignores" if found.ignore_merges else "follows"
            message = (
                f"llama.cpp {state} merges with {found.name!r}, unlike the file; no merge makes {n_words} of the tokens"
            )
            tokens.warnings.append(RunWarning("ignore-merges", message))
    return found.name


def _special_keys(source: _Source, companions: Companions, n_vocab: int, special: SpecialTokens) -> list[KeyValue]:
    tokens, tokenizer = source.tokens, source.tokenizer
    roles = find_roles(companions, tokenizer.parts["post_processor"] if tokenizer else None)
    wanted = {_encoded(text) for text in (*roles.texts.values(), *special.texts.values(), *END_TEXTS)}
    added = {token.text: token.id for token in tokenizer.added if token.text in wanted} if tokenizer else {}

    def find_any(text: str) -> int | None:
        return tokens.ids.get(_encoded(text))

    def find_added(text: str) -> int | None:
        raw = _encoded(text)
        return tokens.ids.get(raw, added[raw]) if raw in added else None

    lookups = Tokens(n_vocab, find_added, find_any, lambda id_: tokens.texts[id_] is not None)
    ids, warnings = find_ids(roles, companions, lookups, special)
    tokens.warnings += warnings
    adds = roles.add
    if source.model == "gpt2" or (tokenizer is not None and tokenizer.vocab):
        adds.setdefault("bos", False)  # for some pre-tokenizers llama.cpp would add one by default
    for role in ("bos", "eos") if source.model == "gpt2" else ():
        if role not in ids:
            adds[role] = False
            message = f"no file names the {role} token, so llama.cpp uses token 11"
            tokens.warnings.append(RunWarning("special-token-missing", message))
    keys = [KeyValue.u32(ID_KEYS[role], id_) for role, id_ in ids.items()]
    keys += [KeyValue.boolean(key, adds[role]) for role, key in ADD_KEYS.items() if role in adds]
    prefix = companions.tokenizer_config.get("add_prefix_space")
    if source.model == "llama" and isinstance(prefix, bool) and prefix != source.add_space_prefix:
        message = (
            f"add_prefix_space is {prefix} in tokenizer_config.json, unlike the tokenizer itself; {prefix} was written"
        )
        tokens.warnings.append(RunWarning("space-prefix", message))
    if isinstance(prefix, bool):
        keys.append(KeyValue.boolean(Keys.Tokenizer.ADD_PREFIX, prefix))
    elif not source.add_space_prefix:
        keys.append(KeyValue.boolean(Keys.Tokenizer.ADD_PREFIX, False))
    return keys


def _encoded(text: str) -> bytes:
    """`text` as bytes for a lookup. Half of a surrogate pair encodes to bytes that no token has."""
    return text.encode("utf-8", "surrogatepass")
