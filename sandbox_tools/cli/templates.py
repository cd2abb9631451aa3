"""Commands on what new sandboxes of this machine are made from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sandbox_tools.cli.common import as_json, console, extra, progress, say, show, state_dir
from sandbox_tools.cli.machine import setup, stages
from sandbox_tools.errors import ConfigError
from sandbox_tools.paths import templates_directory

if TYPE_CHECKING:
    from sandbox_tools.engine.building.collection import Collected

_file = click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True)
_directory = click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True)


@click.group()
def template() -> None:
    """What new sandboxes on this machine are made from."""


@template.command()
@click.argument("name", required=False)
@click.option("--requirements", type=_file, metavar="FILE", help="A pip requirements list to install, as wheels.")
@click.option("--packages", multiple=True, metavar="A,B", help="Debian packages to install; may be repeated.")
@click.option("--rootfs", type=_directory, metavar="DIR", help="An unpacked root file system in place of our own.")
@click.option("--tarball", type=_file, metavar="FILE", help="The same as `docker export` or `docker save` writes it.")
@click.option("--start", metavar="COMMAND", help="What `user` runs in every sandbox from its beginning.")
@click.option("--ready", metavar="COMMAND", help="Repeated until it ends with 0: then the template is ready.")
@click.option(
    "--ready-timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="How long that may take."
)
@click.option("--memory-mb", type=int, metavar="MB", help="Memory of each sandbox.  [default: 2048]")
@click.option(
    "--cpu", type=float, metavar="CORES", help="CPU time each may use, where the engine is root.  [default: all]"
)
@click.option(
    "--disk-mb", type=int, metavar="MB", help="What each may write to its files, in whole GiB.  [default: 10240]"
)
@as_json
@state_dir
@click.pass_context
def build(context: click.Context, /, state_dir: Path, as_json: bool, name: str | None, **options: Any) -> None:
    """Make the template NAME, as far as it has changed; without NAME our own, as `setup` does."""
    if name is None:
        given = [
            each for each in options if context.get_parameter_source(each) is click.core.ParameterSource.COMMANDLINE
        ]
        if given:
            msg = "Only a template of your own is made from anything. Give it a name: `template build NAME ...`."
            raise ConfigError(msg, op="build")
        context.invoke(setup, state_dir=state_dir, as_json=as_json)
        return

    with extra("local"):
        from sandbox_tools.engine import templates
        from sandbox_tools.engine.building.builds import Recipe, requirement_lines
        from sandbox_tools.engine.building.install import make_directory

    requirements: Path | None = options.pop("requirements")
    packages = [each.strip() for words in options.pop("packages") for each in words.split(",") if each.strip()]
    recipe = Recipe(
        name=name,
        requirements=requirement_lines(requirements.read_text(encoding="utf-8")) if requirements else (),
        packages=tuple(packages),
        ready_seconds=options.pop("ready_timeout"),
        **options,
    )
    started = time.monotonic()
    directory = templates_directory(state_dir)
    make_directory(state_dir)
    with stages(quiet=as_json) as stage:
        made = asyncio.run(templates.build(state_dir, directory, recipe, stage))
        seconds = round(time.monotonic() - started, 1)
        collected = _collected(directory)
    if as_json:
        show({"name": name, "template": made.id, "seconds": seconds, **_facts(collected)})
    else:
        click.echo(f"Ready: template {name} ({made.id}, {seconds} s)")
        _tell(collected, quiet_if_nothing=True)


@template.command("list")
@as_json
@state_dir
def list_(state_dir: Path, as_json: bool) -> None:
    """List the templates that sandboxes can be made from by name."""
    with extra("local"):
        from sandbox_tools.engine.building.builds import BUILT_IN
        from sandbox_tools.engine.building.names import Names

    own = Names(templates_directory(state_dir)).all()
    if as_json:
        built_in = [{"name": name, "built_in": True} for name in sorted(BUILT_IN)]
        show(
            built_in
            + [
                {
                    "name": name,
                    "built_in": False,
                    "template": each.template,
                    "built_at": each.built_at.isoformat(),
                    "recipe": each.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name"}),
                }
                for name, each in own.items()
            ]
        )
        return

    from rich.table import Table

    table = Table("name", "template", "built", "made from", box=None, pad_edge=False)
    for name in sorted(BUILT_IN):
        table.add_row(name, "", "", "the standard root file system")
    for name, each in own.items():
        table.add_row(name, each.template, f"{each.built_at.astimezone():%Y-%m-%d %H:%M}", _words(each.recipe))
    console().print(table)


def _words(recipe: Any) -> str:
    source = recipe.rootfs or recipe.tarball
    words = [str(source)] if source else []
    if recipe.packages:
        words.append(f"Debian: {', '.join(recipe.packages)}")
    if recipe.requirements:
        words.append(f"Python: {', '.join(recipe.requirements)}")
    words += [f"{what}: {command}" for what in ("start", "ready") if (command := getattr(recipe, what))]
    if recipe.memory_mb:
        words.append(f"{recipe.memory_mb} MB")
    if recipe.disk_mb:
        words.append(f"{recipe.disk_mb} MB of disk")
    if recipe.cpu:
        words.append(f"{recipe.cpu:g} cores")
    return "; ".join(words) or "the standard root file system"


@template.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@as_json
@state_dir
def remove(state_dir: Path, as_json: bool, names: tuple[str, ...]) -> int | None:
    """Drop templates by name, and what nothing needs then; sandboxes made from them live on."""
    with extra("local"):
        from sandbox_tools.engine.building.names import Names
        from sandbox_tools.errors import NotFoundError

    directory = templates_directory(state_dir)
    removed: dict[str, bool] = {}
    dropped: list[str] = []
    for name in names:
        try:
            dropped += Names(directory).take(name)
        except NotFoundError as error:
            say(f"sandbox-tools: {error.message}")
            removed[name] = False
        else:
            removed[name] = True
    collected = _collected(directory, dropped)
    if as_json:
        show({"removed_names": [name for name, done in removed.items() if done], **_facts(collected)})
    else:
        for name in (name for name, done in removed.items() if done):
            click.echo(f"{name} removed")
        _tell(collected, quiet_if_nothing=True)
    return None if all(removed.values()) else 1


@template.command()
@click.option(
    "--forget",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="A state directory that is gone for good, with its sandboxes; may be repeated.",
)
@as_json
@state_dir
def prune(state_dir: Path, as_json: bool, forget: tuple[Path, ...]) -> int | None:
    """Remove images and root file systems that no name, sandbox or snapshot needs."""
    with extra("local"):
        from sandbox_tools.engine.building import collection

    directory = templates_directory(state_dir)
    for each in forget:
        if each.exists():
            msg = f"{str(each)!r} is there, so its sandboxes may need their templates. Delete it first."
            raise ConfigError(msg, op="prune")
        if not collection.forget(directory, each.absolute()):
            msg = f"{str(each)!r} is not known to use these templates. Name it as the engine was told it."
            raise ConfigError(msg, op="prune")
    with progress(quiet=as_json) as bars:
        bars.add_task("looking for what nothing needs", total=None)
        collected = _collected(directory)
    if as_json:
        show(_facts(collected))
    else:
        _tell(collected)
    return 1 if collected.skipped else None


def _collected(directory: Path, dropped: Collection[str] = ()) -> Collected:
    from sandbox_tools.engine.building.collection import collect

    return asyncio.run(collect(directory, dropped=dropped))


def _facts(collected: Collected) -> dict[str, Any]:
    return {"removed": collected.removed, "freed_bytes": collected.freed, "skipped": collected.skipped}


def _tell(collected: Collected, *, quiet_if_nothing: bool = False) -> None:
    tell: Callable[[str], None] = say if quiet_if_nothing else click.echo
    if collected.skipped:
        say(f"Nothing was removed. {collected.skipped}")
    elif collected.removed or not quiet_if_nothing:
        count, freed = len(collected.removed), collected.freed / 1e6
        tell(f"Removed {count} things that nothing needed; {freed:.0f} MB are free again")
