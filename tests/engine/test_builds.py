"""Templates of one's own, built for real and used through a real engine that runs meanwhile."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sandbox_tools.engine.bounds import size_in_force
from sandbox_tools.engine.building import collection
from sandbox_tools.engine.building.builds import Recipe, checked, requirement_lines
from sandbox_tools.engine.building.collection import Collected, collect, forget
from sandbox_tools.engine.building.names import MARK, Names, used
from sandbox_tools.engine.building.roots import OnStep, find_root
from sandbox_tools.engine.runtime import Container
from sandbox_tools.engine.templates import Template, build
from sandbox_tools.errors import ConfigError, EngineError, NotFoundError
from tests.conftest import own_state
from tests.machine import Box, EngineProcess

SERVER = "python3 -m http.server 8765 --directory /usr/share"
READY = "curl --silent --fail --output /dev/null localhost:8765"


@dataclass
class Shelf:
    """A templates directory of the tests' own, and a state directory whose engine uses it."""

    templates: Path
    state: Path
    engine: EngineProcess
    steps: list[str] = field(default_factory=list)

    def build(self, **recipe: Any) -> Template:
        """Build a template; `steps` has what was done."""
        self.steps.clear()

        def stage(name: str) -> OnStep:
            return lambda words, share: self.steps.append(f"{name}: {words}")

        return asyncio.run(build(self.state, self.templates, Recipe(name="mine", **recipe), stage))

    def collect(self) -> Collected:
        return asyncio.run(collect(self.templates))

    def create(self, name: str) -> Box:
        return self.engine.create(templateID=name)


MINE: dict[str, Any] = {
    "requirements": ("humanize==4.9.0", "cowsay"),
    "start": SERVER,
    "ready": READY,
    "memory_mb": 1024,
    "cpu": 0.5,
    "disk_mb": 1,
}


@pytest.fixture(scope="module")
def shelf(templates: Path) -> Iterator[Shelf]:
    """With this machine's root file system, which is immutable and so may be shared."""
    standard = find_root(templates)
    assert standard is not None
    with own_state() as state:
        own = state / "shelf"
        (own / "roots").mkdir(parents=True)
        subprocess.run(["cp", "--archive", "--link", standard, own / "roots"], check=True)
        engine = EngineProcess(state).start(SANDBOX_TOOLS_TEMPLATES_DIR=str(own))
        yield Shelf(own, state, engine)
        engine.clear()
        engine.stop()
        assert engine.containers() == []
        assert not list((own / "users").iterdir()), "an engine that leaves nothing says that it needs no template"


def children(path: Path) -> set[str]:
    return {each.name for each in path.glob("[!.]*")}


def served(box: Box) -> str:
    return box.value("import urllib.request; urllib.request.urlopen('http://localhost:8765/').status")


def test_a_sandbox_of_a_template_of_ones_own_has_what_it_was_built_with(shelf: Shelf) -> None:
    """Its packages beside the guest's own, its process running, its sizes; built while the engine runs."""
    made = shelf.build(**MINE)

    for name in ("mine", "mine:latest"):
        box = shelf.create(name)
        assert served(box) == "200"
        assert box.value("import humanize, pandas, numpy; humanize.intcomma(12345)") == "12,345"
        assert box.value("import subprocess; 'moo' in subprocess.getoutput('cowsay -t moo')") == "True"
        who = "subprocess.getoutput('ps -o user= -C python3 -o args= | grep http.server').split()[0]"
        assert box.value(who) == "user"
        info = box.info()
        assert (info["templateID"], info["memoryMB"], info["cpuCount"]) == ("mine", 1024, 1)

        assert box.post("pause").status_code == 204
        assert box.post("connect", timeout=600).status_code == 201
        assert served(box) == "200"
        box.kill()
    assert made.root.name != shelf.create("base").value("1") != made.id
    shelf.engine.clear()


