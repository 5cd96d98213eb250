"""The floor: hand-written HTTP/1.1 on `asyncio.Protocol`, uvloop, httptools and orjson. Nothing is
kept but a list."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlparse

import httptools
import orjson
import uvloop
import workload

options = workload.arguments()
url = urlparse(options.base_url)
HEAD = b"POST %s/chat/completions HTTP/1.1\r\nhost: m\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class Client(asyncio.Protocol):
    """One connection with one request in flight."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.parser, self.parts, self.answer = (
            transport,
            httptools.HttpResponseParser(self),
            [],
            None,
        )

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        body, self.parts = b"".join(self.parts), []
        self.answer.set_result(body)

    def post(self, body: bytes) -> asyncio.Future:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(HEAD % (url.path.encode(), len(body)) + body)
        return self.answer


async def main() -> None:
    rows = iter(list(workload.rows(options.n)))
    found: list[tuple[str, float]] = []
    started = time.perf_counter()

    async def work() -> None:
        _, client = await asyncio.get_running_loop().create_connection(
            Client, url.hostname, url.port
        )
        for row in rows:
            found.append(
                workload.read(orjson.loads(await client.post(orjson.dumps(workload.body(row)))))
            )
        client.transport.close()

    await asyncio.gather(*(work() for _ in range(options.concurrency)))
    workload.report(options.n, started, sum(verdict in "AB" for verdict, _ in found))


uvloop.install()
asyncio.run(main())
