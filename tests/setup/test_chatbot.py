"""The chatbot's page in a real browser: answers stream, the plot is seen, the badge tells that the computer sleeps."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.machine import EngineProcess

EXAMPLE = Path(__file__).parents[2] / "examples/chatbot.py"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def chatbot(engine: EngineProcess) -> Iterator[str]:
    """The example, as a process of its own; its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "SANDBOX_TOOLS_STATE_DIR": str(engine.state)}
    for key in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GOOGLE_API_KEY"):
        environment.pop(key, None)
    words = [sys.executable, EXAMPLE, "--port", str(port), "--pause-after", "1"]
    server = subprocess.Popen(words, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the chatbot has ended"
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)
        engine.clear()


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: `make chromium` installs it, as root on Debian")
def test_a_visitor_chats_sees_a_plot_and_finds_the_computer_asleep(engine: EngineProcess, tmp_path: Path) -> None:
    with chatbot(engine) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 800, "height": 900})
            faults: list[str] = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(address)
            badge = page.get_by_role("status")
            expect(badge).to_have_text("no computer yet")

            page.get_by_placeholder("Ask something").fill("Draw what was sold.")
            page.get_by_role("button", name="Send").click()
            expect(page.locator("p.answer")).to_have_text("March was the best month.", timeout=120_000)
            expect(page.locator("pre.output")).to_have_text("drawing 22 sales\n")
            assert page.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 100

            expect(badge).to_have_text(re.compile(r"asleep since \d+ s"), timeout=60_000)
            shot = Path(os.environ.get("SCREENSHOT") or tmp_path / "chatbot.png")
            page.screenshot(path=shot)
            assert shot.stat().st_size > 10_000

            page.get_by_placeholder("Ask something").fill("How many in all?")
            page.keyboard.press("Enter")
            answer = page.locator("p.answer").nth(1)
            expect(answer).to_have_text("22 in all: the numbers were still there.", timeout=120_000)

            # Somebody else with the same link has a computer of their own.
            stranger = browser.new_context().new_page()
            stranger.goto(page.url)
            expect(stranger.get_by_role("status")).to_have_text("no computer yet")
            assert faults == []
        finally:
            browser.close()
