"""llama.cpp itself as the judge of a GGUF file: its predictions, its tokens, whether it loads.

A llama.cpp server in this process (PyPI `xllamacpp`), set up so that its numbers can be compared at KL 1e-8: the KV
cache is F32, flash attention is off and one thread computes, so the same file gives the same numbers; log-probabilities
are renormalised in float64, as the server sums them in float32 (1e-7).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.extras import xllamacpp

Adapters = Iterable[tuple[Path | str, float]]

ALL_TOKENS = 1 << 24  # more probabilities than any vocabulary has; the server gives as many as there are
FORCING = 1000.0  # a logit bias that decides the sampled token and that reported probabilities do not see


class Runtime:
    """A model loaded by llama.cpp, adapters applied at runtime; a context manager. RuntimeError if it is refused.

    `gives`: "tokens"; or in their place "vectors", by the pooling that the file names; or "scores" of a reranker.
    """

    def __init__(
        self,
        gguf: Path | str,
        adapters: Adapters = (),
        *,
        mmproj: Path | str | None = None,
        n_ctx: int = 512,
        verbosity: int = -1,
        gives: str = "tokens",
    ) -> None:
        params = xllamacpp.CommonParams()
        if mmproj is not None:
            params.mmproj.path = str(mmproj)
            params.mmproj_use_gpu = False
        params.model.path = str(gguf)
        params.n_ctx = n_ctx
        params.n_parallel = 1
        params.embedding = gives != "tokens"
        if gives == "scores":
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
        params.warmup = False
        params.verbosity = verbosity
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), scale) for path, scale in adapters]
        self._server: Any = xllamacpp.Server(params)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        # A sampled token that is no complete UTF-8 comes without probabilities, so an ASCII one is sampled always.
        self._forced = self.tokenize("A")[-1]
        # A server that is dropped before its loop runs waits for it forever; an answer proves that it runs.
        match gives:
            case "tokens":
                self._post("completion", self._request("A", 1))
            case "vectors":
                self.vectors([0, 1])
            case _:
                self.scores("A", ["A"])

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server = None  # llama.cpp frees the model with its server

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; special tokens are found in it, and BOS is put before it only with `add_special`."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = self._post("tokenize", body)["tokens"]
        return tokens

    def vectors(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Vectors [1, width] of a text, or [tokens, width] where the file names no pooling; not normalised."""
        answer = self._post("embedding", {"content": list(ids), "embd_normalize": -1})
        return np.array(answer[0]["embedding"], dtype=np.float64)

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """How well each document answers the query, by a file that ranks; texts stand in the file's own template."""
        results = self._post("rerank", {"query": query, "documents": list(documents)})["results"]
        return [entry["relevance_score"] for entry in sorted(results, key=lambda entry: entry["index"])]

    def _get(self, route: str, data: bytes | None = None) -> Any:
        address = f"{self._server.listening_address}/{route}"
        with self._opener.open(urllib.request.Request(address, data, {"Content-Type": "application/json"})) as response:
            return json.load(response)

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        return self._get(route, json.dumps(body).encode())

    def logprobs_after_media(self, before: str, media: bytes, after: str) -> NDArray[np.float64]:
        """Natural log-probabilities [vocab] of the token after a text with an image (PNG) or a sound (WAV) in it."""
        marker = self._get("props")["media_marker"]
        prompt = {"prompt_string": before + marker + after, "multimodal_data": [base64.b64encode(media).decode()]}
        answer = self._post("completion", self._request(prompt, ALL_TOKENS))
        return _by_id(answer["completion_probabilities"][0]["top_logprobs"])

    def next_logprobs(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Natural log-probabilities [vocab] of the token after `ids`."""
        return _by_id(self._top(ids, ALL_TOKENS))

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The `n` tokens that follow `ids` when the likeliest is taken each time."""
        sequence = list(ids)
        for _ in range(n):
            sequence.append(self._top(sequence, 1)[0]["id"])
        return sequence[len(ids) :]

    def _top(self, ids: Sequence[int], n_probs: int) -> list[dict[str, Any]]:
        answer = self._server.handle_completions(self._request([list(ids)], n_probs))
        top: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return top

    def _request(self, prompt: Any, n_probs: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": n_probs,
            "temperature": 0.0,
            "cache_prompt": False,
            "logit_bias": [[self._forced, FORCING]],
        }


def _by_id(top: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Natural log-probabilities [vocab] of an answer that lists all tokens."""
    logprobs = np.full(len(top), -np.inf)
    logprobs[[entry["id"] for entry in top]] = [entry["logprob"] for entry in top]
    return normalized(logprobs)


def next_token_logprobs(
    gguf: Path | str,
    ids: Sequence[int],
    adapters: Adapters = (),
    positions: Sequence[int] | None = None,
    *,
    n_ctx: int = 512,
) -> NDArray[np.float64]:
    """Natural log-probabilities [positions, vocab], by default at all positions of `ids`.

    The row of position i follows ids[: i + 1], as row i of a model's logits does.
    """
    with Runtime(gguf, adapters, n_ctx=n_ctx) as runtime:
        return np.stack([runtime.next_logprobs(ids[: i + 1]) for i in positions or range(len(ids))])


def tokenize(gguf: Path | str, text: str, *, add_special: bool = False) -> list[int]:
    """Token ids that llama.cpp makes of `text` with the tokenizer inside `gguf`."""
    with Runtime(gguf) as runtime:
        return runtime.tokenize(text, add_special=add_special)


def greedy(gguf: Path | str, ids: Sequence[int], n: int, adapters: Adapters = ()) -> list[int]:
    """The `n` tokens that llama.cpp finds likeliest after `ids`, one after the other."""
    with Runtime(gguf, adapters) as runtime:
        return runtime.greedy(ids, n)


def normalized(logits: ArrayLike) -> NDArray[np.float64]:
    """Natural log-probabilities over the last axis, in float64, of logits (or of what does not quite sum to 1)."""
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl(logits: ArrayLike, logprobs: ArrayLike) -> float:
    """The largest KL(reference || candidate) of all positions, in nats; `logits` are the reference's."""
    p, q = normalized(logits), np.asarray(logprobs, dtype=np.float64)
    assert p.shape == q.shape, (p.shape, q.shape)
    return float(np.max(np.sum(np.exp(p) * (p - q), axis=-1)))


@dataclass(frozen=True)
class Outcome:
    """What became of a load in its own process: `loaded`, `refused` (llama.cpp said no) or `died` (it aborted)."""

    status: str
    log: str


def distance(reference: ArrayLike, vectors: ArrayLike) -> float:
    """The largest cosine distance of vectors [n, width] that are as long as the reference's; more where they are not.

    Half the square of their relative difference, in float64.
    """
    p, q = np.asarray(reference, dtype=np.float64), np.asarray(vectors, dtype=np.float64)
    assert p.shape == q.shape, (p.shape, q.shape)
    return float(np.max(np.sum((p - q) ** 2, axis=-1) / np.sum(p**2, axis=-1))) / 2


def load(gguf: Path | str, adapters: Adapters = (), *, gives: str = "tokens") -> Outcome:
    """Load and run `gguf` in another process, since llama.cpp aborts on some files instead of refusing them."""
    arguments = [gives, str(gguf), *(f"{path}={scale}" for path, scale in adapters)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.runtime", *arguments],
        cwd=root,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # an abort else starts a debugger for seconds
        capture_output=True,
        text=True,
        errors="replace",
    )
    return Outcome({0: "loaded", 3: "refused"}.get(done.returncode, "died"), done.stdout + done.stderr)


def _main(gives: str, gguf: str, *adapters: str) -> int:
    pairs = [(path, float(scale)) for path, _, scale in (adapter.rpartition("=") for adapter in adapters)]
    try:
        runtime = Runtime(gguf, pairs, verbosity=1, gives=gives)
    except RuntimeError as error:
        print(error)
        return 3
    if gives == "tokens":
        runtime.next_logprobs([0, 1])
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
