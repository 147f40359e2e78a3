"""The closing table of a run, and the report that benchmarks/results can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import CUT, FAILED, MEASURED, MET, MISSED, NOT_RUN, RIGHT, UNRUN, WRONG, Row
from benchmarks.gpu.runner import number

SCHEMA = 2  # of benchmarks.tools.common
ORDER = (WRONG, UNRUN, FAILED, CUT, MISSED, MET, MEASURED, RIGHT, NOT_RUN)


def table(rows: Sequence[Row], repeat: str) -> str:
    """Target, measured, verdict and the command that repeats the row; the worst verdicts last, since a machine may keep only
    the end of what is printed. The right rows of one implementation share a line, with the error nearest its bound."""
    lines = [f"{'verdict':<8}  {'measured':<34}  {'target':<26}  command"]
    for row in sorted(merged(rows), key=lambda row: -ORDER.index(row["verdict"])):
        lines.append(f"{row['verdict']:<8}  {measured(row):<34}  {row['target']:<26}  {repeat} --only {row['id']}")
        if row["verdict"] in (WRONG, FAILED, CUT, MISSED, NOT_RUN) and row.get("note"):
            lines.append(f"{'':<8}  {row['note'][:200]}")
    return "\n".join(lines)


def merged(rows: Sequence[Row]) -> list[Row]:
    """The right rows check/OPERATION/IMPLEMENTATION/... as one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        parts = row["id"].split("/")
        shared = row["verdict"] == RIGHT and parts[0] == "check" and len(parts) == 5 and "@" not in row["id"]
        groups.setdefault("/".join(parts[:3]) if shared else row["id"] + " ", []).append(row)
    result = []
    for id, group in groups.items():
        worst = max(group, key=lambda row: nearness(row) if len(group) > 1 else 0)
        unit = f"{worst['unit']} ({len(group)} rows)" if len(group) > 1 else worst["unit"]
        result.append({**worst, "id": id.strip() if len(group) > 1 else worst["id"], "unit": unit})
    return result


def nearness(row: Row) -> float:
    """Error over its bound."""
    return row["measured"] / float(row["target"].removeprefix("<= "))


def measured(row: Row) -> str:
    if row["measured"] is None:
        return "-"
    return f"{number(row['measured'])} {row['unit']}".strip()


def profiles(rows: Sequence[Row]) -> str:
    """The kernels with most time of each timed row."""
    lines = []
    for row in rows:
        if not row.get("top"):
            continue
        total = f", {row['launches']} launches, {row['device_ms']:.4g} ms" if "launches" in row else ""
        lines.append(f"{row['id']}{total}")
        lines += [f"  {ms:10.4f} ms {count:8.1f}x  {name}" for name, ms, count in row["top"]]
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    counts = [f"{sum(row['verdict'] == verdict for row in rows)} {verdict}" for verdict in ORDER]
    return ", ".join(text for text in counts if not text.startswith("0 "))


def report(rows: Sequence[Row], profile: str | None = None) -> dict[str, Any]:
    """In the format of the other suites: one case for each row."""
    machine = next((row["machine"] for row in rows if row.get("machine")), {})
    limits = next((row["limits"] for row in rows if row.get("limits")), None)
    head: dict[str, Any] = {"profile": profile} if profile else {}
    head |= {"schema": SCHEMA, "benchmark": "gpu", "environment": machine}
    return {**head, **({"limits": {"bf16": limits}} if limits else {}), "cases": [case(row) for row in rows]}


def case(row: Row) -> dict[str, Any]:
    """A row as a case: its times, or its error under the implementation's name."""
    wrong = row["note"] if row["verdict"] in (WRONG, FAILED) and row.get("note") else None
    wrong = wrong or (row["verdict"] if row["verdict"] in (WRONG, FAILED) else None)
    implementations: dict[str, Any] = {name: {"error": None, "wrong": None, "ratio": None, **one}
                                       for name, one in row.get("implementations", {}).items()}  # fmt: skip
    if row["verdict"] in (RIGHT, WRONG, FAILED) and not implementations:
        name = row["id"].split("/")[2] if row["id"].startswith("check/") and row["id"].count("/") > 1 else "ours"
        error = row["measured"] if isinstance(row["measured"], float) else None
        implementations[name] = {"error": error, "wrong": wrong, "min_s": None, "median_s": None, "runs": 0, "ratio": None}
    facts = {key: value for key, value in row.items() if key not in ("implementations", "machine", "limits", "log", "id")}
    return {"id": row["id"], "baseline": row.get("baseline"), "facts": facts, "implementations": implementations}


def write(path: Path, rows: Sequence[Row], profile: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report(rows, profile), indent=1, default=str) + "\n", encoding="utf-8")


def markdown(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the documentation: a line per speed with its target, and the number of right checks, per profile."""
    lines = []
    for name, one in reports.items():
        facts = [case["facts"] | {"id": case["id"]} for case in one["cases"]]
        checks = [row for row in facts if row["verdict"] in (RIGHT, WRONG)]
        gpu, torch = (one["environment"].get(key, "unknown") for key in ("gpu", "torch"))
        lines += [f"**{name}**: {gpu}, torch {torch}, triton {one['environment'].get('triton', 'unknown')}; "
                  f"{sum(row['verdict'] == RIGHT for row in checks)} of {len(checks)} checks right.", "",
                  "| row | target | measured | verdict |", "|---|---|---|---|"]  # fmt: skip
        reported = (MET, MISSED, MEASURED, WRONG, FAILED)
        shown = [row for row in facts if row["verdict"] in reported and row["step"] != "environment"]
        lines += [f"| {row['id']} | {row['target'] or ''} | {measured(row)} | {row['verdict']} |" for row in shown]
        lines.append("")
    return "\n".join(lines).strip()
