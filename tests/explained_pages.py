"""A headless Chromium for the tests of the page of ``explain``, and what it shows."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from manualprop._explain import Explanation

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HAS_BROWSER = bool(CHROMIUM and DRIVER and importlib.util.find_spec("selenium"))
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


class Page(NamedTuple):
    """A page in the browser, and what it explains."""

    browser: Any
    explanation: Explanation
    path: Path

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def element(self, name: str) -> Any:
        return self.browser.find_element("id", name)

    def look(self, width: int, dark: bool = False) -> None:
        """Open the page anew in a window of this width."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.browser.get(self.path.as_uri())

    def cell(self, key: str, row: int, col: int, kind: str = "") -> dict[str, Any]:
        """What the page says of a number: the total that it shows, and the sum of the terms."""
        found: dict[str, Any] = self.run(
            """
            const [key, row, col, kind] = arguments, grid = GRIDS.find((g) => g.grid.key === key && (!kind || g.grid.made.kind === kind));
            grid.draw(); grid.go(row, col, true);
            const { terms, whole, value } = made(grid.grid, row, col);
            return { shown: Number(document.getElementById('total').value), text: document.getElementById('sum-body').innerText,
                     terms: terms.length, sum: terms.reduce((a, t) => a + t.value, 0), whole: whole !== false, value,
                     said: document.getElementById('said').textContent };
            """,
            key,
            row,
            col,
            kind,
        )
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()