def test_a_template_bounds_the_cpu_that_a_sandbox_takes(shelf: Shelf) -> None:
    """By a control group, where the engine may make one."""
    config = shelf.build(**MINE).config
    linux: Any = config(Container(id="x", directory=shelf.state, binary=shelf.state))["linux"]

    assert linux["resources"]["cpu"] == {"quota": 50_000, "period": 100_000} or "cgroupsPath" not in linux
    if "cgroupsPath" in linux:
        box = shelf.create("mine")
        spin = "import time; a, b = time.time(), time.process_time()\nwhile time.time() < a + 3: pass\n"
        assert float(box.value(spin + "(time.process_time() - b) / 3")) < 0.75
        box.kill()


def test_a_template_bounds_what_a_sandbox_writes_to_its_files(shelf: Shelf) -> None:
    """In whole GiB, and no less than its memory and processes need."""
    shelf.build(**MINE)
    box = shelf.create("mine")
    most = size_in_force(1, 1024)
    assert box.info()["diskSizeMB"] == most < box.engine.create().info()["diskSizeMB"]

    fill = f"import subprocess; subprocess.getoutput('fallocate -l {most + 1}M /home/user/big')"
    assert "File too large" in box.value(fill)
    box.engine.clear()


def test_what_has_not_changed_is_not_made_again(shelf: Shelf) -> None:
    first = shelf.build(**MINE)
    roots = children(shelf.templates / "roots")

    assert shelf.build(**MINE).id == first.id
    assert shelf.steps == ["warmed template: ready"]

    other = shelf.build(**MINE | {"start": f"exec {SERVER}"})
    assert shelf.steps == ["warmed template: warming the template", "warmed template: ready"]
    assert other.id != first.id
    assert children(shelf.templates / "roots") == roots

    named = Names(shelf.templates).find("mine")
    assert named is not None
    assert named.template == other.id


def test_a_requirement_leaves_the_root_that_it_is_put_upon_as_it_is(shelf: Shelf) -> None:
    standard = find_root(shelf.templates)
    assert standard is not None
    packages = "usr/local/lib/python3.11/dist-packages"
    made = shelf.build(**MINE)

    assert (made.root / packages / "humanize").is_dir()
    assert list((made.root / packages / "humanize/__pycache__").glob("*.pyc"))
    assert not (standard / packages / "humanize").exists()
    shared = "numpy/__init__.py"
    assert (made.root / packages / shared).samefile(standard / packages / shared)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"start": "echo no such luck; exit 3"}, r"exit code 3\. Its last words: no such luck"),
        (
            {"start": "echo begun; sleep 99", "ready": "echo not yet; false", "ready_seconds": 3.0},
            "not ready within 3 s.*exit code 1.*not yet.*begun",
        ),
        ({"requirements": ("no-such-package-anywhere-at-all",)}, "can't be installed"),
        ({"requirements": ("numpy<2",)}, "stay as they are"),
    ],
)
def test_a_build_that_fails_says_why_and_the_name_means_what_it_meant(
    shelf: Shelf, recipe: dict[str, Any], says: str
) -> None:
    before = Names(shelf.templates).find("mine")
    images = children(shelf.templates / "images")

    with pytest.raises(EngineError, match=f"(?s){says}"):
        shelf.build(**recipe)

    assert Names(shelf.templates).find("mine") == before
    assert children(shelf.templates / "images") == images
    assert not list(shelf.templates.glob("warm-*"))


def test_an_unknown_template_is_told_with_those_that_there_are(shelf: Shelf) -> None:
    shelf.build(**MINE)
    with shelf.engine.http() as http:
        for name in ("nothing", "mine:v2"):
            answer = http.post("/sandboxes", json={"templateID": name})
            assert answer.status_code == 404
            assert "['base', 'code-interpreter-v1', 'mine']" in answer.json()["message"]


