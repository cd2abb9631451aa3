"""What all benchmarks share: their options, and how samples become figures."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from pathlib import Path

Samples = dict[str, list[float]]
"""Seconds, by step."""


def p95(samples: list[float]) -> float:
    return sorted(samples)[min(len(samples) - 1, round(0.95 * (len(samples) - 1)))]


def milliseconds(samples: list[float], digits: int = 1) -> tuple[str, str]:
    """The p50 and the p95."""
    return f"{1000 * statistics.median(samples):.{digits}f}", f"{1000 * p95(samples):.{digits}f}"


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Of the p50s."""
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}"


def machine() -> str:
    """What it ran on."""
    who = "root" if os.geteuid() == 0 else "ordinary user"
    return f"{os.cpu_count()} cores, Linux {platform.release()}, {who}"


def options(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """`--rounds` and `--json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds (default: {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw samples, in seconds, here")
    return parser
