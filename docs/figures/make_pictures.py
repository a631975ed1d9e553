"""Take the pictures of README and notebook headers from pages made by a real run.

    make tour gallery
    python docs/figures/make_pictures.py

Needs Chromium (`CHROMIUM`, else /usr/bin/chromium) and playwright.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FIGURES = Path(__file__).resolve().parent
BUILD = FIGURES.parents[1] / "build"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def shoot_map(page: Page, source: Path, target: Path) -> None:
    """The map inside an exported notebook, at its second place if it has one."""
    page.goto(source.resolve().as_uri())
    frame = page.locator("iframe").first
    frame.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)
    inside = page.frame_locator("iframe").first
    choice = inside.locator("#places")
    if choice.count() and choice.locator("option").count() > 2:
        choice.select_option(index=2)
        inside.locator("#left").select_option(label="image")
        page.wait_for_timeout(1500)
    frame.screenshot(path=target)


def copy_figure(source: Path, cell: str, target: Path) -> None:
    """The first picture below the cell that holds the text `cell`."""
    text = source.read_text(encoding="utf-8")
    after = text[text.index(cell) :]
    picture = re.search(r"data:image/png;base64,([^\"']+)", after)
    if picture is None:
        raise ValueError(f"{source} has no picture below {cell!r}; run it again.")
    target.write_bytes(base64.b64decode(picture.group(1)))


def main() -> None:
    """Write the pictures."""
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        shoot_map(
            page,
            BUILD / "tour" / "00_quickstart.html",
            FIGURES / "00_quickstart.png",
        )
        shoot_map(
            page,
            BUILD / "gallery" / "09_unseen_regions.html",
            FIGURES / "09_unseen_regions.png",
        )
        browser.close()
    copy_figure(
        BUILD / "gallery" / "02_probe_and_full_fine_tuning.html",
        "plot_resources",
        FIGURES / "02_memory.png",
    )
    copy_figure(
        BUILD / "gallery" / "08_memory_and_time.html",
        "usable_mib",
        FIGURES / "08_memory.png",
    )
    copy_figure(
        BUILD / "gallery" / "03_lora_by_hand.html",
        "cividis",
        FIGURES / "03_moved.png",
    )


if __name__ == "__main__":
    main()
