"""Writes what Prometheus and Grafana need to watch the servers, with limits from the configuration.

    python -m flows.monitor                                              of the server that flows.serve runs
    python -m flows.monitor 'monitor.targets=[10.0.0.1:8002,10.0.0.2:8002]' monitor.max_error_share=0.001
    python -m flows.monitor 'monitor.drift_of=[10.0.0.1:8000]'           and asks servers in containers, until Ctrl-C

Into `artifacts_dir/monitoring`: prometheus.yml (run it: prometheus --config.file=...), alerts.yml, and
grafana_dashboard.json (Grafana: Dashboards, New, Import).
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading

from ruamel.yaml import YAML

from flows.compose import run_cli
from flows.config import Config
from flows.serving.monitoring import alert_rules, dashboard, prometheus_config
from flows.serving.releases.drift import DriftWatch
from flows.serving.releases.watch import check_published

RULES = "alerts.yml"


def monitor(config: Config) -> None:
    """Writes the three files and says where they are."""
    directory = config.artifacts_dir / "monitoring"
    directory.mkdir(parents=True, exist_ok=True)
    ports = (config.serve.metrics_port, config.serve.drift_port)
    targets = config.monitor.targets or tuple(f"{config.serve.server_host}:{port}" for port in ports)
    yaml = YAML()
    yaml.width = 1000
    yaml.dump(prometheus_config(config.monitor, targets, RULES), directory / "prometheus.yml")
    yaml.dump(alert_rules(config.monitor), directory / RULES)
    (directory / "grafana_dashboard.json").write_text(json.dumps(dashboard(config.monitor), indent=2) + "\n")
    print(f"{directory}: prometheus.yml, {RULES}, grafana_dashboard.json; {', '.join(targets)} are watched.")
    print(f"prometheus --config.file={directory / 'prometheus.yml'} --web.listen-address=127.0.0.1:9090")
    if config.monitor.drift_of:
        _watch_drift(config)


def _watch_drift(config: Config) -> None:
    stop, options = threading.Event(), config.serve
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    check_published(config.publish.model_repo)
    addresses = {address: address for address in config.monitor.drift_of}
    port, interval_s = options.drift_port, options.drift_interval_s
    with DriftWatch(config.publish.model_repo, lambda: addresses, options.server_host, port, interval_s) as watch:
        print(f"Drift: http://{watch.address}/metrics. Ctrl-C stops it.", flush=True)
        stop.wait()


if __name__ == "__main__":
    run_cli(monitor, __doc__)
