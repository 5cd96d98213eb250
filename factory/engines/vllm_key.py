"""Middleware of vLLM's server (`--middleware`): no route answers without this server's key.

vLLM's own `--api-key` guards `/v1` alone, not `/collective_rpc`, `/metrics` or `/tokenize`. Threat:
every user of the machine, and every web page that a browser on it shows, can reach a loopback port.
It runs in vLLM's process, so it imports nothing of Prefab.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

SERVER_KEY = "PREFAB_SERVER_KEY"  # the environment variable with the key, not on a command line
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": _BODY})

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self.wanted)
