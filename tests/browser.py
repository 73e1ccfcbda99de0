"""A headless browser, for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Start Chromium without a screen; skip if it is not installed (tools/test_servers installs it)."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found: tools/test_servers installs them as root")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    options.add_argument("--headless=new")
    # A page of ours, no screen, and often a container without the privileges that the sandbox takes.
    for flag in ("no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # No proxy of the environment between the test and the driver on this machine.
    service = Service(programs["chromedriver"], env={**os.environ, "no_proxy": "localhost,127.0.0.1"})
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: webdriver.Chrome, path: Path, *, dark: bool = False, width: int = 1280) -> None:
    """Load a page from a file, in a colour scheme and width."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False},
    )
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.get(path.as_uri())


def console(driver: webdriver.Chrome) -> list[str]:
    """What the page and the browser complained of since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]
