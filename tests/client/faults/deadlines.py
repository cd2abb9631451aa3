"""How long each operation may take, in seconds."""

from __future__ import annotations

ALLOWANCE = 5.0
"""Beyond its deadline, after which an operation counts as hanging; a machine may be loaded."""

REQUEST = 4.0
"""For a call to the control plane."""

LONG = 20.0
"""For create, connect and fork."""

PAUSE = 60.0 + 2 * 16.0
"""For pause and snapshot."""

CODE = 4.0

LOOK = 2.0
"""To find out why something broke."""

READY = CHECK = 5.0
"""For a sandbox that was resumed to answer, and to leave a mark in it or to look for it."""

ASK = 60.0
"""For a call of envd or the interpreter."""

SILENCE = 150.0
"""For a file that is sent or read."""
