"""What Prometheus scrapes and when it calls somebody, and what Grafana draws, from the configuration.

The inference server counts a text that is refused, or that fails while it is generated, as a success, because the
request that asked for it was taken. So failures of texts are read from the text model's own `millrace_texts_total`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flows.config.monitoring import MonitorConfig
from flows.serving.releases.drift import RATIO

JOB = "millrace"
FAILED = "failed|queue_full|deadline"
"""Outcomes of a text that are the server's fault, and those that are nobody's."""
NOT_COUNTED = "refused|cancelled"


def prometheus_config(config: MonitorConfig, targets: Sequence[str], rules_file: str) -> dict[str, Any]:
    """Content of prometheus.yml."""
    return {
        "global": {
            "scrape_interval": f"{config.scrape_interval_s}s",
            "evaluation_interval": f"{config.scrape_interval_s}s",
        },
        "rule_files": [rules_file],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": list(targets)}]}],
    }


def alert_rules(config: MonitorConfig) -> dict[str, Any]:
    """Content of alerts.yml: each alert says what is wrong with which server, in numbers, and what to look at."""
    window = f"{config.window_s}s"
    return {
        "groups": [
            {
                "name": JOB,
                "rules": [
                    _alert(
                        "ServerDown",
                        f'up{{job="{JOB}"}} == 0',
                        config.hold_s // 3,
                        "page",
                        "{{ $labels.instance }} does not answer",
                        "Its own log says why it ended: artifacts/serve-<port>.log.",
                    ),
                    _alert(
                        "ErrorShare",
                        f"{error_share(window)} > {config.max_error_share:g}",
                        config.hold_s,
                        "page",
                        "{{ $value | humanizePercentage }} of the requests to {{ $labels.model }} fail",
                        "Go back to the version before: python -m flows.promote.",
                    ),
                    _alert(
                        "FirstTokenLate",
                        f"{first_token_quantile(0.95, window)} * 1000 > {config.max_first_token_p95_ms:g}",
                        config.hold_s,
                        "ticket",
                        "first tokens of {{ $labels.model }} take {{ $value | humanize }} ms at the 95th percentile",
                        "Add replicas, or lower export.prefill_tokens.",
                    ),
                    _alert(
                        "ScoresLate",
                        f'nv_inference_request_summary_us{{quantile="0.95",model!~".*_text"}} / 1000 '
                        f"> {config.max_scores_p95_ms:g}",
                        config.hold_s,
                        "ticket",
                        "scores of {{ $labels.model }} take {{ $value | humanize }} ms at the 95th percentile",
                        "Add replicas, or raise export.instances.",
                    ),
                    _alert(
                        "QueueGrowing",
                        f"{waiting()} > {config.max_waiting}",
                        config.hold_s,
                        "ticket",
                        "{{ $value | humanize }} requests wait for {{ $labels.model }} at {{ $labels.instance }}",
                        "Add replicas.",
                    ),
                    _alert(
                        "CacheFull",
                        f"millrace_cache_used_ratio > {config.max_cache_share:g} and millrace_texts_waiting > 0",
                        config.hold_s,
                        "ticket",
                        "texts of {{ $labels.model }} wait for room in the cache at {{ $labels.instance }}",
                        "Raise export.cache_mb and publish again.",
                    ),
                    _alert(
                        "Drift",
                        f"{RATIO} > 1",
                        config.hold_s,
                        "page",
                        "{{ $labels.model }} of {{ $labels.server }} is {{ $value | humanize }} times as far from the "
                        "passport of version {{ $labels.version }} as that allows",
                        "See what changed: python -m flows.verify with --http and --grpc.",
                    ),
                    _alert(
                        "DriftUnknown",
                        f"{RATIO} != {RATIO}",  # not a number
                        config.hold_s,
                        "ticket",
                        "nobody can tell whether {{ $labels.model }} of {{ $labels.server }} has drifted",
                        "flows.serve's log says why. A passport without samples has to be made again: publish again.",
                    ),
                ],
            }
        ]
    }


def dashboard(config: MonitorConfig) -> dict[str, Any]:
    """A Grafana dashboard, as its import takes it; the data source is chosen there."""
    window = f"{config.window_s}s"
    tokens = f"sum by (model, version) (rate(millrace_tokens_total[{window}]))"
    requests = f"sum by (model, version) (rate(nv_inference_request_success[{window}]))"
    panels = [
        _panel("Servers that answer", f'sum(up{{job="{JOB}"}})', "short", "answering"),
        _panel("Requests", requests, "reqps", "{{model}} {{version}}"),
        _panel("Share that fails", error_share(window), "percentunit", "{{model}}"),
        _panel("Tokens generated", tokens, "tokens/s", "{{model}} {{version}}"),
        _panel("First token, p50", first_token_quantile(0.5, window), "s", "{{model}}"),
        _panel("First token, p95", first_token_quantile(0.95, window), "s", "{{model}}"),
        _panel(
            "Scores, p95", 'nv_inference_request_summary_us{quantile="0.95",model!~".*_text"}', "µs", "{{instance}}"
        ),
        _panel("Texts generated together", "millrace_texts_running", "short", "{{instance}}"),
        _panel("Requests in line", waiting(), "short", "{{model}} {{instance}}"),
        _panel("Cache reserved", "millrace_cache_used_ratio", "percentunit", "{{instance}}"),
        _panel("Drift over what passports allow", RATIO, "short", "{{model}} {{version}} {{server}}"),
        _panel("Processor", "nv_cpu_utilization", "percentunit", "{{instance}}"),
        _panel("Memory", "nv_cpu_memory_used_bytes", "bytes", "{{instance}}"),
    ]
    for number, panel in enumerate(panels):
        panel |= {"id": number + 1, "gridPos": {"h": 7, "w": 8, "x": 8 * (number % 3), "y": 7 * (number // 3)}}
    return {
        "title": "Millrace",
        "uid": "millrace",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }


def error_share(window: str) -> str:
    """Share of requests that fail, for each model."""
    failed = f'sum by (model) (rate(millrace_texts_total{{outcome=~"{FAILED}"}}[{window}]))'
    counted = f'sum by (model) (rate(millrace_texts_total{{outcome!~"{NOT_COUNTED}"}}[{window}]))'
    scores_failed = (
        f'sum by (model) (rate(nv_inference_request_failure{{model!~".*_text",reason!="CANCELED"}}[{window}]))'
    )
    scores = f'sum by (model) (rate(nv_inference_request_success{{model!~".*_text"}}[{window}]))'
    return f"({failed} / {counted} or {scores_failed} / ({scores_failed} + {scores}))"


def first_token_quantile(share: float, window: str) -> str:
    """Seconds by which this share of texts has its first token, for each model."""
    buckets = f"sum by (model, le) (rate(millrace_first_token_seconds_bucket[{window}]))"
    return f"histogram_quantile({share}, {buckets})"


def waiting() -> str:
    """Requests in line for each model at each server."""
    return '(millrace_texts_waiting or nv_inference_pending_request_count{model!~".*_text"})'


def _alert(name: str, expression: str, hold_s: int, severity: str, summary: str, remedy: str) -> dict[str, Any]:
    return {
        "alert": f"Millrace{name}",
        "expr": expression,
        "for": f"{hold_s}s",
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "remedy": remedy},
    }


def _panel(title: str, expression: str, unit: str, legend: str) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [{"refId": "A", "expr": expression, "legendFormat": legend, "datasource": source}],
    }
