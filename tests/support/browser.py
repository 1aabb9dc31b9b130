"""The system's Chromium, driven by playwright. `open_browser` skips the test if one of them is missing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dsmr_mlx.music

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio")
FLAGS += ("--autoplay-policy=no-user-gesture-required",)
TIMEOUT = 30.0  # seconds


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of playwright's synchronous interface."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS, env=environment)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page in its own context, with helpers; `problems` has its errors and console messages."""

    def __init__(
        self, browser: Any, *, before: str = "", width: int = 1000, height: int = 800, scale: float = 1, **media: str
    ) -> None:
        size = {"width": width, "height": height}
        phone = {"is_mobile": True, "has_touch": True} if width < 600 else {}
        self.context = browser.new_context(viewport=size, device_scale_factor=scale, **phone, **media)
        self.problems: list[str] = []
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        if before:
            self.page.add_init_script(before)

    def open(self, address: str | Path) -> Tab:
        """Go to an address or a file."""
        self.page.goto(address.absolute().as_uri() if isinstance(address, Path) else address)
        return self

    def run(self, script: str) -> Any:
        """Return the value of an expression, or the result of a promise."""
        return self.page.evaluate(script)

    def wait(self, condition: str, seconds: float = TIMEOUT) -> None:
        """Wait until an expression is true. (playwright's own wait needs `eval`, which a strict page forbids.)"""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < deadline, f"{condition}; {self.problems}"
            self.page.wait_for_timeout(20)

    def click(self, selector: str, across: float = 0.5) -> None:
        """Click an element in the middle of its height, at a fraction of its width."""
        box = self.page.locator(selector).bounding_box()
        self.page.locator(selector).click(position={"x": across * box["width"], "y": box["height"] / 2}, force=True)

    def press(self, key: str) -> None:
        """Press and release a key, by its JavaScript name."""
        self.page.keyboard.press(key)

    def close(self) -> None:
        """Close the page and what it stored."""
        self.context.close()


def open_modules(browser: Any) -> Tab:
    """An empty page of an address at which the modules of `music/page` are: `import("/piano.js")`."""
    folder = Path(dsmr_mlx.music.__file__).parent / "page"

    def serve(route: Any) -> None:
        name = route.request.url.rsplit("/", 1)[1]
        content = (folder / name).read_text(encoding="utf-8") if name else "<!DOCTYPE html><title>Modules</title>"
        route.fulfill(body=content, content_type="text/javascript" if name else "text/html")

    tab = Tab(browser)
    tab.page.route("http://modules.test/**", serve)
    return tab.open("http://modules.test/")
