"""From the tokenizer files of a checkpoint to the `tokenizer.*` keys of a GGUF file.

Decides which kind of tokenizer a folder has. The keys depend only on the files and on the number of rows of the
embedding. A tokenizer that llama.cpp cannot run is a SourceError; one that it runs slightly differently is a warning.
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
    """The tokenizer in `directory` as keys, with `n_vocab` tokens, the embedding's rows.

    `over` is a folder whose files count before those of `directory`, as an adapter's before its base's. `default_pre`
    names the pre-tokenizer of an unknown structure (a warning), None makes that an error; `pre` is the user's own
    name for it; `special` is what the architecture says of special tokens, `templates`
    what it adds to those of the files. SourceError on anything missing, malformed
    or unsupported, UsageError on a `pre` that llama.cpp does not know.
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
    """A tokenizer that llama.cpp has a model for: `gpt2` is byte-level BPE, `llama` SentencePiece's BPE."""

    model: str
    tokens: TokenList
    tokenizer: TokenizerJson | None
    add_space_prefix: bool = True
    roles: SpecialTokens = NO_SPECIAL_TOKENS  # of tokens that the kind of file names itself

    @property
    def merges(self) -> Merges | None:
        return self.tokenizer.merges if self.tokenizer else None


def _read_source(companions: Companions, n_vocab: int) -> _Source:
    files = companions.files
    path, model_path = files.find(TOKENIZER_JSON), files.find(SENTENCEPIECE_MODEL)
    tokenizer = None
    if not path.exists() and files.find(TEKKEN).exists():  # before a tokenizer.model, as for mistral-common
        return _read_tekken(files.find(TEKKEN), companions, n_vocab)
    if model_path.exists():
        # A byte-level tokenizer beside a tokenizer.model is Llama 3's, whose tokenizer.model is not SentencePiece.
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
        hint = "download the tokenizer's files too; a slow tokenizer's become tokenizer.json by save_pretrained"
        raise SourceError(problem, file=files.folder, hint=hint, code="tokenizer-missing")
    return _read_fast(path, companions, n_vocab)


def _read_tekken(path: Place, companions: Companions, n_vocab: int) -> _Source:
    tokenizer = read_tekken(path, n_vocab)
    tokens = byte_level_tokens(tokenizer, companions, n_vocab)
    tokens.scores = np.zeros(n_vocab, dtype=np.float32)  # which llama.cpp's converter writes, and no loader needs
    return _Source("gpt2", tokens, tokenizer, roles=TEKKEN_ROLES)


def _read_fast(path: Place, companions: Companions, n_vocab: int, difference: str | None = None) -> _Source:
    """The tokenizer in a tokenizer.json. `difference`: from the tokenizer.model beside it, which is then left out."""
    if difference is None:
        return _read_json(path, companions, n_vocab)
    try:
        source = _read_json(path, companions, n_vocab)
    except SourceError as error:
        problem = f"the two tokenizers differ: {difference}; {error.message}"
        hint = f"remove the one that the model was not trained with; transformers reads {TOKENIZER_JSON}"
        raise SourceError(problem, file=path, hint=hint, code="tokenizers-differ") from None
    message = f"{SENTENCEPIECE_MODEL} was left out, as transformers reads {TOKENIZER_JSON}: {difference}"
    source.tokens.warnings.append(RunWarning("tokenizers-differ", message))
    return source


