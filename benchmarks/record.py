"""What was measured, where, with which versions? One JSON file a run."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine, peers
from benchmarks.session import Session

#: Changes when a reader of older files would misread newer ones.
SCHEMA = 1

RESULTS = Path(__file__).parent / "results"
#: What a run has, unless another number is asked for.
MINUTES = 10.0
#: What `all` measures.
SECTIONS = ("speed", "memory", "accuracy", "step")
#: What a published run has at least: `step` is younger than some of them.
REQUIRED = ("speed", "memory", "accuracy")


def new(session: Session) -> dict[str, Any]:
    """A record without figures yet."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "suite": session.suite.name,
        "rounds": session.rounds,
        "only": list(session.only),
        "machine": machine.facts(session.suite.device) | {"peers": peers.versions()},
    }


def file_name(record: dict[str, Any]) -> str:
    """<machine>-<date>.json; a run that is not for publication says what it is."""
    machine = record["machine"]
    slug = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", machine["cpu"]).lower()).strip("-")
    cores = [] if "gpu" in machine else [f"{machine['cores']}-cores"]
    parts = [slug, *cores, record["date"][:10]]
    if not publishable(record):
        measured = [name for name in SECTIONS if name in record]
        parts += [record["suite"], *(measured if len(measured) < len(SECTIONS) else ())]
        parts += [*record["only"], *([] if record.get("complete", True) else ["unfinished"])]
    return "-".join(parts) + ".json"


def publishable(record: dict[str, Any]) -> bool:
    """Every required section and all methods of the full suite, in at least five rounds where there
    is time, and there is all of it; nothing that was promised is not measured.
    """
    whole = all(name in record for name in REQUIRED) and not record["only"]
    whole = whole and record.get("complete", True)
    whole = whole and all(target["holds"] is not None for target in record["targets"])
    whole = whole and record.get("minutes", MINUTES) >= MINUTES
    return whole and record["suite"] in ("cpu", "gpu") and record["rounds"] >= 5


def cut(record: dict[str, Any]) -> tuple[int, int]:
    """How many cases are smaller, and how many are of fewer rounds, for want of time."""
    rows = [row for name in SECTIONS for row in record.get(name, [])]
    smaller = [row["case"] for row in rows if row["case"].get("halvings")]
    fewer = [row["case"] for row in rows if 0 < len(row.get("seconds", ())) < record["rounds"]]
    return len({str(case) for case in smaller}), len({str(case) for case in fewer})


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write the record and return its path; a run of the same day is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return part.replace(path)  # whoever reads or stops it meanwhile finds a whole record


def load(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: not a record, or of another schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {found}")
    return record


def published(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """The publishable records of CPUs, the oldest first by the date inside. Those of a GPU have
    other shapes than the README's table.
    """
    found = [(load(path), path) for path in sorted(folder.glob("*.json"))]
    fit = [(r, path) for r, path in found if publishable(r) and r["suite"] == "cpu"]
    return sorted(fit, key=lambda of: of[0]["date"])
