"""Templates of tensor names, as in recipes, with `{i}` for the layer and `{e}` for the expert.

`{i}` counts the layers of the main stack, `{i:vision}` those of the stack named "vision". A number in a template
matches only itself: "projector.0.weight" is the first layer of a sequential module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

MAIN_STACK = ""  # the stack of "{i}"
NONE = -1  # the layer or expert of a name that has no such number

_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)")
_LAYER = re.compile(r"\{i(?::\w+)?\}")
_PLACEHOLDER = re.compile(r"\{(?:i(?::(\w+))?|(e))\}")


def match_name(name: str) -> tuple[str, tuple[int, ...]]:
    """Split a tensor's name into template and numbers: layers.3.experts.7.w1 is layers.{i}.experts.{e}.w1, (3, 7)."""
    numbers: list[int] = []

    def placeholder(match: re.Match[str]) -> str:
        numbers.append(int(match[0]))
        return ("{i}", "{e}", "{?}")[min(len(numbers) - 1, 2)]

    return _NUMBER.sub(placeholder, name), tuple(numbers)


def fill(template: str, i: int | None = None, e: int | None = None) -> str:
    """Return the name for layer `i` and expert `e`."""
    return _PLACEHOLDER.sub(lambda match: str(e if match[2] else i), template)


def stack_of(template: str) -> str | None:
    """Return the stack to which the layer in `template` belongs; None if it has no layer."""
    return next((match[1] or MAIN_STACK for match in _PLACEHOLDER.finditer(template) if not match[2]), None)


def has_experts(template: str) -> bool:
    return "{e}" in template


def template_fault(template: str) -> str | None:
    """Return why a template is invalid, or None."""
    found = [match[0] for match in _PLACEHOLDER.finditer(template)]
    rest = _PLACEHOLDER.sub("0", template)
    if "{" in rest or "}" in rest:
        return "has braces that are neither {i}, {i:STACK} nor {e}"
    parts = template.split(".")
    if any(_PLACEHOLDER.search(part) and not _PLACEHOLDER.fullmatch(part) for part in parts) or (
        _PLACEHOLDER.search(parts[0] + parts[-1])
    ):
        return "has a placeholder that is not between two dots"
    if len([one for one in found if one != "{e}"]) > 1 or found.count("{e}") > 1:
        return "has two placeholders of the same kind"
    return None


def number_after(beginning: str, name: str) -> int | None:
    """Return the layer of a name that starts like a template with one `{i}`, else None."""
    before, after = (re.escape(part) for part in _LAYER.split(beginning, maxsplit=1))
    match = re.match(rf"{before}(0|[1-9]\d{{0,5}}){after}", name)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class Found:
    """A parsed name: an instance of `template`, with layer `i` and expert `e` (NONE if it has none)."""

    template: str
    i: int
    e: int


class NameTable:
    """The templates of an architecture, by which names are parsed."""

    def __init__(self, templates: Iterable[str]) -> None:
        # By the name with "#" for every number: templates, and the placeholder or number at each "#".
        self._by_form: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        for template in dict.fromkeys(templates):
            slots: list[str] = []

            def number(match: re.Match[str], slots: list[str] = slots) -> str:
                slots.append(match[0])
                return "#"

            marked = _PLACEHOLDER.sub(lambda match: "{e}" if match[2] else "{i}", template)
            form = re.sub(rf"(?<=\.)(?:\{{[ie]\}}|{_NUMBER.pattern})(?=\.)", number, marked)
            self._by_form[form].append((template, tuple(slots)))

    def find(self, name: str) -> Found | None:
        """Return the template of `name`, or None; a template with a fixed number precedes one with a placeholder."""
        numbers: list[int] = []

        def number(match: re.Match[str]) -> str:
            numbers.append(int(match[0]))
            return "#"

        best = None
        for template, slots in self._by_form.get(_NUMBER.sub(number, name), ()):
            if len(slots) == len(numbers) and all(map(_takes, slots, numbers)):
                by_slot = dict(zip(slots, numbers, strict=True))
                found = Found(template, by_slot.get("{i}", NONE), by_slot.get("{e}", NONE))
                if best is None or (found.i != NONE, found.e != NONE) < (best.i != NONE, best.e != NONE):
                    best = found
        return best


def _takes(slot: str, number: int) -> bool:
    """Whether `number` matches a slot of a template: any number for a placeholder, otherwise only the fixed one."""
    return slot in ("{i}", "{e}") or int(slot) == number