def test_a_snapshot_can_not_take_a_templates_name(shelf: Shelf) -> None:
    shelf.build(**MINE)
    box = shelf.create("mine")
    assert box.post("snapshots", name="mine").status_code == 400
    box.kill()


def test_an_exported_image_is_made_fit_for_sandboxes(shelf: Shelf, tmp_path: Path) -> None:
    """One with Python and nothing else of what the guest needs: no packages, no user, no tini."""
    standard = find_root(shelf.templates)
    assert standard is not None
    archive = tmp_path / "image.tar"
    left_out = ("usr/bin/tini", "home/user", "opt", "etc/passwd", "etc/group", "etc/shadow")
    left_out += ("usr/local/bin/deno", "usr/share", "usr/lib/git-core", "var/cache")  # for time's sake
    left_out += tuple(
        f"usr/local/lib/python3.11/dist-packages/{each}"
        for each in ("uvicorn", "uvicorn-0.54.0.dist-info", "traitlets", "traitlets-5.16.1.dist-info")
    )

    def without(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = member.name.removeprefix("./")
        return None if any(name == each or name.startswith(f"{each}/") for each in left_out) else member

    with tarfile.open(archive, "w") as made:
        made.add(standard, ".", filter=without)
        for name in ("etc/passwd", "etc/group"):
            lines = (standard / name).read_text().splitlines(keepends=True)
            kept = tmp_path / "kept"
            # Somebody else has the id 1000 in it, as in many images.
            kept.write_text("".join(line for line in lines if not line.startswith("user:")))
            with kept.open("a") as file:
                file.write("node:x:1000:1000::/home/node:/bin/sh\n" if name == "etc/passwd" else "node:x:1000:\n")
            made.add(kept, f"./{name}")

    shelf.build(tarball=archive)
    box = shelf.create("mine")

    assert box.value("import os, pandas; os.getuid()") == "1001"
    assert box.value("os.path.expanduser('~'), os.getcwd()") == "('/home/user', '/home/user')"
    assert box.value("open('/etc/passwd').read().count('node:x:1000')") == "1"
    assert box.value("import subprocess; subprocess.getoutput('ps -o comm= 1')") == "tini"
    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201
    assert box.value("pandas.Series([1, 2]).sum()") == "np.int64(3)"
    box.kill()
    shelf.build(tarball=archive)
    assert shelf.steps == ["image: Reading the image", "warmed template: ready"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "no `usr`"),
        (("usr/bin/bash",), "apt-get install python3"),
        (("usr/bin/python3",), "apt-get install bash"),
        (("usr/bin/bash", "usr/bin/python3"), "can't be run"),
    ],
)
def test_an_image_that_lacks_what_can_not_be_added_is_refused_in_words(
    shelf: Shelf, tmp_path: Path, files: tuple[str, ...], says: str
) -> None:
    roots = children(shelf.templates / "roots")
    for file in files:
        (tmp_path / "image" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "image" / file).write_text("no program")
    (tmp_path / "image").mkdir(exist_ok=True)

    with pytest.raises(ConfigError, match=says):
        shelf.build(rootfs=tmp_path / "image")

    assert children(shelf.templates / "roots") == roots


def test_a_collection_keeps_what_a_paused_sandbox_and_a_snapshot_need_and_nothing_else(shelf: Shelf) -> None:
    old = shelf.build(**MINE | {"memory_mb": 900})
    box = shelf.create("mine")
    box.run("kept = 7")
    taken = box.post("snapshots").json()["snapshotID"]
    box.post("pause")
    new = shelf.build(start=SERVER, ready=READY)

    assert shelf.collect().skipped is None
    assert {old.id, new.id} <= children(shelf.templates / "images")
    assert old.root.is_dir()

    box.post("connect", timeout=600)
    assert box.value("kept") == "7"
    box.kill()
    shelf.collect()
    assert old.id in children(shelf.templates / "images"), "the snapshot needs it"

    with shelf.engine.http() as http:
        assert http.delete(f"/templates/{taken.replace(':', '%3A')}").status_code == 204
    collected = shelf.collect()
    assert f"images/{old.id}" in collected.removed
    assert f"roots/{old.root.name}" in collected.removed
    assert collected.freed > 10_000_000
    assert not old.root.exists()

    copy = shelf.create("mine")
    assert served(copy) == "200"
    assert shelf.create("base").value("1") == "1"
    shelf.engine.clear()
    assert children(shelf.templates / "guests")
    assert children(shelf.templates / "runsc")


