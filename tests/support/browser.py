"""A headless Chromium over its debugging pipe: keys, screenshots, the console and the network.

Only the standard library: the DevTools protocol as JSON, a NUL byte behind each message, on the
file descriptors 3 and 4 of the browser.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38}
"""Keys without a letter, and their codes."""


class BrowserError(Exception):
    """The browser refused a command or did not answer."""


class Tab:
    """One page of a browser.

    Attributes:
        console: what was said there, errors of the policy and of scripts included.
        requests: addresses asked for since the last `go`, data in the page included.
    """

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._buffer, self._last = b"", 0
        self._session: str | None = None
        self.console: list[str] = []
        self.requests: list[str] = []
        self._loaded = False

    def attach(self, *, network: bool) -> Self:
        """Open a page and listen to it; to the network too, which slows it down."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", *(("Network",) if network else ())):
            self.send(f"{domain}.enable")
        return self

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                found: dict[str, Any] = answer["result"]
                return found

    def go(self, page: Path, *, width: int = 1280, height: int = 900, **media: str) -> None:
        """Show a file and wait until it is loaded.

        Args:
            page: the file.
            width: of the window, CSS pixels.
            height: likewise.
            media: features such as ``prefers_color_scheme="dark"``.
        """
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in media.items()]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.console.clear()
        self.requests.clear()
        self._loaded = False
        self.send("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._next()

    def evaluate(self, expression: str) -> Any:
        """Value of an expression in the page; a promise is waited for."""
        found = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise BrowserError(json.dumps(found["exceptionDetails"])[:2_000])
        return found["result"].get("value")

    def key(self, name: str, *, shift: bool = False) -> None:
        """Press a key and let it go, as a person at the keyboard."""
        code = KEYS.get(name, ord(name[0].upper()))
        common: dict[str, Any] = {
            "key": name, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0,
        }  # fmt: skip
        text = {"Enter": "\r", " ": " "}.get(name, name if len(name) == 1 else "")
        self.send(
            "Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {})
        )
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type letters."""
        for letter in text:
            self.key(letter)

    def screenshot(self, target: Path, *, whole: bool = True, **clip: float) -> None:
        """Save a picture of the page, or of a part of it."""
        extra: dict[str, Any] = {"clip": {**clip, "scale": 1}} if clip else {}
        found = self.send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole, **extra
        )
        target.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, target: Path) -> None:
        """Print to a file."""
        found = self.send("Page.printToPDF", printBackground=True)
        target.write_bytes(base64.b64decode(found["data"]))

    def _next(self, seconds: float = 120) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise BrowserError("the browser is gone or does not answer")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(one.get("value")) for one in params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(params["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests += [params["request"]["url"]]


@contextmanager
def opened(profile: Path, *flags: str, network: bool = True) -> Iterator[Tab]:
    """A browser with one page, ended with the block."""
    if CHROMIUM is None:
        raise BrowserError("needs a Chromium: apt-get install chromium")
    child_read, write = os.pipe()
    read, child_write = os.pipe()
    # The shell puts the two pipes where the browser looks for them.
    words = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", *flags]
    command = f'exec "$@" 3<&{child_read} 4>&{child_write}'
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", *words], pass_fds=(child_read, child_write),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    os.close(child_read)
    os.close(child_write)
    try:
        yield Tab(process, write, read).attach(network=network)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(write)
        os.close(read)
