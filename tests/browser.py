"""A headless Chromium, driven over its DevTools protocol: for pages that a program builds and fills while they are open."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no Chromium here to open the page with; apt-get install chromium"
PATIENCE_S = 180  # a comparison's charts are megabytes of script


class Page:
    """One tab. Every wait polls for what is waited for, and fails with what the page shows instead."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url="about:blank")  # two addresses that differ behind the # would be one page
        self._call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def text(self) -> str:
        return self.evaluate("document.body ? document.body.innerText : ''")

    def wait_for(self, *texts: str) -> str:
        """Until all `texts` are shown; returns the page's text then."""
        until = time.monotonic() + PATIENCE_S
        while missing := [text for text in texts if text not in self.text]:
            assert time.monotonic() < until, f"{missing} did not appear; the page shows:\n{self.text[:3000]}"
            time.sleep(0.2)
        return self.text

    def wait_until(self, script: str) -> Any:
        """Until `script` returns something true; returns that."""
        until = time.monotonic() + PATIENCE_S
        while not (value := self.evaluate(script)):
            assert time.monotonic() < until, f"{script} stays {value}; the page shows:\n{self.text[:3000]}"
            time.sleep(0.2)
        return value

    def click(self, text: str, among: str = "a, button, [role=tab], li, span") -> None:
        """The last of the elements `among` (a CSS selector) that show `text` and nothing else: the innermost."""
        find = (
            f"[...document.querySelectorAll({json.dumps(among)})].filter(e => e.innerText.trim() === {json.dumps(text)}).pop()"
        )
        self.wait_until(f"!!({find})")
        self.evaluate(f"({find}).click()")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._connection.recv(timeout=PATIENCE_S))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]


@contextmanager
def browser(profile: Path, width: int = 1280, height: int = 1000) -> Iterator[Page]:
    """A tab in a Chromium of its own, which ends with the block. `profile` is an empty folder."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--remote-debugging-port=0",
    ]
    process = subprocess.Popen([*command, f"--window-size={width},{height}", "about:blank"], stderr=subprocess.DEVNULL)
    try:
        port_file, until = profile / "DevToolsActivePort", time.monotonic() + PATIENCE_S
        while not port_file.exists() or not port_file.read_text():
            assert process.poll() is None and time.monotonic() < until, "Chromium does not open its port"
            time.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE_S) as answer:
            tab = next(target for target in json.load(answer) if target["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
