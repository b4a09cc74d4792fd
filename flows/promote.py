"""Releases: which version of a model is served, tried on a share of the traffic, made live, taken back.

    python -m flows.promote list                                     aliases of every model; --history for all changes
    python -m flows.promote publish artifacts/runs/quickstart        a finished run's verified version, as the candidate
    python -m flows.promote verify quickstart --version 3            the whole proof once more: python -m flows.verify
    python -m flows.promote canary quickstart --share 0.1            the candidate answers a tenth of the requests
    python -m flows.promote promote quickstart --why "a week fine"   the candidate is live, the live one `previous`
    python -m flows.promote abort quickstart --why "answers slowly"  the candidate is taken back
    python -m flows.promote rollback quickstart                      `previous` is live again

Only versions whose files have the digests that their passport proves are released, which takes a second; `verify` asks
a private server, too. `flows.train publish.live=false` publishes as the
candidate, too. A running `flows.serve` follows within serve.poll_interval_s, without a failed request; a canary needs
its serve.replicas=1 or more, and is taken back by it on wrong answers, errors or slowness. Clients need to do nothing:
who names no version gets the live one. Every change is a line of model_repo/<name>/releases.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from flows import verify
from flows.artifact import load_artifact
from flows.config import ConfigError, RunError
from flows.config.serving import PublishConfig
from flows.serving import publish
from flows.serving.releases import promotion
from flows.serving.releases.state import Aliases, ReleaseError, read_aliases, read_history
from flows.serving.repository import complete_versions, published_names

ROLES = ("entry", "passport", "gates")


def main(words: list[str] | None = None) -> int:
    """Does what the words say; the process's exit code."""
    arguments = _parser().parse_args(words)
    repository: Path = arguments.repository
    try:
        match arguments.verb:
            case "list":
                _list(repository, arguments.history)
            case "publish":
                _publish(repository, arguments.run)
            case "verify":
                _check_known(repository, arguments.model)
                return _verify(repository, arguments.model, arguments.version, arguments.artifacts)
            case "canary":
                _check_known(repository, arguments.model)
                after = promotion.canary(repository, arguments.model, arguments.share, arguments.version, arguments.why)
                _tell(arguments.model, after)
            case "promote":
                _check_known(repository, arguments.model)
                _tell(arguments.model, promotion.promote(repository, arguments.model, arguments.version, arguments.why))
            case "abort":
                _check_known(repository, arguments.model)
                _tell(arguments.model, promotion.abort(repository, arguments.model, arguments.why))
            case "rollback":
                _check_known(repository, arguments.model)
                after = promotion.rollback(repository, arguments.model, arguments.version, arguments.why)
                _tell(arguments.model, after)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flows.promote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb in ("list", "publish", "verify", "canary", "promote", "abort", "rollback"):
        one = verbs.add_parser(verb)
        one.add_argument("--repository", type=Path, default=Path("model_repo"), help="publish.model_repo")
        if verb == "list":
            one.add_argument("--history", action="store_true", help="every change, oldest first")
            continue
        if verb == "publish":
            one.add_argument("run", type=Path, help="artifacts/runs/<name>")
            continue
        one.add_argument("model", help="published name")
        if verb != "abort":
            default = {"rollback": "previous", "verify": "the candidate, else the live one"}.get(verb, "the candidate")
            one.add_argument("--version", type=int, help=f"default: {default}")
        if verb == "canary":
            one.add_argument("--share", type=float, required=True, help="of the requests, above 0 and below 1")
        if verb == "verify":
            one.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="artifacts_dir of the run")
        else:
            one.add_argument("--why", default="", help="for the history")
    return parser


def _list(repository: Path, with_history: bool) -> None:
    names = published_names(repository)
    if not names:
        raise ReleaseError(f"{repository} holds no published model. Make one with: python -m flows.train")
    for name in names:
        _tell(name, read_aliases(repository, name))
        print(f"    versions {', '.join(map(str, complete_versions(repository, name)))}")
        for event in read_history(repository, name) if with_history else []:
            share = f" with share {event['share']:g}" if event["share"] else ""
            why = f": {event['why']}" if event["why"] else ""
            proof = f"; passport {event['passport'][:12]}" if "passport" in event else ""
            print(f"    {event['at']} {event['who']}: {event['verb']} version {event['version']}{share}{why}{proof}")


def _publish(repository: Path, run: Path) -> None:
    record = run / "stages.json"
    if not record.is_file():
        raise ReleaseError(f"{record} does not exist: {run} is no run's directory. Name one of artifacts/runs.")
    rows = json.loads(record.read_text())
    if missing := [role for role in ROLES if role not in rows]:
        raise ReleaseError(
            f"{run} is of a run that has not come to {missing[0]} yet. Finish it: python -m flows.train name={run.name}"
        )
    store = run.parents[1] / "store"
    try:
        parents = {role: load_artifact(store / rows[role]["key"]) for role in ROLES}
    except FileNotFoundError as error:
        raise ReleaseError(f"{error.filename} is gone. Run python -m flows.train name={run.name} again.") from error
    name = rows["entry"]["ingredients"]["config"]["model_name"]
    with tempfile.TemporaryDirectory() as scratch:
        config = PublishConfig(model_name=name, model_repo=repository, live=False)
        done = publish.build(Path(scratch), config, parents)
    version, after = done["version"], read_aliases(repository, name)
    print(f"{name} version {version} " + ("is published." if done["is_new"] else "was published before."))
    _tell(name, after)
    if version not in (after.live, after.candidate):  # taken back, or replaced
        print(f"It is neither live nor the candidate: python -m flows.promote promote {name} --version {version}.")


def _verify(repository: Path, model_name: str, version: int | None, artifacts: Path) -> int:
    aliases = read_aliases(repository, model_name)
    chosen = version or aliases.candidate or aliases.live
    return verify.main([str(repository / model_name / str(chosen)), "--artifacts", str(artifacts)])


def _check_known(repository: Path, model_name: str) -> None:
    if model_name not in (names := published_names(repository)):
        raise ReleaseError(f"{model_name} is not published in {repository}; there are {names or 'none'}.")


def _tell(model_name: str, aliases: Aliases) -> None:
    share = f", which answers {100 * aliases.share:g} % of the requests" if aliases.share else ""
    parts = [f"live {aliases.live}"]
    parts += [f"previous {aliases.previous}"] if aliases.previous is not None else []
    parts += [f"candidate {aliases.candidate}{share}"] if aliases.candidate is not None else []
    print(f"{model_name}: {', '.join(parts)}")


if __name__ == "__main__":
    sys.exit(main())
