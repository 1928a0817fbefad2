"""docs/errors.md, made of the source: `make docs`, or `python -m tests.tools.error_docs`.

Every error, warning and problem is constructed with a literal code; this module finds them all, with the words that go
with them. `without_code` lists the constructions that have none.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from streamconv import errors

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "errors.md"
ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
WARNINGS = frozenset({"RunWarning", "Caveat"})
PROBLEMS = frozenset({"Problem", "FileProblem", "_problem", "_Unfit", "finding"})
# Functions that raise, or describe, an error for their callers, and the class of that error.
HELPERS = {
    "fail": "SourceError",
    "_malformed": "SourceError",
    "_bad_json": "SourceError",
    "refuse_all": "SourceError",
    "_Words": "DestinationError",
}
REASONS = "_REASONS"  # a table {code: words} of problems has a name that ends so
HOLE = "..."
HEAD = """# Errors, warnings and problems by code

Generated from the source by `make docs`. Codes are stable. Scripts should test `error.code` (also in `--json`), not
messages, which may change in any version. In the messages below, `...` stands for text that varies.

The library raises `StreamconvError` and its subclasses. A call can also raise `TypeError` for a wrong keyword,
`KeyboardInterrupt`, and any exception of the caller's own `progress` or `cancel`.
"""


@dataclass(frozen=True)
class Site:
    """Where a code is used: `of` is the class of an error, or one of WARNINGS or PROBLEMS."""

    code: str
    of: str
    words: str


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "streamconv").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def sites() -> Iterator[Site]:
    """Every literal code of the package."""
    for _, module in modules():
        for scope in _scopes(module):
            for call in _calls(_own(scope)):
                name = _name(call)
                words = next(iter(_arguments(call, name)), None)
                texts = [HOLE] if words is None else _texts(words, scope, call.lineno)
                for code in _codes(call, name):
                    yield from (Site(str(code.value), HELPERS.get(name, name), text) for text in texts)
        for node in ast.walk(module):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _is_table(node) else []
            if any(isinstance(one, ast.Name) and one.id.endswith(REASONS) for one in targets):
                assert isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    assert isinstance(key, ast.Constant)
                    yield from (Site(str(key.value), "Problem", text) for text in _texts(value, module, 0))


def without_code() -> list[str]:
    """Constructions of errors that neither have a literal code nor hand on one, as path:line."""
    found = []
    for path, module in modules():
        for call in _calls(ast.walk(module)):
            name = _name(call)
            if name in ERRORS or name in HELPERS:
                given = [word.value for word in call.keywords if word.arg == "code"]
                is_handed_on = any(ast.unparse(value).rstrip("]'").endswith("code") for value in given)
                if not is_handed_on and not _codes(call, name):
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    return found


def unknown_helpers() -> list[str]:
    """Functions that construct an error, a warning or a problem of a code they are given, and are not known here."""
    known = {*ERRORS, *HELPERS, *WARNINGS, *PROBLEMS}
    found = []
    for path, module in modules():
        owners = {
            id(child): one.name for one in ast.walk(module) if isinstance(one, ast.ClassDef) for child in one.body
        }
        for function in (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)):
            name = owners[id(function)] if function.name == "__init__" else function.name
            takes = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
            calls = (call for call in _calls(_own(function)) if _name(call) in known)
            values = (value for call in calls for value in (*call.args, *(word.value for word in call.keywords)))
            if "code" in takes and name not in known and any(ast.unparse(value) == "code" for value in values):
                found.append(f"{path.relative_to(ROOT)}: {name}")
    return found


def render() -> str:
    """The page."""
    by_kind: dict[str, list[Site]] = defaultdict(list)
    for site in sites():
        by_kind[_kind(site)].append(site)
    lines = [HEAD]
    codes = {kind: exit_code for kind, exit_code in _exit_codes() if kind in by_kind}
    for kind, exit_code in sorted(codes.items(), key=lambda item: item[1]):
        lines += [f"## {kind}: exit code {exit_code}", "", *_table(by_kind[kind]), ""]
    lines += ["## Warnings", "", "The result is complete. Warnings are in a report's `warnings`.", ""]
    lines += [*_table(by_kind["warning"]), "", "## Problems", ""]
    lines += ["Listed by `inspect`, and in the `problems` of an error with several causes.", ""]
    lines += [*_table(by_kind["problem"]), ""]
    return "\n".join(lines)


def _exit_codes() -> Iterator[tuple[str, int]]:
    for kind in ERRORS.values():
        assert issubclass(kind, errors.StreamconvError)
        if "exit_code" in vars(kind) and "kind" in vars(kind):
            yield kind.kind, kind.exit_code


def _kind(site: Site) -> str:
    if site.of in WARNINGS:
        return "warning"
    if site.of in PROBLEMS:
        return "problem"
    assert site.of in ERRORS, f"{site.of} takes a code: say in error_docs.py what it makes"
    kind = ERRORS[site.of]
    assert issubclass(kind, errors.StreamconvError)
    return kind.kind


def _table(found: list[Site]) -> Iterator[str]:
    words: dict[str, dict[str, None]] = defaultdict(dict)
    for site in found:
        words[site.code][site.words] = None
    yield from ("| code | message |", "|---|---|")
    for code in sorted(words):
        yield f"| `{code}` | {'<br>'.join(_escaped(text) for text in sorted(words[code]))} |"


def _escaped(text: str) -> str:
    for mark in "\\|*_`<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _is_table(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and node.value is not None


def _scopes(module: ast.Module) -> Iterator[ast.AST]:
    """The functions of a module, and the module itself without them."""
    yield module
    yield from (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope that are in no function inside it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _own(child)


def _calls(nodes: Iterable[ast.AST]) -> Iterator[ast.Call]:
    return (node for node in nodes if isinstance(node, ast.Call))


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _arguments(call: ast.Call, name: str) -> list[ast.expr]:
    """What may be the words, in order: the first argument of an error, that after the code of all else."""
    if name in WARNINGS or name in PROBLEMS:
        (literal,) = _codes(call, name) or [None]
        return call.args[call.args.index(literal) + 1 :] if literal in call.args else call.args
    if name == "_bad_json" and len(call.args) > 2:
        return call.args[2:]
    return call.args


def _codes(call: ast.Call, name: str) -> list[ast.Constant]:
    for word in call.keywords:
        if word.arg == "code":
            values = [word.value.body, word.value.orelse] if isinstance(word.value, ast.IfExp) else [word.value]
            return [value for value in values if isinstance(value, ast.Constant)]
    if name in WARNINGS or name in PROBLEMS:
        return [one for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)][:1]
    return []


def _texts(node: ast.expr, scope: ast.AST, line: int) -> list[str]:
    """The texts that an expression may be, with holes for what is not known."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, scope, line), *_texts(node.orelse, scope, line)]
    if isinstance(node, ast.BinOp):
        return [a + b for a in _texts(node.left, scope, line) for b in _texts(node.right, scope, line)][:1]
    if isinstance(node, ast.Name):
        assigned = [
            one
            for one in _own(scope)
            if isinstance(one, ast.Assign)
            and one.lineno < line
            and any(isinstance(target, ast.Name) and target.id == node.id for target in one.targets)
        ]
        if assigned:
            return _texts(assigned[-1].value, scope, assigned[-1].lineno)
    return [HOLE]


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
    sys.exit(0)
