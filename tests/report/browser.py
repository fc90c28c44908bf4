"""A real Chromium without a window, spoken to over a pipe: no driver, no port, no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--remote-debugging-pipe"
)
# The browser listens on file 3 and answers on file 4, whatever numbers the pipes have here.
_LAUNCH = """
import os, sys
ask, answer = (os.dup2(int(x), 100 + i) for i, x in enumerate(sys.argv[1:3]))
os.dup2(ask, 3), os.dup2(answer, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def needed():
    """Skips, and says why, where there is no browser."""
    if not CHROMIUM:
        pytest.skip(
            "PAGES ARE NOT TESTED: no chromium on the PATH (Debian: apt-get install chromium)"
        )


class Browser:
    """One tab.

    Attributes:
        events: What the browser told unasked: (method, parameters).
    """

    def __init__(self, profile):
        ask, self._to = os.pipe()
        self._from, answer = os.pipe()
        self._log = open(profile.with_suffix(".log"), "wb")  # noqa: SIM115 - closed with the browser
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _LAUNCH,
                str(ask),
                str(answer),
                CHROMIUM,
                *_FLAGS.split(),
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(ask, answer),
            stdout=self._log,
            stderr=self._log,
        )
        os.close(ask), os.close(answer)
        self.events, self._buffer, self._number, self._session = [], b"", 0, None
        target = next(
            t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        self._session = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for fd in (self._to, self._from):
            os.close(fd)
        self._log.close()

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None and not method.startswith(("Target", "Browser")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def _read(self, patience=60):
        end = time.monotonic() + patience
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._from, 1 << 16)
            if not part:
                raise OSError("the browser is gone")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        found = json.loads(line)
        if "method" in found:
            self.events.append((found["method"], found["params"]))
            if found["method"] == "Page.javascriptDialogOpening":  # else it waits for ever
                os.write(
                    self._to,
                    json.dumps(
                        {
                            "id": 10**9,
                            "method": "Page.handleJavaScriptDialog",
                            "params": {"accept": True},
                            "sessionId": self._session,
                        }
                    ).encode()
                    + b"\0",
                )
        return found

    def open(self, path, width=1200, height=900, *, dark=False, fragment=""):
        """Loads a file, as a desktop or, below 600 pixels, a phone shows it."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri() + fragment)
        end = time.monotonic() + 60
        while (
            self.js("document.readyState") != "complete" or self.js("location.protocol") != "file:"
        ):
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.02)

    def js(self, expression):
        """The value of an expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key, times=1):
        text = {"text": "\r"} if key == "Enter" else {}
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=key,
                    windowsVirtualKeyCode=_KEYS[key],
                    **(text if kind == "keyDown" else {}),
                )

    def type(self, text):
        self.call("Input.insertText", text=text)

    def complaints(self):
        """Errors, warnings, dialogs and requests of the page beyond its own file."""
        self.js("new Promise(done => setTimeout(done, 50))")
        bad = []
        for method, params in self.events:
            if method in (
                "Runtime.exceptionThrown",
                "Log.entryAdded",
                "Runtime.consoleAPICalled",
                "Page.javascriptDialogOpening",
            ):
                bad.append((method, params))
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not (url.startswith("data:") or params["type"] == "Document"):
                    bad.append((method, url))
        documents = [
            p["request"]["url"]
            for m, p in self.events
            if m == "Network.requestWillBeSent" and p["type"] == "Document"
        ]
        return bad + [("left the page", url) for url in documents if not url.startswith("file:")]

    def screenshot(self, height=None):
        """PNG bytes of the whole page, or of its first pixels."""
        size = self.js("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": height or size[1], "scale": 1}
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(found["data"])
