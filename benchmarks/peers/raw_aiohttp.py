"""The plain loop to beat: a pool of workers over aiohttp. Variants: "" (asyncio, json) · uvloop
(uvloop, orjson) · batch (uvloop, orjson, vLLM's batch endpoint, 32 conversations a POST). Nothing
is kept but a list."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp
import workload

options = workload.arguments()
BATCH = 32 if options.variant == "batch" else 1
HEADERS = {"content-type": "application/json", "authorization": "Bearer x"}
if options.variant:
    import orjson
    import uvloop

    uvloop.install()
    dumps, loads = orjson.dumps, orjson.loads
else:
    dumps, loads = (lambda o: json.dumps(o).encode()), json.loads


async def ask(session: aiohttp.ClientSession, rows: list[dict]) -> list[tuple[str, float]]:
    if BATCH == 1:
        url, body = "/chat/completions", workload.body(rows[0])
    else:
        bodies = [workload.body(row) for row in rows]
        url, body = (
            "/chat/completions/batch",
            {**bodies[0], "messages": [b["messages"] for b in bodies]},
        )
    async with session.post(options.base_url + url, data=dumps(body), headers=HEADERS) as response:
        answer = loads(await response.read())
    return [workload.read({"choices": [choice]}) for choice in answer["choices"]]


async def main() -> None:
    rows = list(workload.rows(options.n))
    jobs = iter([rows[i : i + BATCH] for i in range(0, len(rows), BATCH)])
    found: list[tuple[str, float]] = []
    started = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=options.concurrency)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=600)
    ) as session:

        async def work() -> None:
            for job in jobs:
                found.extend(await ask(session, job))

        await asyncio.gather(*(work() for _ in range(max(1, options.concurrency // BATCH))))
    workload.report(options.n, started, sum(verdict in "AB" for verdict, _ in found))


asyncio.run(main())
