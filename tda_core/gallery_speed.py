"""How long a gallery takes to open: from navigation until a browser has drawn the first query's proponents.

    python -m tda_core.gallery_speed --documents 10000 100000

Makes score files of so many made-up documents of about 300 characters, writes the page, and opens it from the disk in
headless Chromium, several times, each in a new tab (the first in a cold browser). The clock is the page's own, in real
time: it marks the first frame after its first view (`performance.mark("shown")`), from the navigation's beginning on.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tda_core.files import atomic_write
from tda_core.gallery import gallery
from tda_core.score_file import About, Items, ScoreFile

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1200,900")
SHOWN = 'performance.getEntriesByName("shown")[0]?.startTime'
START, WAIT = 60, 120  # seconds until a browser, and a page, is given up


@dataclass(frozen=True)
class Opening:
    """write_s: seconds that making the page took. page_mb, examples: its size, and the documents in it. shown_ms: of
    each opening, from navigation to the first view."""

    documents: int
    examples: int
    write_s: float
    page_mb: float
    shown_ms: tuple[float, ...]

    @property
    def typical_ms(self) -> float:
        return statistics.median(self.shown_ms)


def browser() -> str | None:
    """The Chromium of this machine, None where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def made_up(n: int, *, queries: int = 50, methods: int = 2, seed: int = 0) -> list[ScoreFile]:
    """Score files of n documents of 45 made-up words, some words common and most rare, as in real text."""
    rng = np.random.default_rng(seed)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnoprstuvwy"), 2 + k % 9)) for k in range(20_000)])
    common = 1 / np.arange(1, len(words) + 1)

    def items(count: int, kind: str) -> Items:
        picked = words[rng.choice(len(words), (count, 45), p=common / common.sum())]
        ids = tuple(f"{kind}-{i}" for i in range(count))
        return Items(ids, tuple(map(" ".join, picked)), tuple(f"source {i % 7}" for i in range(count)))

    train, asked = items(n, "document"), items(queries, "query")
    source = torch.Generator().manual_seed(seed)
    return [
        ScoreFile(torch.randn(queries, n, generator=source), About(f"method {k}", "loss"), train, asked)
        for k in range(methods)
    ]


def openings(page: Path, times: int) -> list[float]:
    """Milliseconds from navigation to the first view, of so many openings of this page in one new browser.

    Raises FileNotFoundError without Chromium, and TimeoutError for a page that shows nothing.
    """
    program = browser()
    if program is None:
        raise FileNotFoundError(f"no Chromium on this machine, expected one of: {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(prefix="tda_core_browser_", ignore_cleanup_errors=True) as folder:
        command = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                return asyncio.run(_openings(Path(folder) / "DevToolsActivePort", page.resolve().as_uri(), times))
            finally:
                process.terminate()


async def _openings(port_file: Path, address: str, times: int) -> list[float]:
    from tornado.websocket import websocket_connect  # comes with Jupyter; nothing else here needs it

    end = time.monotonic() + START
    while not (port_file.exists() and port_file.read_text().count("\n")):
        if time.monotonic() > end:
            raise TimeoutError("Chromium did not start")
        await asyncio.sleep(0.05)
    server = f"http://127.0.0.1:{port_file.read_text().split()[0]}/json"

    found = []
    for _ in range(times):
        request = urllib.request.Request(f"{server}/new?about:blank", method="PUT")
        with urllib.request.urlopen(request) as reply:
            tab = json.load(reply)
        connection = await websocket_connect(tab["webSocketDebuggerUrl"], max_message_size=2**28)
        await _ask(connection, "Page.navigate", url=address)
        found.append(await _when_shown(connection))
        connection.close()
        urllib.request.urlopen(f"{server}/close/{tab['id']}").close()
    return found


async def _when_shown(connection) -> float:
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        answer = await _ask(connection, "Runtime.evaluate", expression=SHOWN)
        if "value" in answer.get("result", {}):
            return float(answer["result"]["value"])
        await asyncio.sleep(0.05)
    raise TimeoutError(f"the page showed nothing in {WAIT} s")


async def _ask(connection, method: str, **parameters: object) -> dict:
    """The answer to one message of the browser's debugging protocol; events are passed over."""
    await connection.write_message(json.dumps({"id": 1, "method": method, "params": parameters}))
    while True:
        text = await connection.read_message()
        if text is None:
            raise ConnectionError(f"Chromium ended while it was asked for {method}")
        answer = json.loads(text)
        if answer.get("id") == 1:
            return answer.get("result", {})


def measure(n: int, folder: Path, times: int = 5) -> Opening:
    """Make a gallery of n documents in this folder, and open it."""
    files = made_up(n)
    start = time.perf_counter()
    page = gallery(files)
    seconds = time.perf_counter() - start
    path = folder / f"gallery_{n}.html"
    atomic_write(path, page)
    rows = [row for file in files for row in file.scores]
    kept = {int(i) for row in rows for i in (*row.topk(min(100, n)).indices, *(-row).topk(min(100, n)).indices)}
    return Opening(n, len(kept), seconds, path.stat().st_size / 1e6, tuple(openings(path, times)))


def table(found: Sequence[Opening]) -> str:
    """The measurements, with ratios to the first."""
    lines = [" documents  in page  page MB written s  shown ms   from     to  ratio"]
    for one in found:
        ratio = one.typical_ms / found[0].typical_ms
        lines.append(
            f"{one.documents:>10,} {one.examples:>8,} {one.page_mb:>8.2f} {one.write_s:>9.2f} {one.typical_ms:>9.0f} "
            f"{min(one.shown_ms):>6.0f} {max(one.shown_ms):>6.0f} {ratio:>6.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where there is no browser."""
    parser = argparse.ArgumentParser(prog="python -m tda_core.gallery_speed", description="How fast a gallery opens.")
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--times", type=int, default=5, help="openings of each page")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="tda_core_gallery_") as folder:
            print(table([measure(n, Path(folder), given.times) for n in given.documents]))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
