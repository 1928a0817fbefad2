"""Typed access to a model's config.json, which is not trusted: a value of the wrong type is an error that names it.

Every method returns None for a key that is absent or null, else a value of the requested type that fits a GGUF scalar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.errors import SourceError
from streamconv.files.store import Place
from streamconv.files.strict_json import load_object_if_present

MAX_INTEGER = (1 << 31) - 1  # the largest int32, the type of some of GGUF's integer keys
MAX_NUMBER = 3.4e38  # about the largest float32, the type of GGUF's float keys


class Config:
    """A JSON object of a model's config.

    All methods raise SourceError, naming the file and the key, if a value has another type or is out of range.

    Attributes:
        raw: The parsed object.
        file: The file, for messages.
        parent: The config of which this is a section, if it was made by `alone` or `within`.
    """

    def __init__(self, raw: Mapping[str, Any], file: Place, parent: Config | None = None) -> None:
        self.raw, self.file, self.parent = raw, file, parent

    def integer(self, key: str, minimum: int = 1) -> int | None:
        """A whole number from `minimum` to MAX_INTEGER."""
        value = self.raw.get(key)
        if value is None:
            return None
        if type(value) is not int or not minimum <= value <= MAX_INTEGER:
            raise self.wrong(key, f"a whole number from {minimum} to {MAX_INTEGER}")
        return value

    def number(self, key: str) -> float | None:
        """A number in the range of float32."""
        value = self.raw.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise self.wrong(key, "a number")
        return float(value)

    def positive(self, key: str) -> float | None:
        """A number above 0 in the range of float32."""
        value = self.number(key)
        if value is not None and value <= 0:
            raise self.wrong(key, "a number above 0")
        return value

    def flag(self, key: str) -> bool | None:
        """true or false."""
        value = self.raw.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(key, "true or false")

    def text(self, key: str) -> str | None:
        """A string."""
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(key, "a string")

    def list_of(self, key: str, kind: type) -> list[Any] | None:
        """A list whose items all have exactly the type `kind`."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.wrong(key, f"a list of {kind.__name__}")
        return value

    def numbers(self, key: str, n: int) -> list[float] | None:
        """A list of `n` numbers in the range of float32."""
        value = self.raw.get(key)
        if value is None:
            return None
        is_right = isinstance(value, list) and len(value) == n
        if not is_right or not all(type(one) in (int, float) and -MAX_NUMBER <= one <= MAX_NUMBER for one in value):
            raise self.wrong(key, f"a list of {n} numbers")
        return [float(one) for one in value]

    def section(self, key: str) -> Config | None:
        """The object under `key`; None also if it is empty."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Config(value, self.file) if value else None

    @property
    def whole(self) -> Config:
        """The outermost config, of which this is a section or the whole."""
        return self if self.parent is None else self.parent.whole

    def beside(self, name: str) -> Config:
        """The JSON object of another file in the same folder; empty if there is no such file."""
        file = self.file.parent / name
        return Config(load_object_if_present(file), file)

    def alone(self, key: str) -> Config:
        """Only the section `key`, with this config as its parent; empty if there is none."""
        section = self.section(key) if key else self
        return Config({} if section is None else section.raw, self.file, self)

    def within(self, key: str) -> Config:
        """The section `key`, completed with this config's other keys: the config of a wrapped model.

        If both have a key, the section's value is used. Without such a section, this config itself is returned.
        """
        section = self.section(key) if key else None
        if section is None:
            return self
        beside = {name: value for name, value in self.raw.items() if name != key}
        return Config({**beside, **section.raw}, self.file, self)

    @property
    def rope(self) -> Config:
        """The RoPE settings; empty if there are none.

        As in transformers, `rope_scaling`, if present, replaces `rope_parameters`.

        Raises:
            SourceError: They differ between kinds of layers.
        """
        key, section = self._rope_section()
        full = section.section("full_attention")
        if full and any(isinstance(other, dict) and other != full.raw for other in section.raw.values()):
            raise self.wrong(key, "the same RoPE for all kinds of layers")
        return full or section

    def rope_of(self, kind: str) -> Config:
        """The RoPE settings for one kind of layer (full_attention, sliding_attention), or those for all layers."""
        section = self._rope_section()[1]
        by_kind = {key: section.section(key) for key, value in section.raw.items() if isinstance(value, dict)}
        return (by_kind.get(kind) or Config({}, self.file)) if by_kind else section

    @property
    def has_rope_by_kind(self) -> bool:
        """Whether each kind of layer has RoPE settings of its own."""
        return any(isinstance(value, dict) for value in self._rope_section()[1].raw.values())

    def _rope_section(self) -> tuple[str, Config]:
        key = "rope_scaling" if self.section("rope_scaling") else "rope_parameters"
        return key, self.section(key) or Config({}, self.file)

    @property
    def rope_type(self) -> str:
        """The kind of RoPE scaling, as transformers names it; "default" if none is stated."""
        return self.rope.text("rope_type") or self.rope.text("type") or "default"

    def rope_base(self, default: float) -> float:
        """The base of RoPE's frequencies (rope_theta); `default` if none is stated."""
        return self.rope.positive("rope_theta") or self.positive("rope_theta") or default

    def wrong(self, key: str, expected: str) -> SourceError:
        """The error for the value of `key`; `expected` completes "expected ..."."""
        shown = repr(self.raw.get(key))
        return SourceError(
            f"{key} is {shown[:60]}, expected {expected}",
            file=self.file,
            hint="correct the config",
            code="config-value",
        )
