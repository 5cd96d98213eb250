"""The batch APIs of hosted providers: the forms of their files, and what their answers mean.

Sources: https://platform.openai.com/docs/guides/batch and
https://docs.anthropic.com/en/docs/build-with-claude/batch-processing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import orjson

from prefab.factory.engines.http import Rejected

Outcome = Literal["answered", "refused", "again", "cancelled"]


@dataclass(frozen=True, slots=True)
class Line:
    """What a provider says of one question.

    Attributes:
        custom_id: The question.
        outcome: `answered`; `refused` (HTTP 4xx, for good); `again` (worth asking again: expired,
            rate limit, server error); `cancelled`.
        body: The chat completion, or the error object.
        status: The HTTP status of a refusal.
        reason: Why there is no answer, in words.
    """

    custom_id: str
    outcome: Outcome
    body: dict[str, Any]
    status: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BatchState:
    """A batch as the provider describes it.

    Attributes:
        id: The provider's name for it.
        ended: Whether nothing more will come.
        done: Questions that are answered or have failed.
        files: Paths or addresses of the results.
        failure: Why the whole batch was refused; empty where it was not.
        token: The mark that it was created with, where the provider keeps one.
        created: Seconds since 1970.
    """

    id: str
    ended: bool
    done: int
    total: int
    files: tuple[str, ...]
    failure: str = ""
    token: str = ""
    created: float = 0.0


class BatchFormat(Protocol):
    """One provider's batch API."""

    base_url: str
    api_key_env: str
    path: str  # of batches
    max_questions: int
    max_bytes: int
    uploads: bool  # whether the questions are uploaded as a file first
    logprobs: bool

    def headers(self, key: str) -> dict[str, str]:
        """The headers that show the key."""

    def question(self, custom_id: str, body: dict[str, Any]) -> bytes:
        """One question as JSON. Raises: Rejected for a field that the API does not have."""

    def create(self, questions: Sequence[bytes], file: str, token: str) -> bytes:
        """The body that creates a batch."""

    def state(self, found: Mapping[str, Any]) -> BatchState:
        """What an answer about a batch says."""

    def line(self, found: Mapping[str, Any]) -> Line:
        """One line of the results."""


