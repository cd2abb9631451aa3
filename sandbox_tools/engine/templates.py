"""Warmed templates: an immutable root, the guest's code, and an image of both booted, which every create restores."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sandbox_tools.guest
from sandbox_tools.engine.building import warming
from sandbox_tools.engine.building.builds import READY_SECONDS, Recipe, checked
from sandbox_tools.engine.building.fitting import python_of
from sandbox_tools.engine.building.install import check_machine, install_runsc
from sandbox_tools.engine.building.layers import foreign_root, with_requirements
from sandbox_tools.engine.building.names import Named, Names, enter_user, used
from sandbox_tools.engine.building.roots import OnStep, build_root, locked
from sandbox_tools.engine.bundle import PYTHON, bundle_config, write_bundle
from sandbox_tools.engine.images import snapshots
from sandbox_tools.engine.images.saved import Origin
from sandbox_tools.engine.runsc import Runsc
from sandbox_tools.engine.runtime import Container
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.errors import EngineError

DEFAULT_MEMORY_MB = 2048

# Raised whenever what an image holds changes in a way that its ingredients do not show.
_RECIPE = "4"

# A cold boot with a kernel takes 2 s where nothing else runs.
_BOOT_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class Template:
    """One version of a template; everything it names is immutable."""

    id: str
    root: Path
    guest: Path
    image: Path
    runsc: Path
    memory_mb: int
    cpu: float | None = None
    """Cores' worth of CPU time that each sandbox gets at most. None: all there are."""
    disk_mb: int | None = None
    """What each may write to its files, as `Bounds.disk_mb`. None: it does not say."""
    python: str = PYTHON
    """What runs the guest, by its path inside."""

    def origin(self, name: str) -> Origin:
        """What sandboxes of it are made from, under one of its names."""
        return Origin(
            name=name,
            template=self.id,
            runsc=self.runsc.name,
            memory_mb=self.memory_mb,
            cpu=self.cpu,
            disk_mb=self.disk_mb,
            image=self.image,
        )

    def config(self, container: Container) -> dict[str, object]:
        """The OCI configuration of a sandbox made from this template."""
        # Only root may make control groups; an ordinary user's sandboxes are bounded from inside.
        cgroup = f"/sandbox-tools/{container.id}" if os.geteuid() == 0 else None
        return bundle_config(
            root=self.root,
            guest=self.guest,
            memory_mb=self.memory_mb,
            cgroup=cgroup,
            cpu=self.cpu,
            disk_mb=self.disk_mb,
            python=self.python,
        )


def load(templates: Path, template_id: str) -> Template:
    """A template version that was prepared earlier.

    Raises:
        EngineError: It is gone; sandboxes paused from it cannot be resumed.
    """
    directory = templates / "images" / template_id
    try:
        facts = json.loads((directory / "template.json").read_text())
    except (OSError, ValueError) as error:
        msg = f"The template version {template_id!r} is not on disk any more. Restore the templates directory."
        raise EngineError(msg, op="restore") from error

    return Template(
        id=template_id,
        root=templates / "roots" / facts["root"],
        guest=templates / "guests" / facts["guest"],
        image=directory / "image",
        runsc=templates / "runsc" / facts["runsc"],
        memory_mb=facts["memory_mb"],
        cpu=facts.get("cpu"),
        disk_mb=facts.get("disk_mb"),
        python=facts.get("python", PYTHON),
    )


async def prepare(
    state: Path, templates: Path, on_step: OnStep = lambda _step, _share: None, *, memory_mb: int = DEFAULT_MEMORY_MB
) -> Template:
    """The default template, made where it is missing: minutes the first time, milliseconds afterwards.

    From then on it is known that this state directory uses the templates.

    Raises:
        ConfigError: `runsc`, or what makes the root, is missing and can't be had; the message says what to install.
        EngineError: A step failed.
    """
    async with used(templates):
        tools = await _tools(state, templates)
        root = await asyncio.to_thread(build_root, templates, on_step)
        template = await _made(templates, tools.facts(root, memory_mb), on_step)
        await asyncio.to_thread(enter_user, templates, state, template.id)
    return template


