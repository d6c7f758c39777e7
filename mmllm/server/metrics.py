"""Metrics for Prometheus: counts and durations, nothing of the contents of requests."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mmllm.inference.replies import Reply

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mmllm_requests", "Requests answered.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "mmllm_request_seconds",
            "From a request's headers to the end of its answer.",
            ["path"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.first_token = Histogram(
            "mmllm_first_token_seconds",
            "From the engine's taking up to the first token.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.tokens = Counter("mmllm_tokens", "Tokens.", ["kind"], registry=self.registry)
        self.media = Counter("mmllm_media", "Media made.", ["modality"], registry=self.registry)
        self.cancelled = Counter(
            "mmllm_cancelled", "Answers that nobody waited for.", registry=self.registry
        )
        self.waiting = Gauge(
            "mmllm_waiting", "Requests that wait for the engine.", registry=self.registry
        )
        self.running = Gauge(
            "mmllm_running", "Requests that are being answered.", registry=self.registry
        )

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Set the sources of the gauges: queue length and running requests."""
        self.waiting.set_function(waiting)
        self.running.set_function(running)

    def count(self, reply: Reply) -> None:
        """Count a finished reply."""
        self.first_token.observe(reply.timings.first_token)
        for kind in ("prompt", "cached", "text", "signals"):
            self.tokens.labels(kind).inc(getattr(reply.usage, kind))
        for medium in reply.media:
            self.media.labels(medium.modality).inc()

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
