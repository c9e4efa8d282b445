"""Screenshots of `raybert serve`'s page, for the README.

    raybert serve runs/demo &
    python benchmarks/screenshots.py http://127.0.0.1:8000/

Drives Debian's Chromium (`apt-get install chromium`) and writes `docs/page-light.png`, `-dark` and
`-phone`: a review with its word attributions, and a filled mask.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

CHROMIUM = "/usr/bin/chromium"
REVIEW = (
    "The plot was thin and the first half dragged, but the actors made it a joy to watch. "
    "The music was wonderful, and I left with a smile."
)
BLANK = "I have watched this {mask} and it was awesome."
DESK, PHONE = {"width": 860, "height": 900}, {"width": 390, "height": 844}
PICTURES = {
    "light": {"color_scheme": "light", "viewport": DESK},
    "dark": {"color_scheme": "dark", "viewport": DESK},
    "phone": {"color_scheme": "light", "viewport": PHONE, "device_scale_factor": 2},
}


def take(browser: Browser, url: str, options: dict[str, object], path: Path) -> None:
    """Open the page in a new context, use it, and save a screenshot."""
    page = browser.new_page(reduced_motion="reduce", **options)
    page.goto(url)
    page.get_by_label("Your text").fill(REVIEW)
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("The words that decided it").wait_for()
    mask = page.get_by_role("button", name="Insert")
    if mask.is_visible():  # the server has a fill-mask model
        token = mask.inner_text().removeprefix("Insert ")
        page.get_by_label("A sentence with a blank").fill(BLANK.format(mask=token))
        page.get_by_role("button", name="Fill in").click()
        page.get_by_text("What would fit").wait_for()
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=path, full_page=True)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000/")
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        for name, options in PICTURES.items():
            path = given.to / f"page-{name}.png"
            take(browser, given.url, options, path)
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