async def build(state: Path, templates: Path, recipe: Recipe, stage: Callable[[str], OnStep]) -> Template:
    """A template of one's own, made as far as it is missing, and its name, which means this one from now on.

    Args:
        stage: Begins a named part of the work; gives what is told how far that is.

    Raises:
        ConfigError: The recipe can't be followed on this machine or with this image; the message says what to change.
        EngineError: A step failed. The name means what it meant before.
    """
    recipe = checked(recipe)
    async with used(templates):
        tools = await _tools(state, templates)
        on_step = stage("root file system")
        root = await asyncio.to_thread(build_root, templates, on_step, recipe.packages)
        roots = [root]
        if source := recipe.rootfs or recipe.tarball:
            make = partial(foreign_root, templates, source, runsc=tools.runsc, guest=tools.guest, standard=root)
            roots.append(await asyncio.to_thread(make, on_step=stage("image")))
        if recipe.requirements:
            add = partial(with_requirements, templates, roots[-1], recipe.requirements, runsc=tools.runsc)
            roots.append(await asyncio.to_thread(add, on_step=stage("Python packages")))
        facts = tools.facts(roots[-1], recipe.memory_mb or DEFAULT_MEMORY_MB)
        own = {
            "cpu": recipe.cpu,
            "disk_mb": recipe.disk_mb,
            "start": recipe.start,
            "ready": recipe.ready,
            "python": python_of(roots[-1]),
        }
        if own["python"] == PYTHON:
            del own["python"]
        facts |= {name: value for name, value in own.items() if value is not None}
        template = await _made(templates, facts, stage("warmed template"), ready_seconds=recipe.ready_seconds)
        named = Named(template=template.id, roots=[each.name for each in roots], recipe=recipe)
        await asyncio.to_thread(Names(templates).give, named)
    return template


@dataclass(frozen=True, kw_only=True)
class _Tools:
    """What every template is made with."""

    runsc: Path
    guest: Path

    def facts(self, root: Path, memory_mb: int) -> dict[str, object]:
        facts = {"root": root.name, "guest": self.guest.name, "runsc": self.runsc.name, "memory_mb": memory_mb}
        return facts | {"recipe": _RECIPE}


async def _tools(state: Path, templates: Path) -> _Tools:
    for name in ("images", "guests", "runsc"):
        (templates / name).mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(check_machine)
    found = await asyncio.to_thread(install_runsc, state)
    runsc = await asyncio.to_thread(_pin, found.path, templates / "runsc")
    guest = await asyncio.to_thread(_install_guest, templates / "guests")
    return _Tools(runsc=runsc, guest=guest)


async def _made(
    templates: Path, facts: dict[str, object], on_step: OnStep, *, ready_seconds: float = READY_SECONDS
) -> Template:
    """The template of these facts, warmed if it is not there yet."""
    ingredients = [
        str(snapshots.FORMAT),
        json.dumps(facts),
        cpu(),
        "root" if os.geteuid() == 0 else "user",
        str(templates),
    ]
    template_id = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    directory = templates / "images" / template_id
    if not directory.exists():
        with ExitStack() as held:
            lock = locked(templates / "images.lock", on_wait=lambda: on_step("waiting for another process", 0.1))
            await asyncio.to_thread(held.enter_context, lock)
            if not directory.exists():
                on_step("warming the template", 0.5)
                await _sweep(templates, templates / "runsc" / str(facts["runsc"]))
                await _warm(templates, directory, facts, ready_seconds)
    template = load(templates, template_id)
    snapshots.verify(template.image, cpu=cpu())
    on_step("ready", 1.0)
    return template


def cpu() -> str:
    """A digest of this CPU's features: gVisor restores an image only where all of them are."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]


def guest_digest() -> str:
    """Names the code of this release's guest."""
    digest = hashlib.sha256()
    for file in _guest_files():
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _guest_files() -> list[Path]:
    return sorted(Path(sandbox_tools.guest.__file__).parent.glob("*.py"))


