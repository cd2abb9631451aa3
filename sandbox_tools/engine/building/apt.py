"""Packages from this machine's own apt sources, fetched privately; the system's apt state stays as it is."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox_tools.errors import ConfigError, EngineError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

USE_A_CLOUD = (
    "Or use a cloud provider instead: set `E2B_API_KEY`, `PPIO_API_KEY` or `UCLOUD_SANDBOX_API_KEY`, and no engine is "
    "needed on this machine."
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One archive that this machine installs from."""

    uri: str
    codename: str
    """Of the suite: `bookworm`, `bookworm-security`."""
    version: tuple[int, ...]
    """Of the release; empty where the archive names none."""

    def line(self, codename: str | None = None) -> str:
        """A `sources.list` line; `codename` asks the same archive for another suite."""
        return f"deb [signed-by={KEYRING}] {self.uri} {codename or self.codename} main"


def run(argv: Sequence[str | Path], *, cwd: Path | None = None) -> str:
    """Run a command to its end and give back its standard output.

    Raises:
        ConfigError: There is no such command.
        EngineError: It ended with an exit code other than 0.
    """
    words = [os.fspath(word) for word in argv]
    # Debian keeps `chroot` where an ordinary user's PATH does not look.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin:/usr/bin:/bin"
    try:
        # Others than the owner must be able to read what is unpacked: inside a sandbox, code runs as an ordinary user.
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": path},
            umask=0o022,
            check=False,
        )
    except FileNotFoundError:
        msg = f"The command `{words[0]}` is missing on this machine. Install it and try again.\n{USE_A_CLOUD}"
        raise ConfigError(msg, op="setup") from None

    if done.returncode != 0:
        tail = done.stderr[-2000:].strip()
        msg = f"`{Path(words[0]).name}` ended with exit code {done.returncode}: {tail}"
        raise EngineError(msg, argv=words, exit_code=done.returncode, stderr=tail, op="setup")

    return done.stdout


def debian_codename() -> str | None:
    """This machine's Debian release, such as `bookworm`. None where it is not Debian."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None

    return release.get("VERSION_CODENAME") if release.get("ID") == "debian" else None


def debian_sources(scratch: Path) -> list[Source]:
    """The Debian archives in this machine's apt sources, none twice.

    Args:
        scratch: Where lists may be fetched to. Needed on a machine whose own were never fetched or were deleted.

    Raises:
        ConfigError: It has none.
    """
    sources = _index_targets(())
    if not sources:
        options = _private_directories(scratch / "machine")
        run(["apt-get", *options, "--quiet", "update"])
        sources = _index_targets(options)
    if not sources:
        msg = (
            "This machine's apt sources name no Debian archive, which sandboxes are made from. "
            f"Run the engine on Debian 12 or newer.\n{USE_A_CLOUD}"
        )
        raise ConfigError(msg, op="setup")

    return sources


def base_source(sources: Sequence[Source]) -> Source:
    """The release to build from: this machine's own, else the newest one named."""
    releases = [source for source in sources if "-" not in source.codename]
    own = debian_codename()
    matching = [source for source in releases if source.codename == own]
    if matching:
        return matching[0]

    if not releases:
        names = sorted({source.codename for source in sources})
        msg = f"This machine's apt sources name no Debian release, only {names!r}. Add one.\n{USE_A_CLOUD}"
        raise ConfigError(msg, op="setup")

    return max(releases, key=lambda source: source.version)


def unpack(package: str, lines: Sequence[str], scratch: Path) -> Path:
    """Fetch one package, without its dependencies, and unpack it without installing it; where its files are.

    Args:
        package: Its name.
        lines: `sources.list` lines to take it from.
        scratch: An empty directory for all of it.
    """
    options = _private_directories(scratch)
    source_list = scratch / "sources.list"
    source_list.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    options += ["-o", f"Dir::Etc::sourcelist={source_list}", "-o", "Dir::Etc::sourceparts=-"]
    run(["apt-get", *options, "--quiet", "update"])
    run(["apt-get", *options, "--quiet", "download", package], cwd=scratch)
    archive = next(scratch.glob(f"{package}_*.deb"))
    files = scratch / "files"
    run(["dpkg", "-x", archive, files])
    return files


def _private_directories(scratch: Path) -> list[str]:
    for needed in ("lists/partial", "cache/archives/partial"):
        (scratch / needed).mkdir(parents=True, exist_ok=True)

    settings = (f"Dir::State::lists={scratch / 'lists'}", f"Dir::Cache={scratch / 'cache'}", "APT::Sandbox::User=root")
    return [word for setting in settings for word in ("-o", setting)]


def _index_targets(options: Sequence[str]) -> list[Source]:
    fields = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(VERSION)"
    listing = run(["apt-get", *options, "indextargets", "--format", fields, "Created-By: Packages", "Origin: Debian"])
    found: dict[tuple[str, str], Source] = {}
    for words in (line.split() for line in listing.splitlines()):
        if len(words) < 3 or words[2] != "main":
            continue

        digits = words[3].split("-")[0].split(".") if len(words) > 3 else []
        version = tuple(int(part) for part in digits if part.isdecimal())
        found[words[0], words[1]] = Source(uri=words[0], codename=words[1], version=version)

    return list(found.values())
