"""What is watched while models are served, and when somebody is called."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config.checks import require, require_address, require_fraction, require_positive


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What `python -m flows.monitor` writes for Prometheus and Grafana."""

    targets: tuple[str, ...] = ()
    """Metrics addresses, host:port, of what to watch; empty = `serve.host` with `serve.metrics_port` and
    `serve.drift_port`."""
    drift_of: tuple[str, ...] = ()
    """HTTP addresses, host:port, of servers that flows.serve does not run, in containers say: they are asked their
    passports' samples, until Ctrl-C, as `serve.drift_port` and `serve.drift_interval_s` say; empty = nobody is."""
    scrape_interval_s: int = 5
    """How often each server is asked for its numbers."""
    hold_s: int = 60
    """How long a limit has to be passed before an alert fires; a server that is down waits for a third of it."""
    window_s: int = 300
    """Span over which shares and quantiles are taken."""
    max_error_share: float = 0.01
    """Requests that failed, found the queue full or ran out of time, over all but those that were refused as wrong."""
    max_first_token_p95_ms: float = 1000.0
    """95 % of texts have their first token by then."""
    max_scores_p95_ms: float = 250.0
    """95 % of requests for scores are answered by then."""
    max_waiting: int = 64
    """Requests in line at one server."""
    max_cache_share: float = 0.95
    """Keys' and values' memory that is reserved, while texts wait for it."""

    def __post_init__(self) -> None:
        require_positive(
            "monitor",
            self,
            ["scrape_interval_s", "window_s", "max_first_token_p95_ms", "max_scores_p95_ms", "max_waiting"],
        )
        require_fraction("monitor", self, ["max_error_share", "max_cache_share"])
        require(self.hold_s >= 0, "monitor.hold_s", self.hold_s, "must not be negative", "Set monitor.hold_s=60.")
        require(
            self.window_s >= 4 * self.scrape_interval_s,
            "monitor.window_s",
            self.window_s,
            f"must span four times monitor.scrape_interval_s={self.scrape_interval_s} or more: a rate needs samples",
            f"Set monitor.window_s={4 * self.scrape_interval_s}.",
        )
        for target in self.targets:
            require_address("monitor.targets", target, "of a server's metrics", "Set monitor.targets=[127.0.0.1:8002].")
        for address in self.drift_of:
            require_address(
                "monitor.drift_of", address, "of a server's HTTP endpoint", "Set monitor.drift_of=[127.0.0.1:8000]."
            )
