"""Headless Chromium by its DevTools protocol: open a page, wait until it shows something, read it, take a picture."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

# Charts in the window with the corners of each line in it; one without height or width is none.
_CURVES = r"""
Array.from(document.querySelectorAll(".js-plotly-plot"), (plot, number) => [
  (plot.parentElement.closest("[data-testid]") || plot).innerText.split("\n")[0] + " #" + number,
  Array.from(plot.querySelectorAll("path.js-line"), (line) => {
    const box = line.getBoundingClientRect();
    const seen = box.width > 50 && box.height > 5 && box.top >= 0 && box.bottom <= window.innerHeight;
    return seen ? (line.getAttribute("d") || "").split(/[ML]/).length - 1 : 0;
  }),
])
"""


class Page:
    """A page in a browser of its own."""

    def __init__(self, socket, session: str):
        self._socket, self._session, self._number = socket, session, 0

    async def call(self, method: str, **parameters):
        """One command; events are passed over."""
        self._number += 1
        await self._socket.send_json(
            {"id": self._number, "method": method, "params": parameters, "sessionId": self._session}
        )
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), 30)
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                return message["result"]

    async def text(self) -> str:
        """What the page shows as text."""
        result = await self.call(
            "Runtime.evaluate", expression="document.body ? document.body.innerText : ''"
        )
        return result["result"].get("value", "")

    async def open(self, address: str, *words: str, seconds: float = 60) -> str:
        """Go to an address and wait until the page shows all words."""
        await self.call("Page.navigate", url=address)
        deadline = time.monotonic() + seconds
        while True:
            shown = await self.text()
            if all(word in shown for word in words):
                return shown
            assert time.monotonic() < deadline, f"{address} does not show {words}, but:\n{shown[:3000]}"
            await asyncio.sleep(0.3)

    async def curves(self, number: int, points: int, seconds: float = 60) -> dict[str, list[int]]:
        """Wait until so many charts of plotly show a curve of so many points: of each title, its curves' points."""
        deadline = time.monotonic() + seconds
        while True:
            result = await self.call("Runtime.evaluate", expression=_CURVES, returnByValue=True)
            drawn = dict(result["result"].get("value", []))
            if sum(max(lengths, default=0) >= points for lengths in drawn.values()) >= number:
                return drawn
            assert time.monotonic() < deadline, f"{number} curves of {points} points wanted, drawn: {drawn}"
            await asyncio.sleep(0.3)

    async def picture(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


def look(profile: Path, visit, *, width: int = 1500, height: int = 1100):
    """Run the coroutine function `visit` with a new `Page`, and return what it returns."""
    return asyncio.run(_look(profile, visit, width, height))


async def _look(profile: Path, visit, width: int, height: int):
    import aiohttp

    browser = next(
        (b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None
    )
    assert browser, "no browser: apt-get install chromium"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server"]
    options += [f"--window-size={width},{height}", f"--user-data-dir={profile}", "--remote-debugging-port=0"]
    # Whatever a page would load from elsewhere, it cannot.
    options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    process = subprocess.Popen(
        [browser, *options, "about:blank"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        address = None
        for line in process.stderr:
            if match := re.search(r"DevTools listening on (ws://\S+)", line):
                address = match[1]
                break
        assert address, "the browser did not start"
        async with aiohttp.ClientSession() as client, client.ws_connect(address, max_msg_size=0) as socket:
            await socket.send_json(
                {"id": 0, "method": "Target.createTarget", "params": {"url": "about:blank"}}
            )
            target = (await _answer(socket, 0))["targetId"]
            attach = {"targetId": target, "flatten": True}
            await socket.send_json({"id": -1, "method": "Target.attachToTarget", "params": attach})
            page = Page(socket, (await _answer(socket, -1))["sessionId"])
            await page.call("Page.enable")
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            await page.call("Emulation.setDeviceMetricsOverride", **size)
            return await visit(page)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


async def _answer(socket, number: int):
    while True:
        message = await asyncio.wait_for(socket.receive_json(), 30)
        if message.get("id") == number:
            return message["result"]
