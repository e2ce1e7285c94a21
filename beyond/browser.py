"""A browser to drive: headless Chromium with one page, for pictures of beyond/playground.py and for its tests.

    python sample.py --base tiny-l --web --screenshot playground.png

Chromium is told what to do over a pipe, in the words of its DevTools protocol
(chromedevtools.github.io/devtools-protocol): JSON each way, and a zero byte behind each message.
That takes no package, and opens no port.
"""

import base64
import json
import os
import select
import signal
import tempfile
import time

from beyond.attribution import find_browser
from data.errors import UsageError

PATIENCE = 60  # seconds for one answer of Chromium, and for a page to be as it should be


class Browser:
    """One page, from its address on until close."""

    def __init__(self, address: str, width: int, height: int):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [
            find_browser(),
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.profile.name}",
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses to sandbox itself as root
        reads, self.commands = os.pipe()
        self.answers, writes = os.pipe()
        null = os.open(os.devnull, os.O_WRONLY)
        files = [
            (reads, 3),
            (writes, 4),
            (null, 1),
            (null, 2),
        ]  # it reads commands from 3, and answers on 4
        actions = [(os.POSIX_SPAWN_DUP2, ours, theirs) for ours, theirs in files]
        self.process = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        os.close(null)
        os.close(reads)
        os.close(writes)
        self.count = 0  # of commands
        self.session = {}  # what a command says to be about the page
        self.unread = b""  # the beginning of the next message
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
        }
        self.resize(width, height)
        self.call("Page.navigate", url=address)

    def call(self, method: str, **parameters) -> dict:
        """The result of one command.

        Messages end with a zero byte; events, which have no id, are skipped.
        """
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.unread:
                is_there, _, _ = select.select([self.answers], [], [], PATIENCE)
                block = os.read(self.answers, 2**16) if is_there else b""
                if not block:
                    raise UsageError(f"Chromium does not answer {method}")
                self.unread += block
            line, _, self.unread = self.unread.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.count:
                return answer["result"]

    def resize(self, width: int, height: int) -> None:
        """In pixels of the page."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, script: str):
        """The value of a JavaScript expression in the page; None where it has none yet."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def wait_for(self, script: str) -> None:
        """Until an expression is true in the page."""
        deadline = time.monotonic() + PATIENCE
        while self.evaluate(script) is not True:
            if time.monotonic() > deadline:
                raise UsageError(f"the page is not as it should be within a minute: {script}")
            time.sleep(0.05)

    def picture(self) -> bytes:
        """A PNG of what is in sight."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()
