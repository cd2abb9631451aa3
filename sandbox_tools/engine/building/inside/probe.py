"""Tells what the root file system's Python is, as JSON; it may be one that is too old for all else here."""

import json
import platform
import re
import sys
import sysconfig

try:
    from importlib import metadata
except ImportError:
    installed = {}
else:
    installed = {
        re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower(): each.version
        for each in reversed(list(metadata.distributions()))  # of several the first is what is loaded
        if each.metadata["Name"]
    }
found = {
    "python": sys.version_info[:2],
    "libc": platform.libc_ver(),
    "packages": sysconfig.get_path("purelib"),
    "have": installed,
}
sys.stdout.write(json.dumps(found))
