"""The commands that make files, and the one that compares them: convert, lora, verify."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from streamconv.budget import MIB
from streamconv.cli.options import EXIT_CODES, add_command, add_options, src_path
from streamconv.cli.output import (
    error_lines,
    from_here,
    print_warnings,
    progress_of,
    say,
    show_report,
    shown_progress,
)
from streamconv.errors import DestinationError
from streamconv.options import arguments

if TYPE_CHECKING:
    from streamconv.report import Report

VERIFYING = "verifying"


def add_convert(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        help="convert a checkpoint to a GGUF file",
        description="Convert a Hugging Face checkpoint to a GGUF file.",
        epilog="example:\n  streamconv convert LFM2-1.2B -o LFM2-1.2B-Q8_0.gguf --outtype q8_0\n\n" + EXIT_CODES,
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        type=src_path,
        help="the checkpoint: a folder with config.json and *.safetensors, one such file (if sharded, the first), "
        "an index, or a repo id in the cache",
    )
    add_options(parser, "convert", output="Name-1.2B-BF16.gguf")
    parser.set_defaults(run=_convert)


def add_lora(commands: Any) -> None:
    parser = add_command(
        commands,
        "lora",
        help="convert a LoRA adapter to a GGUF adapter",
        description="Convert a PEFT or MLX LoRA adapter to a GGUF adapter.",
        epilog="example:\n  streamconv lora my-adapter --base Llama-3.2-1B.gguf -o my-adapter.gguf\n\n" + EXIT_CODES,
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        type=src_path,
        help="folder with adapter_config.json and the weights, or the file of weights, such as "
        "0000100_adapters.safetensors",
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        type=src_path,
        help="the base's GGUF or folder; default: the one that adapter_config.json names, from the cache",
    )
    add_options(parser, "lora", output="Name-F32-LoRA.gguf")
    parser.set_defaults(run=_lora)


def add_quantize(commands: Any) -> None:
    parser = add_command(
        commands,
        "quantize",
        help="quantise a GGUF file",
        description="Quantise a GGUF file or a split set, as llama-quantize does.",
        epilog="example:\n  streamconv quantize LFM2-1.2B-BF16.gguf --outtype q4_k_m\n\n" + EXIT_CODES,
    )
    parser.add_argument("src", metavar="IN", type=src_path, help="the GGUF file, or the first part of a split")
    add_options(parser, "quantize", output="Name-Q4_K_M.gguf of Name-BF16.gguf")
    parser.set_defaults(run=_quantize)


def add_verify(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        help="compare a GGUF file, whichever tool wrote it, with its source",
        description="Compute every tensor again from its source and compare. What changes a result is an error, exit 6 "
        "with the first difference; other differences of keys, such as the chat template, are warnings. "
        "With --error, measure how far the file is from its source instead, to choose a type.",
        epilog="example:\n  streamconv verify LFM2-1.2B-Q8_0.gguf --source LFM2-1.2B\n\n" + EXIT_CODES,
    )
    parser.add_argument("out", metavar="OUT", type=src_path, help="the GGUF file")
    parser.add_argument(
        "--source",
        metavar="SRC",
        type=src_path,
        required=True,
        help="the checkpoint, GGUF file or adapter that it was made from",
    )
    add_options(parser, "verify")
    parser.set_defaults(run=_verify)


def _convert(options: argparse.Namespace) -> int:
    from streamconv.api.convert_model import convert

    return _run(options, lambda words: convert(options.src, options.output, **words))


def _quantize(options: argparse.Namespace) -> int:
    from streamconv.api.quantize_file import quantize

    return _run(options, lambda words: quantize(options.src, options.output, **words))


def _lora(options: argparse.Namespace) -> int:
    from streamconv.api.convert_lora import convert_adapter

    return _run(options, lambda words: convert_adapter(options.adapter, options.base, options.output, **words))


def _verify(options: argparse.Namespace) -> int:
    from streamconv.api.verify_file import verify

    with shown_progress(progress_of(options), VERIFYING) as progress:
        report = verify(options.out, options.source, **arguments("verify", vars(options) | {"progress": progress}))
    report.seconds = time.monotonic() - options.started
    print_warnings(report)
    if options.json:
        say(json.dumps(report.to_json()))
    elif options.quiet:
        return 0
    elif report.errors is not None:
        for line in error_lines(report.output, report.errors):
            say(line)
        for path in report.beside:
            say(from_here(f"wrote {path}"))
    else:
        n = f"{report.n_tensors} of {report.n_tensors}"
        told = f", {len(report.warnings)} warnings" if report.warnings else ""
        merged = f" with {' and '.join(report.adapters)} merged" if report.adapters else ""
        say(f"verified {report.output}: {n} tensors match {options.source}{merged}{told}")
        say(f"{report.seconds:.1f} s, peak resident memory {report.peak_rss_nbytes / MIB:.1f} MiB")
    return 0


def _run(options: argparse.Namespace, work: Callable[[Mapping[str, Any]], Report]) -> int:
    """Run one conversion with the given options and print its report."""
    from contextlib import nullcontext

    from streamconv.output.destination import resolve, write_text
    from streamconv.timing import Profile

    profile = Profile(options.profile) if options.profile else None
    with shown_progress(progress_of(options), "converting", VERIFYING) as progress, profile or nullcontext():
        given = vars(options) | {"progress": progress, "profile": profile}
        report = work(arguments(options.command, given))
    if profile is not None:
        try:
            write_text(resolve(options.profile), json.dumps(profile.as_json()) + "\n", replaces=options.force)
        except DestinationError as error:  # the run is complete, so a hint about continuing would be wrong
            error.hint = None if options.dry_run else f"{report.output} is complete, only the profile is missing"
            raise
    report.seconds = time.monotonic() - options.started  # includes imports and planning
    show_report(report, options)
    return 0
