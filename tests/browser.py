"""A headless Chromium, driven over a pipe: what it fetches, what it complains of, what it draws.

The DevTools protocol by `--remote-debugging-pipe`: JSON messages that end in a zero byte, written to the
browser's descriptor 3 and read from its descriptor 4. So it needs no package, and opens no port.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *(
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-extensions",
    ),
    *("--disable-sync", "--disable-default-apps", "--mute-audio", "--remote-debugging-pipe"),
)

DRAWN = "document.documentElement?.dataset.drawn || ''"
"""Whether a report's figures are drawn."""


def installed() -> str | None:
    """Return the path of a browser; None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser. `requests`, `complaints`: what it asked for, and what its console says is wrong."""

    def __init__(self, profile: Path, seconds: float = 120.0) -> None:
        program = installed()
        assert program is not None
        self._seconds, self._number, self._session, self._rest = seconds, 0, "", b""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._events: list[dict[str, Any]] = []
        reading, self._to = os.pipe()
        self._from, writing = os.pipe()
        # The browser wants them as 3 and 4, whatever numbers they have here.
        script = f'exec 3<&{reading} 4>&{writing}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(reading, writing),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(profile)},  # where it leaves a socket when it is killed
        )
        os.close(reading)
        os.close(writing)
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers to a command. Raises RuntimeError where it refuses, TimeoutError
        where it says nothing."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self._seconds
        while True:
            answer = self._next(until)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self, until: float) -> dict[str, Any]:
        """Return the next message; events are taken note of on the way."""
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {self._seconds:.0f} s")
            self._rest += os.read(self._from, 1 << 16)
        text, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        about = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(about["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(about["args"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.complaints.append(about["entry"]["text"])
            case str():
                self._events.append(message)
        return message

    def open(
        self, page: Path | str, width: int, dark: bool = False, height: int = 900, ready: str = DRAWN
    ) -> float:
        """Open a file, or an address, at a width in CSS pixels and wait until it is ready, by a JavaScript
        expression: until its script says that all is drawn; the seconds that took."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.scheme(dark)
        began = time.monotonic()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        self.wait(ready)
        return time.monotonic() - began

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true. Raises TimeoutError."""
        until = time.monotonic() + self._seconds
        while not self.value(expression):
            if time.monotonic() > until:
                raise TimeoutError(f"not within {self._seconds:.0f} s: {expression}; {self.complaints}")
            time.sleep(0.05)

    def scheme(self, dark: bool) -> None:
        """Prefer a dark scheme of colours, or a light one."""
        wanted = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[wanted])

    def value(self, expression: str) -> Any:
        """Return what JavaScript makes of an expression; promises are waited for. Raises RuntimeError where it
        throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        text = {"text": key} if len(key) == 1 else {}
        code = {"Tab": 9, "Enter": 13}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def picture(self, file: Path, whole: bool = False) -> None:
        """Write a PNG of what is seen, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))
