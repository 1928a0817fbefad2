"""docs/coming-from.md: the options that it names as ours are there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from streamconv.cli.parser import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
# What the parsers of llama.cpp's tools have (llama-cpp-python 0.3.36, October 2026).
THEIRS = """
    --bigendian --disable-mistral-community-chat-template --dry-run --dspark --fp8-as-q8 --fuse-gate-up-exps
    --fuse-qkv --metadata --mistral-format --mmproj --model-name --mtp --no-lazy --no-mtp --no-nextn
    --no-tensor-first-split --outfile --outtype --print-supported-models --remote
    --sentence-transformers-dense-modules --split-max-size --split-max-tensors --target-model-dir
    --use-temp-file --verbose --vocab-only --base --base-model-id --trust-remote-code --allow-requantize
    --exclude-weights --imatrix --include-weights --keep-split --leave-output-tensor --max-buffer-size
    --output-tensor-type --override-kv --prune-layers --pure --tensor-type --tensor-type-file
    --token-embedding-type --lora --lora-scaled
"""
ROW = re.compile(r"\| (.+?) \| (.+) \|")


def test_every_option_of_ours_exists() -> None:
    (commands,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    known = {flag for parser in commands.choices.values() for flag in parser._option_string_actions}
    rows = [match.groups() for line in PAGE.read_text(encoding="utf-8").splitlines() if (match := ROW.fullmatch(line))]
    assert len(rows) > 30
    named = {(theirs, flag) for theirs, ours in rows for flag in re.findall(r"--[a-z][a-z0-9-]*", ours)}
    # "the same" stands for every option of the left column
    named |= {
        (theirs, flag)
        for theirs, ours in rows
        if ours.startswith("the same")
        for flag in re.findall(r"--[a-z][a-z0-9-]*", theirs)
    }
    assert {(theirs, flag) for theirs, flag in named if flag not in known} == set()


def test_every_option_of_theirs_is_named() -> None:
    left = " ".join(
        match[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if (match := ROW.fullmatch(line))
    )
    named = set(re.findall(r"--[a-z][a-z0-9-]*", left))
    assert [flag for flag in THEIRS.split() if flag not in named] == []
