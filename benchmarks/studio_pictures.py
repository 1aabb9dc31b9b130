"""Pictures of the studio's page for the documentation, with music by the bundled model.

python benchmarks/studio_pictures.py [--out docs/images]     (needs playwright, Chromium and Pillow)
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from dsmr_mlx.common.files import write_atomically

COLOURS = 240  # of a picture: few, so that it is small
SECONDS = 120.0  # to wait for music
READY = "window.studio && studio.socket && studio.socket.open && studio.session.name !== ''"
IDLE = "studio.session.status.activity === 'idle' && studio.session.growing().length === 0 && !studio.making"
SEED = 11


@contextmanager
def studio(folder: Path) -> Iterator[str]:
    """Run the studio and give the address of its page."""
    command = [sys.executable, "-m", "dsmr_mlx", "studio", "Evening", "--no-browser", "--port", "0"]
    with subprocess.Popen([*command, "--folder", folder], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            process.terminate()


def wait(page: Any, condition: str) -> None:
    """Wait until an expression is true in the page."""
    end = time.monotonic() + SECONDS
    while not page.evaluate(condition):
        if time.monotonic() > end:
            raise TimeoutError(condition)
        page.wait_for_timeout(100)


def save(page: Any, path: Path) -> None:
    """Write what the page shows as a PNG of few colours."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    small = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    write_atomically(path, small.getvalue())
    print(f"{path}: {len(small.getvalue()) / 1000:.0f} kB")


def opened(browser: Any, address: str, width: int, height: int, **options: Any) -> Any:
    """Return the page in a window of its own."""
    page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
    page.goto(address)
    wait(page, READY)
    return page


def draw(browser: Any, address: str, out: Path) -> None:
    """Make music, and take the pictures."""
    page = opened(browser, address, 1280, 800)
    page.evaluate(f"studio.send({{ type: 'settings', settings: {{ seed: {SEED}, density: 7 }} }})")
    page.select_option("#seconds", "20")
    page.check("input[name=count][value='1']", force=True)
    page.evaluate("void studio.actions.continue()")
    wait(page, "studio.session.growing().length === 1")
    wait(page, IDLE)
    page.evaluate("studio.transport.pause()")
    page.check("input[name=count][value='3']", force=True)
    page.evaluate("studio.seek(12)")
    page.evaluate("void studio.actions.continue()")
    wait(page, "studio.session.growing().length === 3 && studio.transport.shown() > 14")
    save(page, out / "studio-takes.png")
    wait(page, IDLE)
    page.evaluate("studio.keep(studio.cards.shown[1].id, true)")
    page.evaluate("studio.keep(studio.cards.shown[2].id, false)")
    page.evaluate("studio.hearTake(studio.cards.shown[1].id)")
    page.wait_for_timeout(2500)
    page.evaluate("studio.transport.pause()")
    page.evaluate("studio.stage.mark([15, 18.5])")
    page.wait_for_timeout(500)
    save(page, out / "studio-passage.png")
    phone = opened(
        browser, address, 360, 720, device_scale_factor=2, color_scheme="dark", is_mobile=True, has_touch=True
    )
    phone.evaluate("studio.seek(14)")
    phone.wait_for_timeout(500)
    save(phone, out / "studio-phone.png")


def main() -> None:
    """Write the pictures."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("docs/images"))
    a = p.parse_args()
    program = next(found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name)))
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    a.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        studio(Path(folder)) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], env=environment)
        draw(browser, address, a.out.resolve())
        browser.close()


if __name__ == "__main__":
    main()
