"""What the engine does and takes, as Prometheus scrapes it: no label names a sandbox, so no series ends with one."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

if TYPE_CHECKING:
    from sandbox_tools.engine.supervisor import Supervisor

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_PHASES = ("running", "frozen", "paused", "changing")


class Figures:
    """The figures of one engine.

    Args:
        supervisor: Its sandboxes. None: it is being prepared.
    """

    def __init__(self, supervisor: Callable[[], Supervisor | None]) -> None:
        self._supervisor = supervisor
        self._registry = CollectorRegistry()
        self._operations = Histogram(
            "sandbox_tools_operation_seconds",
            "Seconds until the control plane answered, by operation and by what came of it.",
            ("operation", "outcome"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Count what is done inside as one call of that operation."""
        began, outcome = time.perf_counter(), "ok"
        try:
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self._operations.labels(operation, outcome).observe(time.perf_counter() - began)

    def page(self) -> tuple[str, str]:
        """All of them as text, and the type of that text."""
        return generate_latest(self._registry).decode(), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """What is read when it is asked for; `prometheus_client` calls it."""
        supervisor = self._supervisor()
        if supervisor is None:
            return

        entries = supervisor.entries()
        phases = collections.Counter(
            "frozen" if entry.record.frozen else entry.phase if entry.phase in _PHASES else "changing"
            for entry in entries
        )
        sandboxes = GaugeMetricFamily("sandbox_tools_sandboxes", "Sandboxes by what they do.", labels=("state",))
        for phase in _PHASES:
            sandboxes.add_metric((phase,), phases[phase])
        yield sandboxes
        memory = sum(supervisor.lifecycle.resident_bytes(entry) for entry in entries if entry.phase == "running")
        yield GaugeMetricFamily(
            "sandbox_tools_sandboxes_resident_bytes", "Memory that running and frozen sandboxes hold.", memory
        )
        disk = os.statvfs(supervisor.lifecycle.sandboxes)
        yield GaugeMetricFamily(
            "sandbox_tools_disk_free_bytes", "Room that is left for snapshots.", disk.f_bavail * disk.f_frsize
        )
