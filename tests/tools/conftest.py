"""The tools over a provider in memory; the same fixtures as the sessions'."""

from __future__ import annotations

from tests.session.conftest import clock, process, provider

__all__ = ["clock", "process", "provider"]
