"""OpenTelemetry spans of calls and stages, sent where the standard variables
OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT say.

Calls have the attributes of the semantic conventions for generative AI; texts are not sent.
Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import prefab
from prefab.factory import telemetry
from prefab.factory.console import warn
from prefab.factory.errors import reason_of
from prefab.factory.extras import install_command
from prefab.factory.telemetry import CallEvent, Value
from prefab.factory.types import Completion

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class TraceObserver:
    """Makes a span of each call and stage."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer

    def call(self, event: CallEvent) -> None:
        """A span of kind client, with the call's times."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        model = getattr(getattr(event.engine, "config", None), "model", event.request.model)
        span = self.tracer.start_span(
            f"chat {model}",
            kind=SpanKind.CLIENT,
            attributes=_asked(event, str(model)) | _answered(event.outcome),
            start_time=event.began_ns,
        )
        if isinstance(event.outcome, Exception):
            span.set_status(Status(StatusCode.ERROR, reason_of(event.outcome)))
        span.end(event.ended_ns)

    @contextmanager
    def stage(self, name: str, attributes: dict[str, Value]) -> Iterator[None]:
        """A span around the stage; calls and stages within it are its children."""
        from opentelemetry.trace import Status, StatusCode

        given = {f"prefab.{key}": value for key, value in attributes.items()}
        with self.tracer.start_as_current_span(
            name, attributes=given, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR, reason_of(error)))
                raise


def _asked(event: CallEvent, model: str) -> dict[str, Value | list[str]]:
    """The attributes of a question."""
    request, use = event.request, event.use
    found: dict[str, Value | list[str]] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": type(event.engine).__name__.lower(),
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": request.sampling.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        "gen_ai.output.type": "text",
        "prefab.key": event.key.hex(),
        "prefab.role": use.role,
        "prefab.prompt": use.prompt,
    }
    names = {"prefab.judge": use.judge, "prefab.principle": use.principle}
    found.update((name, value) for name, value in names.items() if value)
    return found


def _answered(outcome: Completion | BaseException) -> dict[str, Value | list[str]]:
    """The attributes of an answer or an error."""
    if not isinstance(outcome, Completion):
        return {"error.type": type(outcome).__name__}
    found: dict[str, Value | list[str]] = {
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.completion_tokens,
        "gen_ai.response.finish_reasons": [outcome.finish],
    }
    server = urlsplit(outcome.replica)
    if server.hostname:
        found["server.address"] = server.hostname
        found["server.port"] = server.port or (443 if server.scheme == "https" else 80)
    return found


@contextmanager
def tracing(provider: TracerProvider) -> Iterator[None]:
    """Within it, calls and stages become spans of this provider."""
    tracer = provider.get_tracer("prefab", prefab.__version__)
    with telemetry.observing(TraceObserver(tracer)):
        yield


@contextmanager
def tracing_by_environment() -> Iterator[None]:
    """As `tracing`, with an exporter by OTLP over HTTP, where an endpoint is set and nothing traces
    yet. All spans are sent at the end of it.
    """
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    there = any(isinstance(one, TraceObserver) for one in telemetry.observers)
    if off or there or not any(map(os.environ.get, ENDPOINTS)):
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        endpoint = next(name for name in ENDPOINTS if os.environ.get(name))
        warn(f"{endpoint} is set, and no spans are sent: {install_command('telemetry')}")
        yield
        return
    name = os.environ.get("OTEL_SERVICE_NAME") or "prefab"
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        with tracing(provider):
            yield
    finally:
        provider.shutdown()
