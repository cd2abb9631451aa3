"""`python -m sandbox_tools`, the same as the command `sandbox-tools`."""

from __future__ import annotations

import sys

from sandbox_tools.cli import main

sys.exit(main())