class OpenAIBatches:
    """OpenAI's: a file of requests, a batch, and files of answers and errors."""

    base_url, api_key_env, path = "https://api.openai.com/v1", "OPENAI_API_KEY", "/batches"
    max_questions, max_bytes, uploads, logprobs = 50_000, 190 * 2**20, True, True

    def headers(self, key: str) -> dict[str, str]:
        """As `BatchFormat.headers`."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def question(self, custom_id: str, body: dict[str, Any]) -> bytes:
        """As `BatchFormat.question`."""
        url = "/v1/chat/completions"
        return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})

    def create(self, questions: Sequence[bytes], file: str, token: str) -> bytes:
        """As `BatchFormat.create`."""
        return orjson.dumps(
            {
                "input_file_id": file,
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
                "metadata": {"prefab": token},
            }
        )

    def state(self, found: Mapping[str, Any]) -> BatchState:
        """As `BatchFormat.state`."""
        status, counts = found.get("status"), found.get("request_counts") or {}
        files = [found.get(f"{kind}_file_id") for kind in ("output", "error")]
        errors = (found.get("errors") or {}).get("data") or [{}]
        said = str(errors[0].get("message") or "the batch failed")
        return BatchState(
            str(found["id"]),
            status in ("completed", "failed", "expired", "cancelled"),
            int(counts.get("completed") or 0) + int(counts.get("failed") or 0),
            int(counts.get("total") or 0),
            tuple(f"/files/{file}/content" for file in files if file),
            said if status == "failed" else "",
            str((found.get("metadata") or {}).get("prefab") or ""),
            float(found.get("created_at") or 0),
        )

    def line(self, found: Mapping[str, Any]) -> Line:
        """As `BatchFormat.line`."""
        name, error = str(found["custom_id"]), found.get("error") or {}
        response = found.get("response") or {}
        status, body = int(response.get("status_code") or 0), response.get("body") or {}
        if status == 200:
            return Line(name, "answered", body)
        if "cancel" in str(error.get("code")):
            return Line(name, "cancelled", {}, reason="the batch was cancelled")
        told = body.get("error")
        detail: dict[str, Any] = told if isinstance(told, dict) else error
        said = str(detail.get("message") or detail.get("code") or "no answer")
        if 400 <= status < 500 and status not in (408, 409, 429):
            return Line(name, "refused", dict(detail), status, said)
        return Line(name, "again", {}, reason=f"HTTP {status} {said}" if status else said)


class AnthropicBatches:
    """Anthropic's: the questions are in the request that creates a batch, the answers in one file.
    Questions and answers are translated from and to chat completions.
    """

    base_url, api_key_env = "https://api.anthropic.com", "ANTHROPIC_API_KEY"
    path = "/v1/messages/batches"
    max_questions, max_bytes, uploads, logprobs = 100_000, 240 * 2**20, False, False
    stops = {
        "end_turn": "stop",
        "stop_sequence": "stop",
        "max_tokens": "length",
        "refusal": "content_filter",
    }

    def headers(self, key: str) -> dict[str, str]:
        """As `BatchFormat.headers`."""
        return {"x-api-key": key, "anthropic-version": "2023-06-01"}

    def question(self, custom_id: str, body: dict[str, Any]) -> bytes:
        """As `BatchFormat.question`."""
        for name, neutral in (
            ("frequency_penalty", 0.0),
            ("presence_penalty", 0.0),
            ("min_p", 0.0),
            ("repetition_penalty", 1.0),
            ("tools", None),
        ):
            if body.get(name, neutral) != neutral:
                raise Rejected(400, f"Anthropic's batches have no {name}", {"param": name})
        system = "\n\n".join(m["content"] for m in body["messages"] if m["role"] == "system")
        params = {
            "model": body["model"],
            "max_tokens": body.get("max_tokens") or body.get("max_completion_tokens"),
            "messages": [m for m in body["messages"] if m["role"] != "system"],
            "temperature": body.get("temperature", 1.0),
            # both of temperature and top_p are refused by some models
            "top_p": body.get("top_p") if body.get("top_p", 1.0) != 1.0 else None,
            "top_k": body.get("top_k") or None,
            "stop_sequences": body.get("stop") or None,
            "system": system or None,
        }
        kept = {name: value for name, value in params.items() if value is not None}
        return orjson.dumps({"custom_id": custom_id, "params": kept})

    def create(self, questions: Sequence[bytes], file: str, token: str) -> bytes:
        """As `BatchFormat.create`."""
        return b'{"requests":[%b]}' % b",".join(questions)

    def state(self, found: Mapping[str, Any]) -> BatchState:
        """As `BatchFormat.state`."""
        from datetime import datetime

        counts = found.get("request_counts") or {}
        total = sum(int(n) for n in counts.values())
        url, at = found.get("results_url"), found.get("created_at")
        return BatchState(
            str(found["id"]),
            found.get("processing_status") == "ended",
            total - int(counts.get("processing") or 0),
            total,
            (str(url),) if url else (),
            created=datetime.fromisoformat(str(at)).timestamp() if at else 0.0,
        )

    def line(self, found: Mapping[str, Any]) -> Line:
        """As `BatchFormat.line`."""
        name, result = str(found["custom_id"]), found.get("result") or {}
        kind = result.get("type")
        if kind == "succeeded":
            return Line(name, "answered", self._chat(result["message"]))
        if kind == "canceled":
            return Line(name, "cancelled", {}, reason="the batch was cancelled")
        error = result.get("error") or {}
        error = error.get("error") or error
        said = str(error.get("message") or kind)
        if error.get("type") in ("invalid_request_error", "request_too_large"):
            return Line(name, "refused", dict(error), 400, said)
        return Line(name, "again", {}, reason=said)

    def _chat(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """An answer as a chat completion."""
        usage = message.get("usage") or {}
        text = "".join(b.get("text", "") for b in message["content"] if b.get("type") == "text")
        stop = str(message.get("stop_reason"))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": self.stops.get(stop, stop),
        }
        return {
            "choices": [choice],
            "usage": {
                "prompt_tokens": usage.get("input_tokens"),
                "completion_tokens": usage.get("output_tokens"),
            },
        }


FORMATS: dict[str, BatchFormat] = {"openai": OpenAIBatches(), "anthropic": AnthropicBatches()}
