"""The thin async client: the verbs of the wire, whoever serves it."""

from __future__ import annotations

from sandbox_tools.client.client import Client
from sandbox_tools.client.sandbox import Sandbox

__all__ = ["Client", "Sandbox"]
