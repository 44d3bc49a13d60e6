"""A headless Chromium that is driven over two pipes, by the DevTools protocol: mouse, keys, pictures, values."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from launching import kill_all

SECONDS = 60.0
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe", "--hide-scrollbars"),
)
PHONE, DESKTOP = (390, 844), (1280, 900)


class Browser:
    """One page in a browser of its own.

    Raises:
        AssertionError: there is no Chromium; `make test-browser` installs it.
    """

    def __init__(self) -> None:
        program = shutil.which("chromium")
        assert program is not None, "there is no chromium; make test-browser installs it"
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        # the browser reads descriptor 3 and writes 4
        shell = f'exec "$0" "$@" 3<&{reads} 4>&{writes}'
        command = ["bash", "-c", shell, program, *OPTIONS, f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(reads, writes), start_new_session=True, stderr=subprocess.DEVNULL
        )
        os.close(reads)
        os.close(writes)
        os.set_blocking(self._from, False)
        self._number, self._rest, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        (target,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        kill_all(self.process)
        self.process.wait()
        os.close(self._to)
        os.close(self._from)
        self.profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            assert time.monotonic() < deadline and self.process.poll() is None, "the browser does not answer"
            try:
                self._rest += os.read(self._from, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    # ------------------------------------------------------------------------------------- a page

    def open(self, address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        """Open a page in a window of a size, in light or dark colours, and wait until it is drawn."""
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=address)
        self.wait("document.documentElement?.dataset.ready === 'true'")
        self.settle()

    def value(self, expression: str) -> Any:
        """Return what an expression gives within the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = SECONDS) -> None:
        """Wait until an expression is true within the page."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Wait until the page has drawn twice."""
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def place(self, selector: str) -> tuple[float, float, float, float]:
        """Return left, top, width and height of an element in the window, which is scrolled to it."""
        self.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        self.settle()
        box = "(({left, top, width, height}) => [left, top, width, height])"
        return tuple(self.value(f"{box}(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"))

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        """Let the mouse move, press or release."""
        button = "none" if kind == "mouseMoved" and not clicks else "left"
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button=button,
            clickCount=clicks,
            buttons=int(button == "left"),
        )

    def click(self, selector: str, clicks: int = 1) -> None:
        """Click on the middle of an element."""
        left, top, width, height = self.place(selector)
        for number in range(1, clicks + 1):
            self.mouse("mousePressed", left + width / 2, top + height / 2, number)
            self.mouse("mouseReleased", left + width / 2, top + height / 2, number)
        self.settle()

    def drag(self, selector: str, first: float, last: float) -> None:
        """Drag over an element, from one share of its width to another."""
        left, top, width, height = self.place(selector)
        y = top + height / 2
        self.mouse("mouseMoved", left + first * width, y)
        self.mouse("mousePressed", left + first * width, y, 1)
        self.mouse("mouseMoved", left + (first + last) / 2 * width, y, 1)
        self.mouse("mouseMoved", left + last * width, y, 1)
        self.mouse("mouseReleased", left + last * width, y, 1)
        self.settle()

    def press(self, key: str) -> None:
        """Press a key on the element that has the focus."""
        text = {"text": key} if len(key) == 1 else {}
        codes = {"Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes.get(key, ord(key[0])), **more
            )
        self.settle()

    def picture(self, path: Path | None = None, *, whole: bool = False) -> bytes:
        """Return the window, or the whole page, as a PNG file, and write it."""
        raw = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        if path is not None:
            path.write_bytes(raw)
        return raw

    def complaints(self) -> list[str]:
        """Return errors of the page's program, and what its policy forbade."""
        self.value("1")
        found = []
        for event in self.events:
            if event.get("method") == "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for, but for those that hold their content themselves."""
        self.value("1")
        asked = [event["params"]["request"]["url"] for event in self.events if event.get("method", "") == SENT]
        return [address for address in asked if not address.startswith("data:")]


SENT = "Network.requestWillBeSent"
