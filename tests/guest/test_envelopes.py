"""What envelopes promise: messages come out as they went in, and whatever else is sent is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.guest.connect import STATUSES
from sandbox_tools.guest.envelopes import HEADER, MAX_MESSAGE, EnvelopeError, EnvelopeReader, decode, envelope

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5)


@given(MESSAGES, st.lists(st.integers(1, 40), max_size=30))
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(
    messages: list[dict[str, Any]], cuts: list[int]
) -> None:
    data = b"".join(envelope(message) for message in messages)
    reader = EnvelopeReader()

    found = []
    for cut in cuts:
        found += reader.feed(data[:cut])
        data = data[cut:]
    found += reader.feed(data)
    reader.finish()

    assert found == messages


def read(*pieces: bytes) -> EnvelopeError | None:
    """What is wrong with a stream of bytes; None: nothing."""
    reader = EnvelopeReader()
    try:
        for piece in pieces:
            assert all(isinstance(message, dict) for message in reader.feed(piece))
        reader.finish()
    except EnvelopeError as error:
        return error
    return None


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes_are_messages_or_an_error_in_words(pieces: list[bytes]) -> None:
    refused = read(*pieces)

    assert refused is None or (refused.code in STATUSES and str(refused).endswith("."))


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (HEADER.pack(1, 2) + b"{}", "unimplemented", "compressed"),
        (HEADER.pack(2, 2) + b"{}", "invalid_argument", "flags 0x02"),
        (HEADER.pack(0x80, 2) + b"{}", "invalid_argument", "flags 0x80"),
        (HEADER.pack(0, MAX_MESSAGE + 1), "resource_exhausted", f"{MAX_MESSAGE} are possible"),
        (HEADER.pack(0, 0xFFFFFFFF), "resource_exhausted", "4294967295 bytes"),
        (HEADER.pack(0, 0), "invalid_argument", "not JSON"),
        (HEADER.pack(0, 2) + b"[]", "invalid_argument", "not a JSON object"),
        (HEADER.pack(0, 10) + b"{}", "invalid_argument", "ends within an envelope"),
        (b"\0\0\0", "invalid_argument", "ends within an envelope"),
    ],
)
def test_what_is_wrong_with_an_envelope_is_said(data: bytes, code: str, words: str) -> None:
    refused = read(data)

    assert refused is not None
    assert refused.code == code
    assert words in str(refused)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe{\0}\0", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a": 1' + b"0" * 9999 + b"}"],
)
def test_what_is_not_a_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        decode(data)
