"""Chromium for the tests of pages; as a command, the picture of a page: browser.py PAGE PICTURE.png WIDTH HEIGHT."""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

_SWITCHES = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
)
_DRAW_SECONDS = 30
_DRAWN = "return [...document.querySelectorAll('.figure')].every(f => f.querySelector('.xtick'))"


@contextmanager
def chromium() -> Iterator[Chrome]:
    """Yields a browser with a fresh profile. Raises FileNotFoundError where Chromium or its driver is missing."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise FileNotFoundError("Chromium is missing; on Debian: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(prefix="chromium") as profile:
        options = ChromeOptions()
        options.binary_location = browser
        for switch in (*_SWITCHES, f"user-data-dir={profile}"):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        chrome = Chrome(options, Service(driver))
        try:
            yield chrome
        finally:
            chrome.quit()


def show(chrome: Chrome, page: Path, width: int, height: int = 900) -> None:
    """Open the page in a window of that size (CSS pixels), in the light scheme, and wait until its charts are drawn."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "light"}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    chrome.get(page.absolute().as_uri())
    WebDriverWait(chrome, _DRAW_SECONDS).until(lambda c: c.execute_script(_DRAWN))


def picture(chrome: Chrome) -> bytes:
    """What the window shows, as PNG."""
    return base64.b64decode(chrome.execute_cdp_cmd("Page.captureScreenshot", {})["data"])


if __name__ == "__main__":
    with chromium() as shown:
        show(shown, Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
        Path(sys.argv[2]).write_bytes(picture(shown))