def unreadable_record(state: Path) -> Callable[[], object]:
    path = state / "sandboxes/iodd/record.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"id": "iodd"')
    return lambda: shutil.rmtree(path.parent)


def lost_mark(state: Path) -> Callable[[], object]:
    (state / MARK).rename(state / "away")
    return lambda: (state / "away").rename(state / MARK)


def test_a_collection_that_can_not_see_everything_removes_nothing(shelf: Shelf) -> None:
    old = shelf.build(memory_mb=950)
    shelf.build(**MINE)
    for harm in (unreadable_record, lost_mark):
        put_right = harm(shelf.state)

        collected = shelf.collect()

        assert collected.removed == []
        assert collected.skipped is not None
        assert str(shelf.state) in collected.skipped
        assert old.image.is_dir()
        put_right()
    assert f"images/{old.id}" in shelf.collect().removed


def test_a_state_directory_that_is_gone_is_waited_for_until_it_is_forgotten(shelf: Shelf) -> None:
    with own_state() as elsewhere:
        subprocess.run(["cp", "-r", shelf.state / "bin", elsewhere], check=False)
        engine = EngineProcess(elsewhere).start(SANDBOX_TOOLS_TEMPLATES_DIR=str(shelf.templates))
        engine.create()
        engine.stop()

    said = shelf.collect().skipped

    assert said is not None
    assert str(elsewhere) in said
    assert "--forget" in said
    assert forget(shelf.templates, elsewhere)
    assert shelf.collect().skipped is None


def test_a_collection_waits_for_nobody_who_builds(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "PATIENCE", 0.2)

    async def both() -> Collected:
        async with used(shelf.templates):
            return await collect(shelf.templates)

    assert "is being made" in str(asyncio.run(both()).skipped)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"name": "base"}, "built-in"),
        ({"name": "../up"}, "Invalid template name"),
        ({"name": "a:b"}, "no tag"),
        ({"packages": ("--option",)}, "name of a Debian package"),
        ({"rootfs": Path("/a"), "tarball": Path("/b")}, "not both"),
        ({"tarball": Path("/b"), "packages": ("jq",)}, "Install them in the image"),
        ({"memory_mb": 100}, "512 or more"),
        ({"cpu": 0.0}, "cores can't be given"),
        ({"start": " "}, "start command is empty"),
        ({"ready_seconds": 0}, "more than 0 seconds"),
    ],
)
def test_a_recipe_that_can_not_be_followed_is_refused_before_anything_is_done(
    recipe: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        checked(Recipe(**{"name": "mine", **recipe}))


def test_a_requirements_list_is_read_without_comments_and_must_be_whole() -> None:
    assert requirement_lines("# all\nsix  # one\n\nhumanize ; \\\n python_version > '3'\n--index-url x\n") == (
        "six",
        "humanize ;   python_version > '3'",
        "--index-url x",
    )
    for line in ("-r other.txt", "-e .", "./wheel.whl", "--constraint=c", "mine @ file:///here"):
        with pytest.raises(ConfigError, match="outside the list"):
            requirement_lines(line)


def test_a_name_that_is_taken_away_is_no_template_any_more(tmp_path: Path) -> None:
    for name in ("nothing", "../../etc/passwd", "base"):
        assert Names(tmp_path).find(name) is None
        with pytest.raises(NotFoundError, match="none"):
            Names(tmp_path).take(name)
