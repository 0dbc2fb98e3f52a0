"""docs/chunks.png: the page of `hnet segment` in Chromium, as README shows it.

    hnet demo
    hnet segment runs/demo hnet/segment/boundaries.py --out /tmp/chunks.html
    python scripts/chunks_screenshot.py /tmp/chunks.html docs/chunks.png --at outermost

Needs playwright (it is in the extra `dev`) and Debian's chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def screenshot(page_file: Path, at: str, width: int, height: int, scheme: str) -> bytes:
    """PNG of the page with the chunk that holds the first of `at` chosen."""
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector(".c")
        if at:
            page.locator(".c", has_text=at).first.click()
        picture = page.screenshot()
        browser.close()
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--at", default="", help="text of the chunk to choose")
    parser.add_argument("--size", type=int, nargs=2, default=(960, 600))
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    args = parser.parse_args()
    picture = Image.open(io.BytesIO(screenshot(args.page, args.at, *args.size, args.scheme))).convert("RGB")
    picture.quantize(96, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
