"""Spans and metrics of a run, read by OpenTelemetry's and Prometheus's own code."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families

from prefab import run
from prefab.factory import telemetry
from prefab.factory.errors import ConfigError, TransportError
from prefab.factory.tracing import ENDPOINTS, tracing, tracing_by_environment
from prefab.factory.types import Completion, Engine
from tests.support import project


@pytest.fixture
def spans():
    """Traces what is done meanwhile; gives the finished spans."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with tracing(provider):
        yield exporter.get_finished_spans
    assert not telemetry.observers


def test_each_call_is_a_span_below_that_of_the_run(tmp_path, spans):
    result = run(project.pipeline(tmp_path, prompts=2), engines=project.engine())
    (root,) = [span for span in spans() if span.name == "run"]
    assert root.attributes["prefab.name"] == "small" and root.parent is None
    calls = [span for span in spans() if span.name.startswith("chat ")]
    assert len(calls) == result.asked > 0
    assert {span.parent.span_id for span in calls} == {root.context.span_id}
    assert {span.kind for span in calls} == {SpanKind.CLIENT}
    roles = Counter(span.attributes["prefab.role"] for span in calls)
    assert roles["sample"] == 6 and roles["judge"] > 0
    known = {value for name, value in vars(gen_ai_attributes).items() if name.isupper()}
    for span in calls:
        given = {name for name in span.attributes if name.startswith("gen_ai.")}
        assert given <= known and "gen_ai.operation.name" in given
        assert span.end_time >= span.start_time
    assert sum(s.attributes["gen_ai.usage.output_tokens"] for s in calls) == (
        result.completion_tokens
    )
    assert "Question" not in "".join(span.to_json() for span in spans())
    stages = {span.name: span for span in spans() if span.parent and span not in calls}
    assert {"ask", "fill store"} <= set(stages)


def test_what_is_reused_is_no_call(tmp_path, spans):
    value = project.pipeline(tmp_path, prompts=1)
    run(value, engines=project.engine())
    before = len([span for span in spans() if span.name.startswith("chat ")])
    run(value, engines=project.engine())
    assert len([span for span in spans() if span.name.startswith("chat ")]) == before > 0


class Failing(Engine):
    """Fails for one prompt."""

    identity, max_in_flight = "name:failing", 4

    async def complete(self, key, request):
        if "Question 0?" in request.messages[-1].content:
            raise TransportError("http://127.0.0.1:9/v1: HTTP 503 busy")
        return Completion("x", "stop", replica="https://models.example/v1")


def test_a_failed_call_is_an_error_without_its_texts(tmp_path, spans):
    value = project.pipeline(tmp_path, prompts=2, budget={"failed": None})
    run(value, engines={"local": Failing()})
    calls = [span for span in spans() if span.name.startswith("chat ")]
    failed = [span for span in calls if span.status.status_code is StatusCode.ERROR]
    assert {span.attributes["prefab.prompt"] for span in failed} == {"p0"}
    assert {span.attributes["error.type"] for span in failed} == {"TransportError"}
    done = next(span for span in calls if span not in failed)
    assert done.attributes["server.address"] == "models.example"
    assert done.attributes["server.port"] == 443


@contextmanager
def receiver():
    """A collector of OTLP over HTTP: its address, and what it was sent."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_collector_gets_all_spans_by_the_end(tmp_path, monkeypatch):
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    with receiver() as (url, got):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        result = run(project.pipeline(tmp_path, prompts=2), engines=project.engine())
        sent = [
            span
            for request in got
            for of in request.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
        ]
        assert sum(span.name.startswith("chat ") for span in sent) == result.asked
        services = {
            attribute.value.string_value
            for request in got
            for of in request.resource_spans
            for attribute in of.resource.attributes
            if attribute.key == "service.name"
        }
        assert services == {"prefab"} and not telemetry.observers


def test_without_the_package_a_line_says_so_and_the_work_goes_on(monkeypatch, capsys):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with tracing_by_environment():
        assert not telemetry.observers
    assert "no spans are sent" in capsys.readouterr().err


def metrics_of(page: str) -> dict[str, float]:
    """The samples of a page, by name and labels."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_metrics_are_those_of_the_run(tmp_path):
    from prefab.factory.ledger.ledger import Ledger
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.run.context import Context
    from prefab.pipelines.run.metrics import serving_metrics

    value = project.pipeline(tmp_path, prompts=2, budget={"calls": 1000})
    ledger = Ledger.open(tmp_path / "store")
    try:
        ctx = Context.of(resolve_pipeline(value), 1, ledger, project.engine())
        ledger.stats.asked, ledger.stats.prompt_tokens, ledger.stats.in_flight = 7, 90, 3
        ctx.counts.prompts, ctx.counts.of_finished, ctx.counts.answers = 1, 10, 15
        ctx.unscored("judge", 'par"se')
        with (
            serving_metrics(0, ctx, ledger, 2) as port,
            urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page,
        ):
            found = metrics_of(page.read().decode())
        with pytest.raises(OSError):
            urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60)
    finally:
        ledger._writer.close()
    assert found["prefab_calls_total"] == 7 and found["prefab_tokens_total prompt"] == 90
    assert found['prefab_unscored_total par"se judge'] == 1
    assert found["prefab_in_flight"] == 3 and found["prefab_queued"] == 0
    assert found["prefab_prompts_planned"] == 2 and found["prefab_budget calls"] == 1000
    assert found["prefab_left_seconds"] > 0


def test_a_run_serves_metrics_while_it_works(tmp_path):
    value, pages = project.pipeline(tmp_path, prompts=2), []
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as taken:
        with pytest.raises(ConfigError, match=f"--metrics {taken.server_port}: Address"):
            run(value, engines=project.engine(), metrics_port=taken.server_port)
        port = taken.server_port

    class Reading(Engine):
        """Reads the metrics at each question."""

        identity, max_in_flight = "name:reading", 1

        async def complete(self, key, request):
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
                pages.append(metrics_of(page.read().decode()))
            return project.answer(request)

    run(value, engines={"local": Reading()}, metrics_port=port)
    assert pages[0]["prefab_calls_total"] == 0 < pages[-1]["prefab_calls_total"] < len(pages)
    assert pages[0]["prefab_in_flight"] == 1 and pages[0]["prefab_queued"] > 0
