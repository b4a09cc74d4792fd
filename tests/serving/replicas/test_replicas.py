"""Two versions under live load behind the proxy: published, tried, promoted, rolled back, and killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config.serving import PublishConfig
from flows.serving import publish
from flows.serving.drills.release_drill import PROBE_TIMEOUT_S, load_on, release, serving, storm
from flows.serving.drills.release_load import FIRST
from flows.serving.drills.server_faults import faults
from flows.serving.releases import promotion
from flows.serving.releases.canary import WHO
from flows.serving.releases.state import read_aliases, read_history
from tests.serving.replicas.test_proxy import needs_haproxy
from tests.serving.tiny_chain import NAME, Chain

pytestmark = [pytest.mark.server, pytest.mark.exhaustive, needs_haproxy]
Publish = Callable[[Path, Chain, Artifact], Artifact]
REQUESTS = 10


def test_no_request_fails_whatever_happens_to_versions_and_servers(
    publish_to: Publish,
    chain: Chain,
    passport: Artifact,
    other_chain: Chain,
    other_passport: Artifact,
    tmp_path: Path,
) -> None:
    repository = tmp_path / "model_repo"
    publish_to(repository, chain, passport)

    def publish_candidate() -> None:
        parents = {"entry": other_chain.entry, "passport": other_passport, "gates": chain.program}
        (tmp_path / "second").mkdir()
        config = PublishConfig(model_name=NAME, model_repo=repository, live=False)
        assert publish.build(tmp_path / "second", config, parents)["version"] == 2

    with serving(repository, tmp_path, replicas=2) as service, load_on(service, NAME) as load:
        release(load, service, publish_candidate, repository, NAME, share=0.3, requests=REQUESTS)
        storm(load, service, repository, NAME, REQUESTS)
        faults(load, service, REQUESTS, PROBE_TIMEOUT_S)

        # a version that is damaged after it was chosen never answers, and is taken back with the reason
        load.enter("damaged candidate")
        promotion.canary(repository, NAME, 0.5, version=2)
        with (repository / NAME / "2" / "model.onnx").open("ab") as program:
            program.write(b"x")
        load.wait_until(lambda: read_aliases(repository, NAME).candidate is None, "it was never taken back")
        last = read_history(repository, NAME)[-1]
        assert (last["verb"], last["who"]) == ("abort", WHO)
        assert "its server does not start" in last["why"]
        assert "model.onnx has sha256" in last["why"]
        load.wait_until(lambda: load.least("damaged candidate", [FIRST]) >= REQUESTS, "no more answers")
        assert set(load.answers("damaged candidate")) == {FIRST}
    assert load.failures == []
    assert read_aliases(repository, NAME).live == 1
