"""Root file systems out of archives: what Docker exports and saves, and OCI image layouts.

An archive is not trusted. Nothing in it is run, and nothing that it holds reaches beyond the new root: every path is
followed component by component, with links taken as they will be inside, where `/` is the new root.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
import platform
import posixpath
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from sandbox_tools.engine.building.roots import remove_tree
from sandbox_tools.errors import ConfigError

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"

_MOST_LINKS = 40  # as in Linux

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

_UNREADABLE = (
    *(OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(KeyError, TypeError, ValueError, IndexError, OverflowError),  # what its own lists of contents may hold
)

OnShare = Callable[[float], None]
"""Told which share of the work lies behind, from 0 to 1."""


def unpack(archive: Path, root: Path, on_share: OnShare = lambda _share: None) -> None:
    """Unpack an archive of a root file system into an empty directory.

    Devices, pipes, sockets and what lies below `/dev` are left out, setuid and setgid bits are removed, and owners are
    kept where this process is root.

    Raises:
        ConfigError: It can't be read, is damaged, or names a path outside the root; `root` is then half-filled.
    """
    try:
        with tarfile.open(archive) as opened:
            layers = _layers(opened)
            if layers is None:
                _apply(opened, root, on_share)
                return
            for number, layer in enumerate(layers):
                on_share(number / len(layers))
                with _layer(opened, *layer) as inner:
                    _apply(inner, root, lambda _share: None)
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        msg = (
            f"{str(archive)!r} can't be unpacked: {reason}. Give what `docker export` or `docker save` writes, or an "
            "OCI image layout in a tar, plain or compressed by gzip, bzip2 or xz."
        )
        raise ConfigError(msg, op="build") from error


def _layers(archive: tarfile.TarFile) -> list[tuple[str, str | None]] | None:
    """The layers' names in the archive, lowest first, and the digests that they must have. None: it is a plain root."""
    names = {name.removeprefix("./") for name in archive.getnames()}
    if "oci-layout" in names and "index.json" in names:
        manifest = _manifest(archive, _json(archive, "index.json"))
        return [(_blob(layer["digest"]), str(layer["digest"])) for layer in manifest["layers"]]
    if "manifest.json" in names and not names & {"etc", "usr", "bin"}:
        [image, *others] = _json(archive, "manifest.json")
        if others:
            msg = f"it holds {len(others) + 1} images; save one"
            raise ValueError(msg)
        return [(str(name), None) for name in image["Layers"]]
    return None


def _manifest(archive: tarfile.TarFile, index: dict[str, Any]) -> dict[str, Any]:
    """The image for this machine, from an index that may lead to others."""
    wanted = _ARCHITECTURES.get(platform.machine(), platform.machine())
    found = [
        each for each in index["manifests"] if each.get("platform", {}).get("architecture", wanted) in (wanted, "any")
    ]
    if not found:
        msg = f"it holds no image for {wanted}"
        raise ValueError(msg)
    manifest: dict[str, Any] = _json(archive, _blob(found[0]["digest"]), str(found[0]["digest"]))
    return _manifest(archive, manifest) if "manifests" in manifest else manifest


def _blob(digest: str) -> str:
    kind, _, value = str(digest).partition(":")
    return f"blobs/{kind}/{value}"


