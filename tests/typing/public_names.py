"""Right and wrong uses of the public names, for type checkers; nothing here is run.

Every line that a checker must refuse ends with an ignore for it: an ignore that is not needed is an error of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import assert_type

import streamconv
from streamconv import (
    Blob,
    BudgetError,
    Caution,
    DestinationError,
    Identity,
    Interrupted,
    Report,
    RunWarning,
    SourceError,
    SplitOptions,
    Store,
    StreamconvError,
    UsageError,
    VerifyError,
)


class Bucket(Store):
    """A store of a caller's own."""

    name = "bucket"

    def names(self, folder: str = "") -> Iterable[str]:
        return ["model.safetensors"]

    def open(self, name: str) -> Blob:
        raise SourceError("not here", file=name, code="source-missing")


class Half(Store):
    """Names nothing, so that it cannot be made."""

    name = "half"

    def open(self, name: str) -> Blob:
        raise NotImplementedError


def right_calls(store: Store, where: Path) -> None:
    report = streamconv.convert("model", where / "m.gguf", outtype="q8_0", verify=True, max_memory="96MiB", threads=2)
    assert_type(report, Report)
    streamconv.convert(where)
    streamconv.convert(store, None, adapters=["a", (where, 0.5)], split=SplitOptions(max_nbytes=1 << 30))
    streamconv.convert(Bucket(), progress=lambda done, total: None, cancel=lambda: False, recipes=[where, "r.py"])
    assert_type(streamconv.convert_adapter("adapter", base="base.gguf", dst=where, scale=2), Report)
    assert_type(streamconv.convert_adapter("adapter"), Report)
    assert_type(streamconv.quantize("m.gguf", outtype="q4_k_m", tensor_type=["attn=q8_0"]), Report)
    assert_type(streamconv.verify(where, "model", adapters=("a",), base=None), Report)
    assert_type(streamconv.inspect("m.gguf").problems[0].code, str)
    assert_type([one.nbytes for one in streamconv.quants("model").quants], list[int])


def right_results(report: Report) -> None:
    assert_type(report.output, Path)
    assert_type(report.nbytes, int)
    assert_type(report.verified, bool | None)
    assert_type(report.warnings, list[RunWarning])
    assert_type(report.warnings[0].tensor, str | None)
    assert_type(report.outputs[0].sha256, str | None)
    assert_type(report.beside, Sequence[Path])
    assert_type({name: total.nbytes for name, total in report.types.items()}, dict[str, int])
    caution: Caution = report.warnings[0]
    assert_type(caution.code, str)


def right_errors() -> None:
    try:
        streamconv.convert("model")
    except (SourceError, BudgetError, DestinationError, VerifyError, UsageError, Interrupted) as error:
        assert_type(error.code, str)
    except StreamconvError as error:
        assert_type(error.exit_code, int)
        assert_type(error.file, str | None)
        assert_type(error.hint, str | None)
        problems: Sequence[Mapping[str, object]] = error.problems
        print(problems, Identity("tag").momentary)


def wrong_calls(report: Report) -> None:
    streamconv.convert()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    streamconv.convert(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    streamconv.convert("m", outtype=8)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    streamconv.convert("m", thread=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    streamconv.convert("m", threads="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    streamconv.convert("m", "o", True)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    streamconv.convert("m", split=4)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    streamconv.convert("m", adapters=[("a", "b")])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    streamconv.convert("m", progress=lambda done: None)  # type: ignore[arg-type, misc]  # pyright: ignore[reportArgumentType]
    streamconv.convert_adapter("a", scale="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    streamconv.verify("m.gguf")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    streamconv.verify("m.gguf", "m", outtype="f16")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    print(streamconv.nothing)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    print(report.size)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    SplitOptions("4G")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SourceError("no code")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Half()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
