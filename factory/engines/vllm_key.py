"""Middleware of vLLM's server (`--middleware`): no route answers without this server's key.

vLLM's own `--api-key` guards `/v1` alone, not `/collective_rpc`, `/metrics` or `/tokenize`. Threat:
every user of the machine, and every web page that a browser on it shows, can reach a loopback port.
It runs in vLLM's process, so it imports nothing of Prefab.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

SERVER_KEY = "PREFAB_SERVER_KEY"  # the environment variable with the key, not on a command line
SERVER_USED = "PREFAB_SERVER_USED"  # that with the file whose time of change is the last use
BUSY_S = 86400.0  # while something is being answered, the last use lies so far in the future
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_BODY = b'{"error": {"message": "this server wants its key", "code": 401}}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]


class RequireKey:
    """An ASGI application that answers 401 to every request without `Authorization: Bearer KEY`,
    and passes others on.

    Raises: RuntimeError: the environment names no key.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        key = os.environ.get(SERVER_KEY, "")
        if not key:
            raise RuntimeError(f"{SERVER_KEY} is not set: this server would be open to everyone")
        self.app, self.wanted = app, b"Bearer " + key.encode()
        self.used_file, self.answering = os.environ.get(SERVER_USED, ""), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan" or self._has_key(scope):
            if self.used_file and scope.get("method") == "POST":
                return await self._count(scope, receive, send)
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": _BODY})

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a question, and mark the server as in use for so long."""
        self.answering += 1
        try:
            if self.answering == 1:
                self._mark(time.time() + BUSY_S)
            await self.app(scope, receive, send)
        finally:
            self.answering -= 1
            if not self.answering:
                self._mark(time.time())

    def _mark(self, used: float) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.used_file, (used, used))

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self.wanted)
