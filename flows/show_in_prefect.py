"""What a run came to, as Prefect artifacts: seen in Prefect's UI without opening the report."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.chain import ChainResult
from flows.report.number_format import count, duration, significant, size
from flows.report.stage import PLOTS, REPORT
from flows.run_record import RunRecord


def show_in_prefect(result: ChainResult, record: RunRecord) -> None:
    """Creates the artifacts `candidates`, `pareto-size`, `pareto-latency`, `verdict`, `stages` and `report` of the flow
    run that calls it.

    Args:
        result: What the chain made.
        record: What each of its stages did.
    """
    name = record.path.parent.name
    create_table_artifact(_candidates(result.gates.metrics), "candidates", f"Every model of {name}, measured alike")
    for cost, file in PLOTS.items():
        url = f"data:image/svg+xml;base64,{b64encode((result.report.path / file).read_bytes()).decode()}"
        create_image_artifact(url, f"pareto-{cost}", f"Quality of every model of {name} against {cost}")
    create_markdown_artifact(_verdict(result), "verdict", f"What {name} put on the inference server")
    create_table_artifact(_stages(record.rows), "stages", f"What each stage of {name} did, and why")
    page = record.path.with_name(REPORT).absolute()
    create_link_artifact(page.as_uri(), str(page), "report", f"The whole report of {name}")


def _candidates(gates: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "candidate": row["name"],
            "gates": "chosen" if row["name"] == gates["chosen"] else "passed" if row["passed"] else "rejected",
            **(
                {"macro F1": f"{row['macro_f1']:.3f}", "right": f"{100 * row['accuracy']:.1f} %"}
                if row["bits_per_byte"] is None
                else {"bits per byte": f"{row['bits_per_byte']:.3f}"}
            ),
            "loss": f"{row['loss']:.3f}",
            "parameters": count(row["parameters"]),
            "program": size(row["program_bytes"]),
            "p50": f"{significant(row['p50_ms'])} ms",
            "tokens/s": count(row["throughput"]),
            "same first choice": f"{100 * row['agreement']:.1f} %",
            "KL from base": significant(row["divergence"]),
            "in memory": size(row["resident_bytes"]),
            "CPU s per 1000 tokens": significant(row["cpu_s_per_1000_tokens"]),
            "Pareto front": ", ".join(row["fronts"]),
            "reasons": "; ".join(row["reasons"]),
        }
        for row in gates["candidates"]
    ]


def _verdict(result: ChainResult) -> str:
    gates = result.gates.metrics
    if result.published is None or result.passport is None:
        failed = "".join(
            f"- {row['name']}: {'; '.join(row['reasons'])}\n" for row in gates["candidates"] if row["reasons"]
        )
        return f"## Nothing was published\n\nWhatever was served before is served still.\n\n{failed}"
    release, passport = result.published.metrics, result.passport.metrics
    return (
        f"## {release['model_name']} version {release['version']} is published\n\n"
        f"It serves `{gates['chosen']}`: {gates['choice']}.\n\n"
        f"| served against trained | |\n|:--|--:|\n"
        f"| checks passed | {passport['checks'] - passport['failed']} of {passport['checks']} |\n"
        f"| worst difference | {significant(passport['worst_difference'])} |\n"
        f"| tolerance | {significant(passport['tolerance'])} |\n"
        f"| float noise | {significant(passport['float_noise'])} |\n"
        f"| server | {passport['server']} |\n"
    )


def _stages(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "stage": name,
            "did": "ran" if row["ran"] else "skipped",
            "why": row["reason"],
            "took": duration(row["seconds"]),
            "artifact": row["key"],
        }
        for name, row in rows.items()
    ]