async def _warm(templates: Path, directory: Path, facts: dict[str, Any], ready_seconds: float) -> None:
    """Boot the root once, wait until it has loaded what people use and is ready, and keep the image."""
    unfinished = snapshots.begin(directory)
    work = Path(tempfile.mkdtemp(prefix="warm-", dir=templates))
    container = Container(id=work.name, directory=work, binary=templates / "runsc" / str(facts["runsc"]))
    (unfinished / "template.json").write_text(json.dumps(facts), encoding="utf-8")
    template = Template(
        id=directory.name,
        root=templates / "roots" / str(facts["root"]),
        guest=templates / "guests" / str(facts["guest"]),
        image=unfinished / "image",
        runsc=container.binary,
        memory_mb=facts["memory_mb"],
        python=facts.get("python", PYTHON),
    )
    runtime = Runsc(template.runsc, work / "runsc")
    tunnel = Tunnel(container.pipes)
    try:
        write_bundle(container.bundle, template.config(container))
        container.pipes.make()
        tunnel.open_pipes()
        await runtime.create(container)
        try:
            await _until_attached(tunnel, runtime, container)
        except EngineError as error:
            log = (work / "guest.log").read_text(errors="replace")[-2000:]
            msg = f"The template's guest did not come up. Its last words: {log or 'none'}"
            raise EngineError(msg, op="create") from error

        await warming.run(tunnel, start=facts.get("start"), ready=facts.get("ready"), ready_seconds=ready_seconds)
        tunnel.detach("the template is warm")
        image = snapshots.begin(template.image)
        await runtime.checkpoint(container, image)
        await asyncio.to_thread(snapshots.commit, image, template.image, runsc=template.runsc.name, cpu=cpu())
        snapshots.sync(unfinished / "template.json")
        snapshots.sync(unfinished)
        unfinished.rename(directory)
        snapshots.sync(directory.parent)
    finally:
        tunnel.detach("the template is warm")
        await runtime.kill(container)
        await runtime.aclose()
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(unfinished, ignore_errors=True)


async def _until_attached(tunnel: Tunnel, runtime: Runsc, container: Container) -> None:
    """Raises an `EngineError` as soon as there is nobody to attach to."""
    attaching = asyncio.create_task(tunnel.attach(_BOOT_SECONDS))
    ended = asyncio.create_task(runtime.wait(container))
    try:
        await asyncio.wait((attaching, ended), return_when=asyncio.FIRST_COMPLETED)
        if not attaching.done():
            msg = "the guest ended"
            raise EngineError(msg, op="create")
        attaching.result()
    finally:
        attaching.cancel()
        ended.cancel()
        await asyncio.gather(attaching, ended, return_exceptions=True)


async def _sweep(templates: Path, runsc: Path) -> None:
    """End and remove what crashes left of earlier warm-ups; the caller holds the lock, so none is under way."""
    snapshots.sweep(templates / "images")
    for work in templates.glob("warm-*"):
        runtime = Runsc(runsc, work / "runsc")
        # A verb that outlives its engine would bring up what is ended here before it is there.
        await runtime.settle()
        await runtime.kill(Container(id=work.name, directory=work, binary=runsc))
        await runtime.aclose()
        shutil.rmtree(work, ignore_errors=True)


def _pin(binary: Path, directory: Path) -> Path:
    """A copy of `runsc` under its own digest: an upgrade of the system's must not strand what is paused."""
    pinned = directory / hashlib.sha256(binary.read_bytes()).hexdigest()[:16]
    if not pinned.exists():
        partial = directory / f".partial-{os.getpid()}-{pinned.name}"
        shutil.copy2(binary, partial)
        partial.chmod(0o755)
        snapshots.sync(partial)
        partial.rename(pinned)
    return pinned


def _install_guest(directory: Path) -> Path:
    """A copy of the guest's code under its own digest, laid out so that `sandbox_tools.guest` can be imported."""
    files = _guest_files()
    installed = directory / guest_digest()
    if not installed.exists():
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
        partial.chmod(0o755)
        package = partial / "sandbox_tools" / "guest"
        package.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, package / file.name)
            snapshots.sync(package / file.name)
        try:
            partial.rename(installed)
        except OSError:  # another process was first with the same content
            shutil.rmtree(partial)
    return installed
