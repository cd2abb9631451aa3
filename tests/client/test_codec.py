from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.client.codec import EventDecoder, ExecutionCollector
from sandbox_tools.errors import ProtocolError
from sandbox_tools.models import Ended, ExecutionEvent, Failure, Keepalive, Result, Started, Stderr, Stdout

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
EVENTS = st.one_of(
    st.builds(Started, execution_count=st.integers(0, 9)),
    st.builds(Stdout, text=TEXT),
    st.builds(Stderr, text=TEXT),
    st.builds(Result, text=TEXT, png=TEXT, is_main_result=st.booleans()),
    st.builds(Failure, name=TEXT, value=TEXT, traceback=TEXT),
    st.just(Keepalive()),
    st.just(Ended()),
)


def wire(event: ExecutionEvent) -> bytes:
    return event.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n"


def decode(*chunks: bytes, max_line: int = 1000) -> list[ExecutionEvent]:
    decoder = EventDecoder(max_line=max_line)
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return events + list(decoder.close())


@given(st.lists(EVENTS, max_size=8), st.lists(st.integers(0, 600), max_size=12))
def test_wherever_the_stream_is_cut_the_events_are_the_same(events: list[ExecutionEvent], cuts: list[int]) -> None:
    """Chunk borders carry no meaning, also within a multi-byte character."""
    data = b"".join(map(wire, events))
    places = sorted({min(cut, len(data)) for cut in cuts})
    chunks = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]

    assert events == decode(*chunks)


@given(st.integers(1, 400), st.sampled_from(["first", "last"]))
def test_an_oversized_line_is_replaced_by_its_size_and_its_kind_however_it_is_cut(step: int, place: str) -> None:
    """A dropped error must stay an error, or code that failed would look as if it had worked."""
    kinds = {"result": Result, "stdout": Stdout, "stderr": Stderr, "error": Failure}
    for kind, cls in kinds.items():
        fields = {"type": kind, "text": "x" * 2000}
        if place == "last":
            fields = dict(reversed(fields.items()))
        data = json.dumps(fields).encode()
        stream = wire(Stdout(text="before")) + data + b"\n" + wire(Ended())
        chunks = [stream[i : i + step] for i in range(0, len(stream), step)]

        before, dropped, after = decode(*chunks)

        assert (Stdout(text="before"), Ended()) == (before, after)
        assert isinstance(dropped, cls)
        assert str(len(data)) in dropped.model_dump_json()


def test_text_inside_an_oversized_line_cannot_pass_for_its_kind() -> None:
    inner = json.dumps({"text": "x" * 2000, "html": '"type": "stdout"}'})

    (event,) = decode(inner.encode())

    assert isinstance(event, Result)


def test_an_oversized_line_takes_no_memory() -> None:
    """200 MB in one line without an end: the decoder holds next to nothing."""
    decoder = EventDecoder()
    chunk = b"x" * 65536
    tracemalloc.start()
    for _ in range(200 * 16):
        list(decoder.feed(chunk))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert held < 1_000_000
    assert peak < 40_000_000
    assert [Result(omitted_bytes=200 * 16 * 65536)] == list(decoder.feed(b"\n"))


def test_event_types_from_the_future_are_ignored() -> None:
    assert [Ended()] == decode(b'{"type": "hologram", "depth": 3}\n{"type": "end_of_execution"}\n')


@pytest.mark.parametrize(
    "data", [b"<html>", b"[]", b"1", b'"type"', b"{}", b'{"type": []}', b'{"type": "stdout"}', b"\xff", b"[" * 900]
)
def test_what_is_not_an_event_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data + b"\n")


def test_half_a_surrogate_pair_does_not_end_the_stream() -> None:
    r"""`print("\ud800")` is legal Python, and its output arrives as an escape that no UTF-8 can hold."""
    assert [Stdout(text="a?b😀")] == decode(rb'{"type": "stdout", "text": "a\ud800b\ud83d\ude00"}' + b"\n")


@given(st.lists(st.text("ab\n", max_size=30), max_size=30), st.integers(1, 20))
def test_long_output_keeps_its_beginning_and_its_end_and_counts_the_rest(pieces: list[str], limit: int) -> None:
    collector = ExecutionCollector(max_stream_end=limit)
    for piece in pieces:
        collector.add(Stdout(text=piece))
    execution = collector.execution()
    whole = "".join(pieces)

    if len(whole) <= 2 * limit:
        assert (whole, 0) == (execution.stdout, execution.stdout_omitted)
    else:
        note = f"\n[{len(whole) - 2 * limit} characters left out]\n"
        assert whole[:limit] + note + whole[-limit:] == execution.stdout
        assert len(whole) - 2 * limit == execution.stdout_omitted


def test_a_piece_that_was_dropped_unread_shows_between_what_came_before_and_after() -> None:
    collector = ExecutionCollector()
    for event in (Stderr(text="before"), Stderr(text="", omitted_bytes=7), Stderr(text="after")):
        collector.add(event)

    assert "before\n[7 characters left out]\nafter" == collector.execution().stderr


def test_results_past_the_limit_leave_their_size_and_small_ones_still_fit() -> None:
    collector = ExecutionCollector(max_results=10_000)
    for event in (Result(png="x" * 5000), Result(png="y" * 9000), Result(text="42", is_main_result=True)):
        collector.add(event)
    first, second, third = collector.execution().results

    assert "x" * 5000 == first.png
    assert second.png is None
    assert second.omitted_bytes > 9000
    assert "42" == third.text == collector.execution().text


def test_a_million_tiny_results_are_bounded_too() -> None:
    collector = ExecutionCollector(max_results=100_000)
    for _ in range(10_000):
        collector.add(Result(text="1"))

    assert len(collector.execution().results) < 100
    assert collector.execution().results[-1].omitted_bytes > 0
