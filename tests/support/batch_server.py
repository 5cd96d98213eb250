"""The batch APIs of OpenAI and Anthropic on one server. A batch ends when it was looked at
`looks` times, or never where that is -1."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support.family_server import Family

STOPS = {"stop": "end_turn", "length": "max_tokens"}


@dataclass
class BatchProvider(Family):
    """What the server does.

    Args:
        endings: How the batches end, in order: `completed`, `expired` or `cancelled` (the first
            half of the questions is answered), `failed` (none is). Later ones are completed.
        looks: How often a batch is seen to be at work.
        lost: So many creations of a batch are answered by a closed connection.
        busy: So many looks at batches are HTTP 503.
    """

    endings: list[str] = field(default_factory=list)
    looks: int = 1
    lost: int = 0
    busy: int = 0
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # the question's id, each time it was sent
    headers: list[dict[str, str]] = field(default_factory=list)

    def routes(self) -> list[web.RouteDef]:
        ours = [
            web.post("/v1/files", self.upload),
            web.get("/v1/files/{id}/content", self.content),
        ]
        for path in ("/v1/batches", "/v1/messages/batches"):
            ours += [
                web.post(path, self.create),
                web.get(path, self.list),
                web.get(path + "/{id}", self.look),
                web.get(path + "/{id}/results", self.content),
            ]
        return [*super().routes(), *ours]

    async def upload(self, http: web.Request) -> web.Response:
        form = await http.post()
        assert form["purpose"] == "batch"
        name = f"file-{len(self.files)}"
        lines = form["file"].file.read().splitlines()
        self.files[name] = [json.loads(line) for line in lines]
        return web.json_response({"id": name})

    async def create(self, http: web.Request) -> web.Response:
        body = await http.json()
        self.headers.append(dict(http.headers))
        rows = body["requests"] if "requests" in body else self.files[body["input_file_id"]]
        name, n = f"batch-{len(self.batches)}", len(self.batches)
        ending = self.endings[n] if n < len(self.endings) else "completed"
        self.batches[name] = {
            "rows": rows,
            "ending": ending,
            "looks": self.looks,
            "metadata": body.get("metadata"),
            "base": f"{self.url}{http.path}",
        }
        self.asked += [row["custom_id"] for row in rows]
        if self.lost:
            self.lost -= 1
            assert http.transport is not None
            http.transport.close()
        return web.json_response(self.described(name))

    async def list(self, http: web.Request) -> web.Response:
        return web.json_response({"data": [self.described(name) for name in self.batches]})

    async def look(self, http: web.Request) -> web.Response:
        if self.busy:
            self.busy -= 1
            return web.json_response({"error": {"message": "busy"}}, status=503)
        batch = self.batches[http.match_info["id"]]
        batch["looks"] -= batch["looks"] > 0
        return web.json_response(self.described(http.match_info["id"]))

    def described(self, name: str) -> dict[str, Any]:
        """A batch, for either provider."""
        batch = self.batches[name]
        total, ended = len(batch["rows"]), batch["looks"] == 0
        done = self.answered(batch) if ended else 0
        if "messages" in batch["base"]:
            left = "expired" if batch["ending"] == "expired" else "canceled"
            counts = {"processing": 0 if ended else total, "succeeded": done}
            return {
                "id": name,
                "processing_status": "ended" if ended else "in_progress",
                "request_counts": {**counts, left: total - done if ended else 0},
                "results_url": f"{batch['base']}/{name}/results" if ended else None,
                "created_at": "2999-01-01T00:00:00Z",
            }
        failed = batch["ending"] == "failed"
        return {
            "id": name,
            "status": batch["ending"] if ended else "in_progress",
            "request_counts": {"total": total, "completed": done, "failed": 0},
            "output_file_id": f"{name}.out" if ended and done else None,
            "error_file_id": f"{name}.err" if ended and done < total and not failed else None,
            "errors": {"data": [{"message": "the file is too large"}]} if failed else None,
            "metadata": batch["metadata"],
        }

    def answered(self, batch: dict[str, Any]) -> int:
        """How many of a batch's questions are answered."""
        total = len(batch["rows"])
        return {"completed": total, "failed": 0}.get(batch["ending"], total // 2)

    async def content(self, http: web.Request) -> web.Response:
        name, _, kind = http.match_info["id"].partition(".")
        batch = self.batches[name]
        rows, n = batch["rows"], self.answered(batch)
        code = f"batch_{batch['ending']}"
        if "messages" in batch["base"]:
            left = "expired" if batch["ending"] == "expired" else "canceled"
            lines = [self.message(row) for row in rows[:n]]
            lines += [{"custom_id": row["custom_id"], "result": {"type": left}} for row in rows[n:]]
        elif kind == "out":
            lines = [self.completion(row) for row in rows[:n]]
        else:
            error = {"code": code, "message": "not done in time"}
            lines = [
                {"custom_id": r["custom_id"], "response": None, "error": error} for r in rows[n:]
            ]
        text = "".join(json.dumps(line) + "\n" for line in reversed(lines))  # in any order
        return web.Response(text=text)

    def completion(self, row: dict[str, Any]) -> dict[str, Any]:
        """A line of OpenAI's results."""
        body = row["body"]
        self.bodies.append(body)
        found = {"custom_id": row["custom_id"], "error": None}
        if refused := self._refused(body):
            said = json.loads(refused.body)
            return {**found, "response": {"status_code": refused.status, "body": said}}
        answer = {"choices": [self._choice(body)], "usage": {"completion_tokens": 20}}
        return {**found, "response": {"status_code": 200, "body": answer}}

    def message(self, row: dict[str, Any]) -> dict[str, Any]:
        """A line of Anthropic's results."""
        params = row["params"]
        self.bodies.append(params)
        known = {"model", "max_tokens", "messages", "temperature", "top_p", "top_k", "system"}
        assert set(params) <= known | {"stop_sequences"}
        if any(self.bad and self.bad in m["content"] for m in params["messages"]):
            error = {"type": "invalid_request_error", "message": "messages.0: invalid"}
            result: dict[str, Any] = {"type": "errored", "error": {"type": "error", "error": error}}
        else:
            choice = self._choice(params)
            message = {
                "content": [{"type": "text", "text": choice["message"]["content"]}],
                "stop_reason": STOPS[choice["finish_reason"]],
                "usage": {"input_tokens": 50, "output_tokens": 20},
            }
            result = {"type": "succeeded", "message": message}
        return {"custom_id": row["custom_id"], "result": result}