def _open(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    for spelling in (name, f"./{name}"):
        with contextlib.suppress(KeyError):
            if found := archive.extractfile(spelling):
                return found
    msg = f"{name!r} is missing in it"
    raise ValueError(msg)


def _json(archive: tarfile.TarFile, name: str, digest: str | None = None) -> Any:
    with _open(archive, name) as file:
        content = file.read(8 << 20)
    if digest is not None and digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
        msg = f"{name!r} is not what its digest says"
        raise ValueError(msg)
    return json.loads(content)


@contextlib.contextmanager
def _layer(archive: tarfile.TarFile, name: str, digest: str | None) -> Iterator[tarfile.TarFile]:
    with _open(archive, name) as file:
        if digest is not None:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"  # type: ignore[arg-type]  # it reads
            if found != digest:
                msg = f"the layer {name!r} is not what its digest says"
                raise ValueError(msg)
            file.seek(0)
        if file.read(4) == b"\x28\xb5\x2f\xfd":
            msg = "its layers are compressed by zstd; save it with `docker save`, or with gzip"
            raise ValueError(msg)
        file.seek(0)
        with tarfile.open(fileobj=file) as layer:
            yield layer


def _apply(archive: tarfile.TarFile, root: Path, on_share: OnShare) -> None:
    """Put one layer upon what is there: first what it takes away, then what it adds (OCI image-spec, layer.md)."""
    members = archive.getmembers()
    for member in members:
        _take_away(member, root)
    directories: dict[str, tarfile.TarInfo] = {}
    for number, member in enumerate(members):
        path = _clean(member.name)
        if path and f"/{_WHITEOUT}" not in f"/{path}" and not path.startswith("dev/"):
            _add(archive, member, path, root)
            if member.isdir():
                directories[path] = member
        if number % 500 == 0:
            on_share(number / len(members))
    # Last, as some may not be written to, and from the innermost out, so that each is reached and keeps its time.
    for path, member in sorted(directories.items(), reverse=True):
        # Looked for again: a link may have come into the place of what it was.
        parent, name = posixpath.split(path)
        directory = _inside(root, parent)
        if directory is None:
            continue
        place = directory / name
        if os.path.lexists(place) and stat.S_ISDIR(place.lstat().st_mode):
            place.chmod(member.mode & 0o1777)
            os.utime(place, (member.mtime, member.mtime))


def _take_away(member: tarfile.TarInfo, root: Path) -> None:
    parent, name = posixpath.split(_clean(member.name))
    if not name.startswith(_WHITEOUT):
        return

    directory = _inside(root, parent)
    hidden = name.removeprefix(_WHITEOUT)
    if hidden in ("", ".", ".."):
        msg = f"it takes {member.name!r} away, which is no name"
        raise ValueError(msg)
    if directory is None:
        return

    if name == _OPAQUE:
        for path in list(directory.iterdir()):
            _remove(path)
    elif not hidden.startswith(_WHITEOUT):  # others are notes of a storage driver's own
        _remove(directory / hidden)


def _add(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str, root: Path) -> None:
    if not (member.isdir() or member.isfile() or member.issym() or member.islnk()):
        return  # a device or a pipe

    parent, name = posixpath.split(path)
    directory = _inside(root, parent, make=True)
    assert directory is not None
    place = directory / name
    there = place.lstat() if os.path.lexists(place) else None
    if there is not None and not (member.isdir() and stat.S_ISDIR(there.st_mode)):
        _remove(place)
    if member.isdir():
        place.mkdir(exist_ok=True)
        # Until all is in it; then it gets the mode that it is to have.
        place.chmod(0o700)
    elif member.issym():
        place.symlink_to(member.linkname)
    elif member.islnk():
        target_parent, target_name = posixpath.split(_clean(member.linkname))
        target = _inside(root, target_parent)
        if target is None or not os.path.lexists(target / target_name):
            msg = f"{member.name!r} is a link to {member.linkname!r}, which is not there"
            raise ValueError(msg)
        os.link(target / target_name, place, follow_symlinks=False)
        return
    else:
        content = archive.extractfile(member)
        assert content is not None
        with content, place.open("xb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
    if os.geteuid() == 0:
        os.chown(place, member.uid, member.gid, follow_symlinks=False)
    if member.isfile():
        place.chmod(member.mode & 0o777)
    os.utime(place, (member.mtime, member.mtime), follow_symlinks=False)


def _clean(name: str) -> str:
    """A member's path from the root on; empty for the root itself.

    Raises:
        ValueError: It leads out.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        msg = f"it names {name[:200]!r}, which leads out of the root file system"
        raise ValueError(msg)
    return "/".join(parts)


def _inside(root: Path, path: str, *, make: bool = False) -> Path | None:
    """The directory that `path` is inside the new root, where links are followed as if that were `/`.

    Args:
        make: Make directories that are missing, and put one in the place of what is none. Else None: it is not there.
    """
    todo = [part for part in path.split("/") if part not in ("", ".")][::-1]
    here: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            here = here[:-1]
            continue

        place = root.joinpath(*here, part)
        if place.is_symlink():
            links += 1
            if links > _MOST_LINKS:
                msg = f"{path!r} is a circle of links"
                raise ValueError(msg)
            target = os.readlink(place)
            if target.startswith("/"):
                here = []
            todo += [each for each in target.split("/") if each not in ("", ".")][::-1]
            continue

        if not place.is_dir():
            if not make:
                return None
            place.unlink(missing_ok=True)
            place.mkdir(mode=0o755)
        here.append(part)
    return root.joinpath(*here)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)
