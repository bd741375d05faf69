"""A headless Chromium over the W3C WebDriver protocol, with nothing but the standard library.

A phone and a dark page are what the browser itself makes of them: its device emulation and its media features.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DRIVERS = ("chromedriver", "chromium.chromedriver")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


class Page:
    """A browser window of one size and scheme."""

    def __init__(self, session: str):
        self.session = session

    def open(self, path: Path) -> None:
        """A file from disk, as a double click would open it."""
        _post(f"{self.session}/url", {"url": path.resolve().as_uri()})

    def ask(self, script: str) -> Any:
        """What a JavaScript function body returns."""
        return _post(f"{self.session}/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """Messages of the console, errors among them."""
        return [entry["message"] for entry in _post(f"{self.session}/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.ask("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        found = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(found["data"]))

    def scheme(self, name: str) -> None:
        """``"dark"`` or ``"light"``, as the system would say."""
        self._devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": name}]})

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return _post(f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})


@contextmanager
def browser(width: int, height: int, *, phone: bool = False) -> Iterator[Page]:
    """A window of so many CSS pixels; skips the test where there is no Chromium."""
    driver, program = (next(filter(None, map(shutil.which, names)), None) for names in (DRIVERS, BROWSERS))
    if driver is None or program is None:
        pytest.skip("no chromium with its chromedriver on this machine")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "driver.log")
        environment = {**os.environ, "HOME": folder}
        command = [driver, "--port=0", f"--log-path={log}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            address = f"http://127.0.0.1:{_port(process)}"
            options: dict[str, Any] = {
                "binary": program,
                "args": [*FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"],
            }
            if phone:
                metrics = {"width": width, "height": height, "pixelRatio": 2.0}
                options["mobileEmulation"] = {"deviceMetrics": metrics}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = _post(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
            session = f"{address}/session/{made['sessionId']}"
            yield Page(session)
            with urllib.request.urlopen(urllib.request.Request(session, method="DELETE"), timeout=30) as answer:
                answer.read()
        finally:
            process.terminate()
            process.communicate(timeout=10)  # which closes its pipe


def _port(process: subprocess.Popen[str]) -> int:
    """The port that the driver says it has taken."""
    assert process.stdout is not None
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if "started successfully on port" in line:
            return int(line.rstrip().rstrip(".").rpartition(" ")[2])
    raise TimeoutError("chromedriver did not start")


def _post(address: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.loads(error.read())["value"]["message"]) from error
