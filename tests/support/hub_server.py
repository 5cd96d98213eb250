"""A stand-in for the hub's HTTP API, as far as creating a repository and committing files go."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any


@contextmanager
def hub_server(files: Sequence[str]) -> Iterator[Any]:
    """A hub whose repositories hold these files. It has `address`, and what it was asked:
    `created` and `commits`. Repositories called `forbidden` are refused."""
    hub = SimpleNamespace(created=[], commits=[], address="")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            """Nothing is printed."""

        def reply(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if "/tree/" not in self.path:  # the client also asks for a list of coding agents
                return self.reply({"error": "not here"}, 404)
            self.reply([{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in files])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/create"):
                value = json.loads(body)
                if value["name"] == "forbidden":
                    return self.reply({"error": "no"}, 403)
                hub.created.append(value)
                return self.reply({"url": f"{hub.address}/datasets/me/{value['name']}"})
            if "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                return self.reply(
                    {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for f in asked
                        ]
                    }
                )
            if "/commit/" not in self.path:  # a check of the card
                return self.reply({"errors": [], "warnings": []})
            hub.commits.append(body.decode())
            url = f"{hub.address}/datasets/me/data/commit/{'0' * 40}"
            self.reply({"success": True, "commitOid": "0" * 40, "commitUrl": url})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
