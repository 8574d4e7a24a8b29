"""What Prometheus is told: requests, times, and the engine's own counts."""

from collections.abc import Iterator
import time

import prometheus_client
from prometheus_client import core

from dsv32_jax.generation.server import runner as runner_lib

# Others count as one, so that a client cannot make labels without end.
_PATHS = (
  "/health",
  "/metrics",
  "/v1/chat/completions",
  "/v1/completions",
  "/v1/models",
)
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
# What an engine counts that only grows; all else goes up and down.
_TOTALS = (
  "prompt_tokens",
  "shared_tokens",
  "drawn_tokens",
  "drafted_tokens",
  "accepted_tokens",
  "preemptions",
)


class Metrics:
  """Counters of one server, in a registry of their own.

  Attributes:
    ended: choices by finish reason; "cancelled" is all that was given up.
    first_token_seconds: from a request's arrival to its first token.
  """

  def __init__(self, runner: runner_lib.Runner):
    self.registry = prometheus_client.CollectorRegistry()
    self.registry.register(_EngineCollector(runner))
    self._http = prometheus_client.Counter(
      "dsv32_http_requests",
      "Requests answered, by path and status.",
      ["path", "status"],
      registry=self.registry,
    )
    self._open = prometheus_client.Gauge(
      "dsv32_http_requests_open",
      "Requests that are not answered to their end.",
      registry=self.registry,
    )
    self._seconds = prometheus_client.Histogram(
      "dsv32_http_request_seconds",
      "From a request's arrival to the end of its answer.",
      ["path"],
      buckets=_SECONDS,
      registry=self.registry,
    )
    self.ended = prometheus_client.Counter(
      "dsv32_choices_ended",
      "Answers that have ended, by reason.",
      ["reason"],
      registry=self.registry,
    )
    self.first_token_seconds = prometheus_client.Histogram(
      "dsv32_first_token_seconds",
      "From a request's arrival to its first token.",
      buckets=_SECONDS,
      registry=self.registry,
    )

  def text(self) -> bytes:
    """Returns all of it as Prometheus reads it."""
    return prometheus_client.generate_latest(self.registry)

  def measured(self, app):
    """Wraps an ASGI application."""

    async def measure(scope, receive, send):
      if scope["type"] != "http":
        await app(scope, receive, send)
        return
      path = scope["path"] if scope["path"] in _PATHS else "other"
      begun, status = time.monotonic(), "none"

      async def noting_send(message):
        nonlocal status
        if message["type"] == "http.response.start":
          status = str(message["status"])
        await send(message)

      try:
        with self._open.track_inprogress():
          await app(scope, receive, noting_send)
      finally:
        self._http.labels(path, status).inc()
        self._seconds.labels(path).observe(time.monotonic() - begun)

    return measure


class _EngineCollector:
  """Asks for the engine's counts when it is asked for them."""

  def __init__(self, runner: runner_lib.Runner):
    self._runner = runner

  def collect(self) -> Iterator[core.Metric]:
    for name, value in self._runner.stats().items():
      kind = core.GaugeMetricFamily
      if name in _TOTALS:
        kind = core.CounterMetricFamily
      yield kind(f"dsv32_engine_{name}", f"The engine's {name}.", value=value)
