"""The commands that make files, and the one that compares them: convert, lora, verify."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streamconv.cli.options import (
    DIALECTS,
    EXIT_CODES,
    add_adapter_option,
    add_command,
    add_output_options,
    add_report_options,
    add_resource_options,
    add_run_options,
    add_split_options,
    add_tokenizer_option,
    src_path,
)
from streamconv.cli.output import progress_bar, say, show_report, tell_warnings
from streamconv.errors import DestinationError

if TYPE_CHECKING:
    from streamconv.engine.job import RunKeywords
    from streamconv.engine.split import SplitOptions
    from streamconv.report import Report

VERIFYING = "verifying"


def add_convert(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        help="a checkpoint becomes a GGUF file",
        description="Write the GGUF file of a Hugging Face checkpoint.",
        epilog="example:\n  streamconv convert LFM2-1.2B -o LFM2-1.2B-Q8_0.gguf --outtype q8_0\n\n" + EXIT_CODES,
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        type=src_path,
        help="the checkpoint: the folder of config.json and *.safetensors, one such file (of shards the first), "
        "an index, or a repo id in the cache",
    )
    parser.add_argument("--pre", metavar="NAME", help="tokenizer.ggml.pre, where the tokenizer's structure is unknown")
    add_adapter_option(parser, "merge this LoRA or DoRA adapter into the weights; may be repeated")
    add_tokenizer_option(parser, "whose tokenizer a merged model gets; default: the trained one, where its tokens fit")
    add_output_options(
        parser,
        example="Name-1.2B-BF16.gguf",
        auto="the source's own 16-bit type",
        dialect="tensor names; the default is the one to use with Ollama too, "
        "ollama-legacy is for its first LFM2 release",
    )
    add_split_options(parser)
    add_run_options(parser)
    parser.set_defaults(run=_convert)


def add_lora(commands: Any) -> None:
    parser = add_command(
        commands,
        "lora",
        help="a LoRA adapter becomes a GGUF adapter",
        description="Write the GGUF adapter of a PEFT or MLX LoRA adapter.",
        epilog="example:\n  streamconv lora my-adapter --base Llama-3.2-1B.gguf -o my-adapter.gguf\n\n" + EXIT_CODES,
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        type=src_path,
        help="the folder of adapter_config.json and its weights, or those weights, as 0000100_adapters.safetensors",
    )
    parser.add_argument(
        "--base", metavar="BASE", type=src_path, required=True, help="the base model: its GGUF or its folder"
    )
    parser.add_argument("--scale", metavar="S", type=float, help="the scale of every module, instead of the config's")
    add_output_options(
        parser,
        example="Name-F32-LoRA.gguf",
        auto="each factor's own type",
        dialect="the default is the one to use with Ollama too; ollama-legacy reproduces what its first LFM2 release "
        "wrote for Llama, which does not compute the trained adapter (it takes no --outtype, --scale or --name)",
        outtype=None,
    )
    add_run_options(parser)
    parser.set_defaults(run=_lora)


def add_verify(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        help="compare a GGUF file, by whatever tool, with its source",
        description="Make every tensor again from its source and compare; exit 6 names the first difference.",
        epilog="example:\n  streamconv verify LFM2-1.2B-Q8_0.gguf --source LFM2-1.2B\n\n" + EXIT_CODES,
    )
    parser.add_argument("out", metavar="OUT", type=src_path, help="the GGUF file")
    parser.add_argument(
        "--source", metavar="SRC", type=src_path, required=True, help="the checkpoint or adapter it was made of"
    )
    add_adapter_option(parser, "an adapter that was merged, with its weight; may be repeated")
    parser.add_argument("--base", metavar="BASE", type=src_path, help="of an adapter: the base it was made for")
    parser.add_argument("--scale", metavar="S", type=float, help="of an adapter: the scale it was made with")
    parser.add_argument("--dialect", choices=DIALECTS, default=DIALECTS[0], help="the dialect it was made with")
    parser.add_argument("--pre", metavar="NAME", help="the tokenizer.ggml.pre that it was made with")
    add_tokenizer_option(parser, "the tokenizer that it was made with")
    group = parser.add_argument_group("run")
    add_resource_options(group)
    add_report_options(group)
    parser.set_defaults(run=_verify)


def _convert(options: argparse.Namespace) -> int:
    from streamconv.api.convert_model import convert
    from streamconv.lora.merge import parse_adapter

    return _run(
        options,
        lambda keywords: convert(
            options.src,
            options.output,
            outtype=options.outtype,
            dialect=options.dialect,
            name=options.name,
            pre=options.pre,
            tokenizer=options.tokenizer,
            split=_split(options),
            adapters=[parse_adapter(text) for text in options.adapters],
            **keywords,
        ),
    )


def _split(options: argparse.Namespace) -> SplitOptions:
    from streamconv.budget import parse_size
    from streamconv.engine.split import SplitOptions

    max_nbytes = None if options.split_max_size is None else parse_size(options.split_max_size)
    return SplitOptions(max_nbytes, options.split_max_tensors, options.only_part)


def _lora(options: argparse.Namespace) -> int:
    from streamconv.api.convert_lora import convert_adapter

    return _run(
        options,
        lambda keywords: convert_adapter(
            options.adapter,
            options.base,
            options.output,
            outtype=options.outtype,
            dialect=options.dialect,
            scale=options.scale,
            name=options.name,
            **keywords,
        ),
    )


def _verify(options: argparse.Namespace) -> int:
    from streamconv.api.verify_file import verify
    from streamconv.lora.merge import parse_adapter

    with progress_bar(VERIFYING, is_wanted=not options.quiet) as progress:
        report = verify(
            options.out,
            options.source,
            adapters=[parse_adapter(text) for text in options.adapters],
            base=options.base,
            dialect=options.dialect,
            scale=options.scale,
            pre=options.pre,
            tokenizer=options.tokenizer,
            max_memory=options.max_memory,
            threads=options.threads,
            progress=progress,
        )
    tell_warnings(report)
    if options.json:
        say(json.dumps(report.to_json()))
    elif not options.quiet:
        say(f"{report.output}: all {report.n_tensors} tensors are what {options.source} says ({report.seconds:.1f} s)")
    return 0


def _run(options: argparse.Namespace, work: Callable[[RunKeywords], Report]) -> int:
    """Do one conversion with the options that all of them share, and say what was done."""
    from contextlib import nullcontext

    from streamconv.output.destination import resolve, write_text
    from streamconv.timing import Profile

    profile = Profile(options.profile) if options.profile else None
    is_shown = not (options.quiet or options.dry_run)
    with progress_bar("converting", VERIFYING, is_wanted=is_shown) as progress, profile or nullcontext():
        report = work(
            {
                "max_memory": options.max_memory,
                "threads": options.threads,
                "force": options.force,
                "resume": options.resume,
                "restart": options.restart,
                "dry_run": options.dry_run,
                "sha256": options.sha256,
                "modelfile": options.modelfile,
                "verify": options.verify,
                "progress": progress,
                "profile": profile,
                "io": options.io,
            }
        )
    if profile is not None:
        try:
            write_text(resolve(options.profile), json.dumps(profile.as_json()) + "\n", replaces=options.force)
        except DestinationError as error:  # the run is over: there is nothing to go on with, as the hint may say
            error.hint = None if options.dry_run else f"{report.output} is complete, the profile alone is missing"
            raise
    show_report(report, options)
    return 0
