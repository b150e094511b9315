"""Headless Chromium, driven over a pipe by its DevTools protocol; no package is needed for it."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 30  # seconds


class Browser:
    """A browser with one page. problems: what its console and its network had to say."""

    def __init__(self, profile: Path) -> None:
        """profile: a new folder, for the browser's files and downloads."""
        our_input, its_output = os.pipe()
        its_input, our_output = os.pipe()
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        options += ("--no-first-run", "--disable-extensions", "--disable-background-networking")
        options += ("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank")
        # The protocol's pipes are the descriptors 3 and 4 of the browser.
        start = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, CHROMIUM, *options],
            pass_fds=(its_input, its_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        self._reader, self._writer = os.fdopen(our_input, "rb"), os.fdopen(our_output, "wb")
        self._buffer, self._numbers, self._session = b"", itertools.count(1), None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.downloads = profile / "downloads"
        self.downloads.mkdir()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        place = {"behavior": "allow", "downloadPath": str(self.downloads)}
        self.call("Browser.setDownloadBehavior", **place)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that arrive before it are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while (answer := self._read()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, page: Path, fragment: str = "") -> None:
        """Open a file and wait until its script has shown the rows."""
        self.evaluate("typeof changed === 'undefined' || (changed = false)")  # no question now
        self.problems.clear()
        self.requests.clear()
        # A query of its own makes it another document, also where only the fragment differs.
        url = f"{page.as_uri()}?{next(self._numbers)}"
        self.call("Page.navigate", url=url + fragment)
        here = f"location.href.startsWith({url!r}) && document.body?.dataset.ready === 'true'"
        self.wait_until(lambda: self.evaluate(here))

    @staticmethod
    def wait_until(condition: Callable[[], object]) -> None:
        """Return once the condition holds."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "the browser does not get there"
            time.sleep(0.01)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of an expression in the page; a promise is awaited."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag the mouse from a point to another, in the page's pixels."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            at = {"x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def screenshot(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Write the page as PNG, at a size in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self._writer.write(b'{"id": 0, "method": "Browser.close"}\0')
        self._writer.close()
        self._process.wait(timeout=20)
        self._reader.close()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._reader], [], [], PATIENCE)[0], "the browser says nothing"
            part = os.read(self._reader.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, found = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"].partition("?")[0])
        if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.problems.append(json.dumps(found))
        if method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning"):
            self.problems.append(json.dumps(found["args"]))
