"""Puts into the root file system what is staged for it: wheels, tini, an ordinary user.

Files that are there are never written to: the tree may share them with another one by hard links.
"""

from __future__ import annotations

import compileall
import concurrent.futures
import contextlib
import os
import pwd
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

STAGE, PACKAGES = Path(sys.argv[1]), Path(sys.argv[2])
PROGRAMS = Path("/usr/local/bin")


def add_wheels() -> None:
    """Each package that is not there yet, whole, and compiled."""
    added = []
    there = {normal(each.metadata["Name"]) for each in metadata.distributions() if each.metadata["Name"]}
    for wheel in metadata.distributions(path=[str(STAGE / "wheels")]):
        if normal(wheel.metadata["Name"]) in there:
            continue
        for file in wheel.files or ():
            # pip has put what belongs beside the packages, such as scripts, below them.
            name = re.sub(r"^(\.\./)+", "", str(file))
            source = STAGE / "wheels" / name
            if source.is_file():
                if name.startswith("bin/"):
                    add_program(source)
                else:
                    add(source, PACKAGES / name)
                    added.append(str(PACKAGES / name))
    with concurrent.futures.ProcessPoolExecutor() as pool:
        # What does not compile is for another Python, such as a template of code.
        list(pool.map(compile_file, [each for each in added if each.endswith(".py")], chunksize=50))


def compile_file(path: str) -> None:
    compileall.compile_file(path, quiet=2)


def add(source: Path, target: Path) -> None:
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def add_program(source: Path) -> None:
    """A script begins with the path of the Python that fetched it, which is not in here."""
    target = PROGRAMS / source.name
    if os.path.lexists(target):
        return

    content = source.read_bytes()
    if content.startswith(b"#!") and b"python" in content.splitlines()[0]:
        content = b"#!" + os.fsencode(sys.executable) + content[content.index(b"\n") :]
    elif not content.startswith(b"\x7fELF"):
        return
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(0o755)


def add_user() -> None:
    """`user`, with the id 1000 where that is free; and the directories and names that a sandbox has."""
    accounts = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines() if line.count(":") >= 6]
    if not any(account[0] == "user" for account in accounts):
        groups = [line.split(":") for line in Path("/etc/group").read_text().splitlines() if line.count(":") >= 3]
        taken = {account[2] for account in accounts} | {group[2] for group in groups}
        number = next(each for each in range(1000, 60000) if str(each) not in taken)
        append("/etc/passwd", f"user:x:{number}:{number}::/home/user:/bin/bash")
        append("/etc/group", f"user:x:{number}:")
        if Path("/etc/shadow").exists():
            append("/etc/shadow", "user:!:19000:0:99999:7:::")
    account = pwd.getpwnam("user")
    home = Path(account.pw_dir)
    if not home.is_dir():
        home.mkdir(parents=True)
        skeleton = Path("/etc/skel")
        for file in skeleton.iterdir() if skeleton.is_dir() else ():
            if file.is_file():
                add(file, home / file.name)
        for each in (home, *home.iterdir()):
            # An ordinary user's root file system belongs to root throughout.
            with contextlib.suppress(OSError):
                os.chown(each, account.pw_uid, account.pw_gid)
    for name, mode in (("proc", 0o755), ("sys", 0o755), ("dev", 0o755), ("root", 0o700), ("run", 0o755)):
        Path("/", name).mkdir(mode=mode, exist_ok=True)
    if "localhost" not in (Path("/etc/hosts").read_text() if Path("/etc/hosts").is_file() else ""):
        replace("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 sandbox\n")
    replace("/etc/hostname", "sandbox\n")


def append(path: str, line: str) -> None:
    text = Path(path).read_text()
    replace(path, text + ("" if not text or text.endswith("\n") else "\n") + line + "\n", Path(path).stat().st_mode)


def replace(path: str, text: str, mode: int = 0o644) -> None:
    if os.path.lexists(path):
        os.unlink(path)
    Path(path).write_text(text)
    Path(path).chmod(mode & 0o777)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


add_wheels()
if (STAGE / "tini").exists():
    add_user()
    tini = Path("/usr/bin/tini")
    if os.path.lexists(tini):
        tini.unlink()
    tini.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(STAGE / "tini", tini)
    tini.chmod(0o755)
