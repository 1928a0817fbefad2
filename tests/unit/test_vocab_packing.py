"""Strings as one text and as a GGUF array, against the plain encoding of gguf_format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.gguf.format import PackedArray
from streamconv.metadata.vocab import packing
from streamconv.metadata.vocab.packing import encode_joined, joined, split

texts = st.lists(st.text().map(str.encode), max_size=12)


@given(strings=texts, scattered=st.booleans())
def test_payload_is_the_plain_encoding(strings: list[bytes], scattered: bool) -> None:
    text = joined(strings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MAX_SCATTERED_NBYTES", len(text) if scattered else -1)
        assert encode_joined(text) == bytes(PackedArray.of_strings(strings).payload)


@given(strings=texts)
def test_split_is_the_inverse_of_joined(strings: list[bytes]) -> None:
    assert split(joined(strings)) == strings


def test_both_ways_meet_at_the_limit() -> None:
    strings = [b"%d" % n for n in range(30_000)]
    assert len(joined(strings)) > packing.MAX_SCATTERED_NBYTES
    assert encode_joined(joined(strings)) == bytes(PackedArray.of_strings(strings).payload)
