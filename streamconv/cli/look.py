"""The commands that only look: inspect, architectures, draft."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamconv.cli.options import EXIT_CODES, add_command, add_recipes, add_verbose, positive, src_path
from streamconv.cli.output import print_stderr, say
from streamconv.errors import SourceError, printable

SCHEMA = 1  # of `architectures --json`
LIBRARIES = ("numpy", "safetensors", "gguf", "tqdm", "psutil", "huggingface_hub")
FEATURES = ("avx", "f16c", "fma", "avx2", "avx512f", "avx512_bf16", "asimd", "sve")  # as /proc/cpuinfo has them
SHELLS = ("bash", "zsh", "fish")
DENSE, EXPERTS = "dense", "mixture of experts"


def add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        help="show the contents of a GGUF file, a checkpoint or an adapter",
        description="Show keys, types, tensors and problems; for a checkpoint, also what it converts to.",
        epilog="example:\n  streamconv inspect LFM2-1.2B-Q8_0.gguf --tensors --head 20\n\n" + EXIT_CODES,
    )
    parser.add_argument("path", metavar="PATH", type=src_path, help="a .gguf or .safetensors file, a folder, a repo id")
    parser.add_argument("--tensors", action="store_true", help="also print a line for each tensor")
    parser.add_argument("--head", metavar="N", type=positive, help="show at most N keys and N tensors")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, with everything")
    add_recipes(parser)
    add_verbose(parser)
    parser.set_defaults(run=_inspect)


def add_quants(commands: Any) -> None:
    parser = add_command(
        commands,
        "quants",
        help="list the file size in each outtype",
        description="List every outtype with the file size and the bits per weight. No weights are read.",
        epilog="example:\n  streamconv quants LFM2-1.2B\n\n" + EXIT_CODES,
    )
    parser.add_argument(
        "src", metavar="SRC", type=src_path, help="the checkpoint, as for convert; or a GGUF file, as for quantize"
    )
    parser.add_argument(
        "--adapter",
        metavar="PATH[=WEIGHT]",
        dest="adapters",
        action="append",
        default=[],
        help="an adapter that would be merged; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_recipes(parser)
    add_verbose(parser)
    parser.set_defaults(run=_quants)


def add_architectures(commands: Any) -> None:
    parser = add_command(
        commands,
        "architectures",
        help="list the supported architectures",
        description="List the supported architectures: GGUF's name, then the names in config.json.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_recipes(parser)
    add_verbose(parser)
    parser.set_defaults(run=_architectures)


def add_draft(commands: Any) -> None:
    parser = add_command(
        commands,
        "draft",
        help="draft a recipe for an architecture that is not supported yet",
        description="Print a recipe module drafted from a checkpoint's names, shapes and config, with open TODOs.",
        epilog="example:\n  streamconv draft Some-New-1B > new.py\n"
        "  streamconv convert Some-New-1B --recipe new.py\n\n"
        "docs/adding-an-architecture.md describes the next steps.\n\n" + EXIT_CODES,
    )
    parser.add_argument("src", metavar="SRC", type=src_path, help="the checkpoint")
    add_verbose(parser)
    parser.set_defaults(run=_draft)


def add_completion(commands: Any) -> None:
    parser = add_command(
        commands,
        "completion",
        help="print a shell's completion script",
        description="Print the script that makes a shell complete commands and options.",
        epilog='examples:\n  eval "$(streamconv completion bash)"       # in ~/.bashrc, or zsh in ~/.zshrc\n'
        "  streamconv completion fish > ~/.config/fish/completions/streamconv.fish\n\n" + EXIT_CODES,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    add_verbose(parser)
    parser.set_defaults(run=_completion)


def _inspect(options: argparse.Namespace) -> int:
    from streamconv.api.inspect_file import inspect
    from streamconv.cli.inspection import render, terminal_width

    found = inspect(options.path, recipes=options.recipes or ())
    # Problems of an adapter concern the GGUF adapter; it may still be merged.
    code = SourceError.exit_code if found.problems and found.kind != "adapter" else 0
    if options.json:
        say(json.dumps(found.to_json()))
        return code
    for line in render(found, width=terminal_width(), tensors=options.tensors, head=options.head):
        say(line)
    return code


def _quants(options: argparse.Namespace) -> int:
    from streamconv.api.list_quants import quants
    from streamconv.cli.inspection import terminal_width
    from streamconv.lora.specs import parse_adapter

    adapters = [parse_adapter(text) for text in options.adapters]
    found = quants(options.src, adapters=adapters, recipes=options.recipes or ())
    if options.json:
        say(json.dumps(found.to_json()))
        return 0
    width = terminal_width()
    say(f"{found.architecture}, {found.n_parameters:,} parameters"[:width])
    say(f"{'outtype':<9}{'bytes':>17}{'bits a weight':>15}  tensors")
    for one in found.quants:
        if one.problem is not None:
            line = f"{one.outtype:<9}{'-':>17}{'-':>15}  {one.problem}"
        else:
            types = ", ".join(f"{n} {name}" for name, n in (one.types or {}).items())
            line = f"{one.outtype:<9}{one.nbytes:>17,}{one.bits_per_weight:>15.2f}  {types}"
        say(line if len(line) <= width else f"{line[: width - 3]}...")
    return 0


def _architectures(options: argparse.Namespace) -> int:
    from streamconv.recipe.operation import N_EXPERTS
    from streamconv.recipe.registry import all_recipes, installed_recipes, using_recipes

    with using_recipes(options.recipes or ()):
        rows = [
            {
                "architecture": recipe.arch,
                "names": list(recipe.hf_names),
                "description": recipe.description,
                "group": EXPERTS if N_EXPERTS in recipe.dims else DENSE,
                "origin": recipe.origin,
            }
            for recipe in all_recipes()
        ]
    for broken in installed_recipes().broken:
        print_stderr(printable(f"streamconv: warning: could not be loaded: {broken}"))
    if options.json:
        say(json.dumps({"schema": SCHEMA, "architectures": rows}))
        return 0
    width = max(len(str(row["architecture"])) for row in rows)
    for group in (DENSE, EXPERTS):
        say(f"{group}:")
        for row in rows:
            if row["group"] == group:
                origin = f" (from {str(row['origin']).partition(' ')[0]})" if row["origin"] else ""
                say(f"  {row['architecture']:<{width}}  {row['description']}{origin}")
                say(f"  {'':<{width}}  {', '.join(row['names'])}")
    return 0


def _completion(options: argparse.Namespace) -> int:
    from streamconv.cli.shells import text_for

    say(text_for(options.shell), end="")
    return 0


def _draft(options: argparse.Namespace) -> int:
    from streamconv.files.hub import find_source
    from streamconv.recipe.draft import draft

    say(draft(find_source(options.src)), end="")
    return 0


def environment() -> Iterator[str]:
    """Return facts that affect speed and belong in a bug report."""
    from importlib.metadata import PackageNotFoundError, version

    from streamconv.ggml import blocks, encode

    kernels = {"floats": encode.best_kernel().name, "blocks": blocks.best_kernel().name}
    yield "kernels: " + ", ".join(f"{name} {'compiled' if by == 'c' else by}" for name, by in kernels.items())
    yield f"CPU: {platform.machine()}, {os.cpu_count()} threads, {' '.join(_cpu_features()) or 'features unknown'}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def _cpu_features() -> list[str]:
    """Those of FEATURES that Linux lists; empty on other systems."""
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                return [name for name in FEATURES if name in line.split()]
    return []
