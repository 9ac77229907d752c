"""A headless Chromium for tests, driven through the W3C WebDriver protocol: a dozen calls, so no package is needed."""

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = next(filter(None, map(shutil.which, ("chromedriver", "chromium.chromedriver"))), None)
MISSING = (
    ""
    if CHROMIUM and DRIVER
    else f"needs {'chromium' if not CHROMIUM else 'chromedriver'}: apt-get install chromium chromium-driver"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the protocol names elements by
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Browser:
    """One session. Scripts get their arguments as `arguments`; elements go in and out of them as they are."""

    def __init__(self, port, profile):
        self._open = build_opener(ProxyHandler({})).open  # a proxy of the environment is not for this machine
        self._root = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._root += "/" + self._call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _call(self, path, body=None, method="POST"):
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with self._open(request, timeout=30) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, path):
        self._call("/url", {"url": path.as_uri()})

    def run(self, script, *arguments):
        """What `return` in the script returns."""
        return self._call("/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector):
        return self._call("/element", {"using": "css selector", "value": selector})

    def click(self, selector):
        self._call(f"/element/{self.find(selector)[ELEMENT]}/click", {})

    def write(self, selector, text):
        self._call(f"/element/{self.find(selector)[ELEMENT]}/value", {"text": text})

    def hover(self, selector):
        moves = [{"type": "pointerMove", "origin": self.find(selector), "x": 0, "y": 0, "duration": 0}]
        self._call("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def tap(self, selector):
        """With a finger: nothing hovers before it touches."""
        steps = [{"type": "pointerMove", "origin": self.find(selector), "x": 0, "y": 0, "duration": 0}]
        steps += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        finger = {"type": "pointer", "id": "finger", "parameters": {"pointerType": "touch"}, "actions": steps}
        self._call("/actions", {"actions": [finger]})

    def press(self, *keys):
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def log(self):
        """The messages of the console since the last call."""
        return self._call("/se/log", {"type": "browser"})

    def devtools(self, command, **parameters):
        return self._call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def emulate(self, width=1280, height=900, *, dark=False, scripts=True):
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                      mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.devtools("Emulation.setScriptExecutionDisabled", value=not scripts)

    def picture(self, *, whole=False):
        """A PNG of the window, or of the whole page."""
        found = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def quit(self):
        self._call("", method="DELETE")


@contextmanager
def browser():
    """A fresh browser with a profile of its own; both are gone afterwards."""
    # With --port=0 the driver takes a free port and says which.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place,
        subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                         env={**os.environ, "TMPDIR": place}) as driver,
    ):  # fmt: skip
        try:
            port = next(
                found[1] for line in driver.stdout if (found := re.search(r"started successfully on port (\d+)", line))
            )
            session = Browser(port, place)
            try:
                yield session
            finally:
                session.quit()
        finally:
            driver.terminate()
