"""What the kill test kills, and what counts for it.

`python kill_driver.py serve` is an HTTP server that prints its port, answers by `miniworld.answer`,
and counts every question under its key (`GET /counts`, with the number of open connections).
`python kill_driver.py run STORE PORT` is the run: miniworld's pipeline against that server, the
ledger closed, the store filled. It is killed from outside, or by itself at `PREFAB_KILL_AT`."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import aiohttp
from aiohttp import web

from prefab.factory.types import Completion, Engine, Message, Request, Sampling
from tests.support.miniworld import MODEL, answer, run

PROMPTS, IN_FLIGHT = 12, 8
DELAY_S = 0.01


class HttpEngine(Engine):
    """Asks the counting server."""

    identity, max_in_flight, max_model_len = MODEL, IN_FLIGHT, 50

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self.session, self.url = session, f"http://127.0.0.1:{port}/ask"

    async def complete(self, key: bytes, request: Request) -> Completion:
        body = {
            "key": key.hex(),
            "text": request.messages[0].content,
            "labels": list(request.labels),
        }
        async with self.session.post(self.url, json=body) as response:
            return Completion(**await response.json())


async def drive(folder: Path, port: int) -> None:
    """The whole run, and the filling in small batches so that there is a middle to be killed in."""
    from prefab.pipelines.store import fill

    fill.FIRST_BATCH, fill.USES_PAGE = 3, 100
    async with aiohttp.ClientSession() as session:
        await run(folder, PROMPTS, HttpEngine(session, port))
    report = fill.fill(folder)
    print(report, flush=True)


async def serve() -> None:
    """Answer and count until killed."""
    counts: Counter[str] = Counter()

    async def ask(http: web.Request) -> web.Response:
        body = await http.json()
        counts[body["key"]] += 1
        await asyncio.sleep(random.random() * DELAY_S)
        request = Request(
            MODEL, (Message("user", body["text"]),), Sampling(1), tuple(body["labels"])
        )
        return web.json_response(
            asdict(answer(bytes.fromhex(body["key"]), request, HttpEngine.max_model_len))
        )

    async def tell(http: web.Request) -> web.Response:
        others = len(runner.server.connections) - 1  # this request has one of its own
        return web.json_response({"counts": counts, "others": others})

    app = web.Application()
    app.add_routes([web.post("/ask", ask), web.get("/counts", tell)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve() if sys.argv[1] == "serve" else drive(Path(sys.argv[2]), int(sys.argv[3])))
