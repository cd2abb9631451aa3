"""What OpenTelemetry and LangSmith are told, where an application has them; nothing where it has not.

Names follow OpenTelemetry's semantic conventions for generative AI where those have one; they are in development,
and so stand here as text. Neither code nor its output is told, and of an error only its class.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

Ids = Mapping[str, str | None]
"""Some of `sandbox_id`, `sandbox_handle`, `thread_id` and `owner_id`, as log records bear them too."""

_ATTRIBUTES = {
    "sandbox_id": "sandbox.id",
    "sandbox_handle": "sandbox.handle",
    "thread_id": "gen_ai.conversation.id",
    "owner_id": "enduser.id",
}

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@contextmanager
def span(name: str, ids: Ids, *, tool: str | None = None) -> Iterator[None]:
    """A span around what is done inside, and its seconds in the histogram `{name}.duration`.

    Args:
        tool: What the model calls; the span is then `execute_tool {tool}`. An MCP server's framework has one already.
    """
    if (api := _api()) is None:
        yield
        return

    trace, begun, few = api[0], time.perf_counter(), {"gen_ai.tool.name": tool} if tool else {}
    kind = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.type": "function"} if tool else {}
    with trace.get_tracer("sandbox_tools").start_as_current_span(
        f"execute_tool {tool}" if tool else name,
        attributes={**_attributes(ids), **kind, **few},
        record_exception=False,
        set_status_on_exception=False,
    ):
        try:
            yield
        except BaseException as error:
            few["error.type"] = type(error).__qualname__
            failed(error)
            raise
        finally:
            _histogram(f"{name}.duration").record(time.perf_counter() - begun, few)


def failed(error: BaseException) -> None:
    """What the current span is around has failed, though its caller may be told so in another way."""
    if (api := _api()) is not None:
        current = api[0].get_current_span()
        current.set_attribute("error.type", type(error).__qualname__)
        current.set_status(api[0].StatusCode.ERROR)


def identify(ids: Ids) -> None:
    """Have the tool call that is under way bear these, in its span and in its run as LangSmith shows it."""
    if (api := _api()) is not None:
        api[0].get_current_span().set_attributes(_attributes(ids))
    if "langsmith" in sys.modules:
        from langsmith.run_helpers import get_current_run_tree

        if (run := get_current_run_tree()) is not None:
            run.add_metadata(dict(ids))


def passed(state: str, seconds: float) -> None:
    """A sandbox has been `running`, `frozen` or `paused` for that long; the counter `sandbox.time` has it."""
    if _api() is not None:
        _counter("sandbox.time").add(seconds, {"sandbox.state": state})


def _attributes(ids: Ids) -> dict[str, str]:
    return {_ATTRIBUTES[key]: value for key, value in ids.items() if value is not None}


@cache
def _api() -> tuple[Any, Any] | None:
    """OpenTelemetry's modules for traces and for metrics. None: it is not installed."""
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        return None
    return trace, metrics


@cache
def _histogram(name: str) -> Any:
    api = _api()
    assert api is not None
    return (
        api[1].get_meter("sandbox_tools").create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=_SECONDS)
    )


@cache
def _counter(name: str) -> Any:
    api = _api()
    assert api is not None
    return api[1].get_meter("sandbox_tools").create_counter(name, unit="s")
