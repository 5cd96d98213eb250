"""Metrics of a run for Prometheus, at `/metrics` of a port of this machine alone.

They are read from the run's own counters when somebody asks, so that they cost a call nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefab.factory.console import say
from prefab.factory.errors import ConfigError
from prefab.factory.extras import missing_package
from prefab.factory.ledger.ledger import Ledger
from prefab.pipelines.run.context import Context

if TYPE_CHECKING:
    from prometheus_client.core import Metric

HOST = "127.0.0.1"


class RunCollector:
    """Gives the metrics of a run. `total` is the number of its prompts, where that is known."""

    def __init__(self, ctx: Context, ledger: Ledger, total: int | None) -> None:
        self.ctx, self.ledger, self.total = ctx, ledger, total
        self.began = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """Each metric with its values now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats, counts = self.ledger.stats, self.ctx.counts
        for name, about, value in (
            ("prefab_calls", "Model calls made.", stats.asked),
            ("prefab_reused", "Answers found in the ledger.", stats.reused),
            ("prefab_failed", "Calls without an answer after all retries.", counts.failed),
            ("prefab_prompts", "Prompts finished.", counts.prompts),
        ):
            yield CounterMetricFamily(name, about, value=value)
        tokens = CounterMetricFamily("prefab_tokens", "Tokens of the calls made.", labels=["kind"])
        tokens.add_metric(["prompt"], stats.prompt_tokens)
        tokens.add_metric(["completion"], stats.completion_tokens)
        yield tokens
        retries = CounterMetricFamily(
            "prefab_retries", "Tries beyond the first.", labels=["server"]
        )
        for server in (one for engine in self.ctx.engines.values() for one in engine.servers):
            retries.add_metric([server.url], server.retries)
        yield retries
        unscored = CounterMetricFamily(
            "prefab_unscored", "Answers that could not be read.", labels=["role", "reason"]
        )
        for (role, reason), n in sorted(counts.unscored.items()):
            unscored.add_metric([role, reason], n)
        yield unscored
        yield GaugeMetricFamily("prefab_in_flight", "Calls in flight.", value=stats.in_flight)
        yield GaugeMetricFamily("prefab_queued", "Calls that wait.", value=self.ledger.queued)
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        """What may not be known: the number of prompts, budgets, the time left."""
        from prometheus_client.core import GaugeMetricFamily

        if self.total is not None:
            yield GaugeMetricFamily(
                "prefab_prompts_planned", "Prompts of the run.", value=self.total
            )
        budget = self.ctx.config.budget
        limits = GaugeMetricFamily("prefab_budget", "Caps of the budget.", labels=["of"])
        for name, limit in (("calls", budget.calls), ("tokens", budget.tokens)):
            if limit is not None:
                limits.add_metric([name], limit)
        yield limits
        share = self.ctx.counts.share(self.total)
        if share:
            left = (time.monotonic() - self.began) * (1 - share) / share
            yield GaugeMetricFamily("prefab_left_seconds", "Estimated time left.", value=left)


@contextmanager
def serving_metrics(
    port: int | None, ctx: Context, ledger: Ledger, total: int | None, quiet: bool = True
) -> Iterator[int]:
    """Within it, serve the metrics of a run at this port (0: a free one); at none where it is None.

    Yields:
        The port; 0 where nothing is served.

    Raises:
        ConfigError: The package prometheus_client is missing, or the port is in use.
    """
    if port is None:
        yield 0
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ModuleNotFoundError as error:
        raise missing_package(error.name, "`prefab run --metrics`") from error
    registry = CollectorRegistry()
    registry.register(RunCollector(ctx, ledger, total))
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        raise ConfigError(f"--metrics {port}: {error.strerror}") from None
    if not quiet:
        say(f"metrics: http://{HOST}:{server.server_port}/metrics", stderr=True)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