def _read_json(path: Place, companions: Companions, n_vocab: int) -> _Source:
    tokenizer = read_tokenizer_json(path, n_vocab)
    merges = _check_supported(tokenizer)
    if _is_byte_level(tokenizer):
        return _Source("gpt2", byte_level_tokens(tokenizer, companions, n_vocab), tokenizer)
    if not tokenizer.model.get("byte_fallback"):
        problem = "a BPE of characters, and llama.cpp has it of bytes alone: no ByteLevel step, and no byte_fallback"
        raise SourceError(
            problem,
            file=path,
            hint=f"where there is a {SENTENCEPIECE_MODEL}, put it beside",
            code="tokenizer-unsupported",
        )
    prefix = space_prefix(tokenizer.parts["normalizer"], tokenizer.parts["pre_tokenizer"])
    if prefix is None:
        hint = f"put the model's {SENTENCEPIECE_MODEL} beside it"
        raise SourceError(
            "normalizer and pre-tokenizer are not those of Llama's tokenizers",
            file=path,
            hint=hint,
            code="tokenizer-unsupported",
        )
    tokens = byte_fallback_tokens(tokenizer, merges, companions, n_vocab)
    if fault := space_fault(tokenizer.parts["pre_tokenizer"]):
        message = f"llama.cpp puts a space {fault}, where the tokenizer (Metaspace) puts none"
        tokens.warnings.append(RunWarning("space-prefix", message))
    return _Source("llama", tokens, tokenizer, prefix)


def _is_byte_level(tokenizer: TokenizerJson) -> bool:
    return is_byte_level(tokenizer.parts["pre_tokenizer"]) or is_byte_level(tokenizer.parts["decoder"])


def _check_supported(tokenizer: TokenizerJson) -> Merges:
    if tokenizer.model_type != "BPE":
        problem = f"a tokenizer model {shown(tokenizer.model_type)} is not supported, BPE and SentencePiece's are"
        raise SourceError(
            problem,
            file=tokenizer.path,
            hint=f"where there is a {SENTENCEPIECE_MODEL}, put it beside",
            code="tokenizer-unsupported",
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if tokenizer.model.get(name):
            raise SourceError(
                f"llama.cpp has no {name!r}, which the model has", file=tokenizer.path, code="tokenizer-unsupported"
            )
    for name in ("byte_fallback", "ignore_merges"):
        if not isinstance(tokenizer.model.get(name, False), bool | None):
            problem = f"{name!r} is {shown(tokenizer.model[name])}, which is true or false"
            raise SourceError(problem, file=tokenizer.path, code="tokenizer-malformed")
    if not tokenizer.vocab or tokenizer.merges is None:
        raise SourceError("the model has no vocabulary or no merges", file=tokenizer.path, code="tokenizer-unsupported")
    return tokenizer.merges


def _pre_tokenizer(source: _Source, default_pre: str | None, pre: str | None) -> str:
    """Its name; warnings go to the tokens'."""
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
                f"llama.cpp {state} merges under {found.name!r}, unlike the file; {n_words} tokens are made by none"
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
        adds.setdefault("bos", False)  # llama.cpp would add one under some names of pre-tokenizers
    for role in ("bos", "eos") if source.model == "gpt2" else ():
        if role not in ids:
            adds[role] = False
            message = f"no file names the {role} token, and llama.cpp takes token 11 for it"
            tokens.warnings.append(RunWarning("special-token-missing", message))
    keys = [KeyValue.u32(ID_KEYS[role], id_) for role, id_ in ids.items()]
    keys += [KeyValue.boolean(key, adds[role]) for role, key in ADD_KEYS.items() if role in adds]
    prefix = companions.tokenizer_config.get("add_prefix_space")
    if source.model == "llama" and isinstance(prefix, bool) and prefix != source.add_space_prefix:
        message = f"add_prefix_space in tokenizer_config.json is {prefix}, unlike the tokenizer itself: it is written"
        tokens.warnings.append(RunWarning("space-prefix", message))
    if isinstance(prefix, bool):
        keys.append(KeyValue.boolean(Keys.Tokenizer.ADD_PREFIX, prefix))
    elif not source.add_space_prefix:
        keys.append(KeyValue.boolean(Keys.Tokenizer.ADD_PREFIX, False))
    return keys


def _encoded(text: str) -> bytes:
    """A text to look for; one that is not UTF-8 is not a token."""
    return text.encode("utf-8", "surrogatepass")
