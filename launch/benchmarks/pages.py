"""Ratios of a benchmark's rows, and its page.

A row has `flops`, the FLOPs of one step, and `contestants`, their figures by name.
"""

import datetime
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launch.benchmarks.harness import FLOOR, NAME, OURS, OUTPUT, slug
from mtp_jax import environment
from mtp_jax.files import write_json


def rounds_of(row: Mapping[str, Any], name: str) -> list[float]:
  """Returns the median step of every round of a contestant; empty if it failed.

  For `FLOOR`, the seconds that the row's FLOPs take at the rate of large products.
  """
  figures = row["contestants"].get(name, {})
  medians = [statistics.median(steps) for steps in figures.get("seconds", [])]
  if name == FLOOR:
    return [x * row["flops"] / figures["flops"] for x in medians]
  return medians


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
  """Returns the ratio of every round; empty if one side has no rounds."""
  return [a / b for a, b in zip(above, below, strict=True)] if above and below else []


def spread(values: Sequence[float]) -> str:
  """Returns `median [least, greatest]`."""
  if not len(values):
    return "-"
  return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def milliseconds(values: Sequence[float]) -> str:
  return f"{1e3 * statistics.median(values):.4g}" if values else "-"


def compare(row: Mapping[str, Any]) -> dict[str, str]:
  """Returns the cells of a row: times of all, and ours over the floor and each peer."""
  times = {name: rounds_of(row, name) for name in row["contestants"]}
  return {f"{name} ms": milliseconds(times[name]) for name in times} | {
    f"{OURS} / {name}": spread(ratios(times.get(OURS, []), times[name]))
    for name in times
    if name != OURS
  }


def megabytes(row: Mapping[str, Any], key: str) -> dict[str, str]:
  """Returns the cells of a row: what `key` is for every contestant that has it."""
  sizes = {name: facts.get(key) for name, facts in row["contestants"].items()}
  return {f"{n} MB": f"{size / 1e6:.0f}" for n, size in sizes.items() if size}


def write_page(
  benchmark: str,
  settings: SimpleNamespace,
  rows: Sequence[dict[str, Any]],
  device: str,
  parts: Iterable[str],
  packages: Iterable[str] = ("jax", "torch"),
  mode: str = "",
  **more: Any,
) -> None:
  """Prints a benchmark's page, and writes it and the figures.

  Args:
    benchmark: its name.
    settings: what was measured.
    rows: the figures.
    device: that all of them are of.
    parts: paragraphs and tables of the page; the first describes the measurement.
    packages: whose versions count.
    mode: joins the benchmark in the name of the files.
    more: further figures of the record.
  """
  record = {
    "command": f"python -m launch.benchmark {shlex.join([benchmark, *sys.argv[1:]])}",
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "commit": environment.code_commit() or "unknown",
    "hardware": environment.cpu(),
    "device": device,
    "versions": environment.versions(packages),
    "settings": vars(settings),
    **more,
    "rows": rows,
  }
  versions = ", ".join(f"{name} {x}" for name, x in record["versions"].items())
  head = (
    f"{record['date']}, commit {record['commit']}, {record['hardware']}, device "
    f"{device}; {versions}."
  )
  failures = [
    f"- {' '.join(str(x) for x in row.values() if isinstance(x, str | int))}, {name}: "
    f"{facts['error']}"
    for row in rows
    for name, facts in row.get("contestants", {}).items()
    if "error" in facts
  ]
  parts = [f"# `launch.benchmark {benchmark}`", f"`{record['command']}`", head, *parts]
  if failures:
    parts += ["Failed:", "\n".join(failures)]
  text = "\n\n".join(parts) + "\n"
  kind = settings.preset if settings.preset == "quick" else slug(device)
  folder, name = Path(OUTPUT.value), NAME.value or f"{benchmark}{mode}-{kind}"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{name}.md").write_text(text)
  write_json(folder / f"{name}.json", record)
  print(f"{text}\nwritten to {folder / name}.md and .json")


def device_of(rows: Iterable[Mapping[str, Any]]) -> str:
  """Returns the hardware that the contestants ran on, of the first that ran."""
  facts = (x for row in rows for x in row["contestants"].values())
  return next((x["hardware"] for x in facts if "hardware" in x), "unknown")
