"""The picture of the page in README, of what `make serve-demo` has trained.

python -m benchmarks.serving.picture runs/serve_demo docs/images/serve.png
"""

import shutil
import sys
from pathlib import Path

from benchmarks.serving.load import serving

SHOWN = ("textures dots", "colours orange", "shapes ring", "digits digit 0")
"""Images, the last one on top."""


def main(folder: Path, picture: Path) -> None:
    from playwright.sync_api import sync_playwright

    with serving(folder / "prompts") as (_, port), sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1080, "height": 900})
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_label("Classes shown").fill("3")
        for name in SHOWN:
            page.get_by_label("Choose images").set_input_files(folder / "images" / f"{name}.png")
            page.locator("article").first.locator(".answer").wait_for()
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
