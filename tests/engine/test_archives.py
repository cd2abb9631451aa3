"""Archives of root file systems, and those that somebody made to reach beyond one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_tools.engine.building.archives import unpack
from sandbox_tools.errors import ConfigError


def entry(name: str, kind: bytes = tarfile.REGTYPE, *, to: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.mode, found.mtime = kind, to, mode, 1_700_000_000
    found.uid = found.gid = os.geteuid()
    return found


def directory(name: str, mode: int = 0o755) -> tarfile.TarInfo:
    return entry(name, tarfile.DIRTYPE, mode=mode)


def link(name: str, to: str) -> tarfile.TarInfo:
    return entry(name, tarfile.SYMTYPE, to=to)


def tar(*members: tarfile.TarInfo | tuple[tarfile.TarInfo | str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for each in members:
            member, content = (each, b"") if isinstance(each, tarfile.TarInfo) else each
            if isinstance(member, str):
                member = entry(member)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "new/root"
    made.mkdir(parents=True)
    return made


def unpacked(root: Path, content: bytes) -> Path:
    archive = root.parent.parent / "archive.tar"
    archive.write_bytes(content)
    unpack(archive, root)
    return root


def saved(*layers: bytes) -> bytes:
    """As `docker save` writes them."""
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": "config.json", "RepoTags": None, "Layers": names}]).encode()
    return tar(("manifest.json", manifest), *zip(names, layers, strict=True))


def oci(*layers: bytes, architecture: str | None = None) -> bytes:
    """An OCI image layout, whose index has a signature beside the image."""
    blobs: dict[str, bytes] = {}

    def put(content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return f"sha256:{digest}"

    own = architecture or {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    manifest = put(json.dumps({"layers": [{"digest": put(gzip.compress(layer))} for layer in layers]}).encode())
    signature = put(json.dumps({"layers": []}).encode())
    index = {
        "manifests": [
            {"digest": signature, "platform": {"architecture": "unknown"}},
            {"digest": manifest, "platform": {"architecture": own}},
        ]
    }
    return tar(("oci-layout", b"{}"), ("index.json", json.dumps(index).encode()), *blobs.items())


LOWER = tar(
    directory("etc"),
    ("etc/kept", b"lower"),
    ("etc/replaced", b"lower"),
    ("etc/hidden", b"lower"),
    directory("opaque"),
    ("opaque/old", b"lower"),
    directory("tree"),
    ("tree/file", b"lower"),
)
UPPER = tar(
    ("etc/replaced", b"upper"),
    ("etc/.wh.hidden", b""),
    ("opaque/new", b"upper"),
    ("opaque/.wh..wh..opq", b""),
    (".wh.tree", b""),
    (".wh..wh.plnk/1.2", b""),
)


@pytest.mark.parametrize("form", [saved, oci])
def test_layers_are_applied_in_order_and_what_they_take_away_is_gone(root: Path, form: Callable[..., bytes]) -> None:
    """An opaque directory hides what is below it and not what comes with it, wherever its mark stands in the layer."""
    unpacked(root, form(LOWER, UPPER))

    files = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
    assert files == {"etc/kept": "lower", "etc/replaced": "upper", "opaque/new": "upper"}


def test_an_exported_root_keeps_modes_times_and_links_but_no_rights_of_an_owner(root: Path) -> None:
    unpacked(
        root,
        tar(
            directory("usr"),
            directory("usr/bin", 0o555),
            (entry("usr/bin/su", mode=0o6755), b"program"),
            entry("usr/bin/sudo", tarfile.LNKTYPE, to="usr/bin/su"),
            link("bin", "usr/bin"),
            directory("tmp", 0o1777),
            entry("usr/disk", tarfile.BLKTYPE),
            entry("usr/pipe", tarfile.FIFOTYPE),
            entry("dev/null", tarfile.CHRTYPE),
        ),
    )

    program = (root / "bin/sudo").stat()
    assert (stat.S_IMODE(program.st_mode), program.st_nlink, program.st_mtime) == (0o755, 2, 1_700_000_000)
    assert stat.S_IMODE((root / "usr/bin").stat().st_mode) == 0o555
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    assert sorted(path.name for path in (root / "usr").iterdir()) == ["bin"]
    assert not (root / "dev").exists()


@pytest.mark.parametrize(
    "members",
    [
        (("../outside", b"x"),),
        (("etc/../../outside", b"x"),),
        (link("out", "/"), directory("out/a"), ("out/a/../../outside", b"x")),
        (entry("hard", tarfile.LNKTYPE, to="../../secret"),),
        (("etc/.wh...", b""),),
        ((".wh..", b""),),
        (("..", b""),),
    ],
)
def test_an_archive_that_names_what_is_outside_is_refused(
    root: Path, members: tuple[tarfile.TarInfo | tuple[str, bytes], ...]
) -> None:
    secret = root.parent.parent / "secret"
    secret.write_text("kept")

    with pytest.raises(ConfigError, match="can't be unpacked"):
        unpacked(root, tar(*members))

    assert not list(root.parent.parent.rglob("outside"))
    assert secret.read_text() == "kept"


def test_links_that_lead_out_are_followed_inside_only(root: Path, tmp_path: Path) -> None:
    """By whichever way a link's target is written to, taken away, linked or given a mode."""
    host = tmp_path / "host"
    (host / "sub").mkdir(parents=True)
    (host / "file").write_text("host")
    (host / "sub").chmod(0o750)
    up = "../" * 12

    unpacked(
        root,
        saved(
            tar(
                link("absolute", str(host)),
                link("relative", up + str(host)[1:]),
                ("absolute/file", b"inside"),
                ("relative/other", b"inside"),
                directory("turned"),
                directory("turned/sub", 0o700),
                link("turned", str(host)),
                link("filelink", str(host / "file")),
                ("filelink", b"a file in the place of a link"),
            ),
            tar(("absolute/.wh.file", b""), ("relative/.wh..wh..opq", b""), ("absolute/.wh.sub", b"")),
        ),
    )

    assert (host / "file").read_text() == "host"
    assert sorted(path.name for path in host.iterdir()) == ["file", "sub"]
    assert stat.S_IMODE((host / "sub").stat().st_mode) == 0o750
    assert not list((root / str(host)[1:]).iterdir())
    assert not (root / "filelink").is_symlink()


def test_a_circle_of_links_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="circle of links"):
        unpacked(root, tar(link("a", "b"), link("b", "a"), ("a/file", b"")))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no archive at all", "can't be unpacked"),
        (LOWER[:1500], "can't be unpacked"),
        (gzip.compress(LOWER)[:100], "can't be unpacked"),
        (oci(LOWER, architecture="sparc"), "no image for"),
        (tar(("oci-layout", b"{}"), ("index.json", b"[]")), "can't be unpacked"),
        (tar(("manifest.json", b'[{"Layers": ["gone"]}]')), "'gone' is missing"),
        (tar(("manifest.json", b"[{}, {}]")), "2 images"),
        (saved(b"\x28\xb5\x2f\xfd" + bytes(600)), "zstd"),
    ],
)
def test_what_is_no_image_is_an_error_in_words(root: Path, content: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        unpacked(root, content)


def test_a_layer_that_is_not_what_its_digest_says_is_refused(root: Path) -> None:
    layer = gzip.compress(LOWER)
    with pytest.raises(ConfigError, match="not what its digest says"):
        unpacked(root, oci(LOWER).replace(layer[:40], layer[:39] + bytes([layer[39] ^ 1])))
