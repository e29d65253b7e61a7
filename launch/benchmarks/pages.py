"""Ratios of a benchmark's rows, and its page.

A row has `flops`, the FLOPs of one step, and `contestants`, their figures by name; its
other entries say what was measured.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launch import tables
from launch.benchmarks.harness import FLOOR, NAME, OURS, OUTPUT
from mtp_jax import environment
from mtp_jax.metrics import peak_flops

# Bytes that a contestant may have measured.
_SIZES = {
  "peak_memory": "peak MB", "xla_memory": "XLA MB", "temporaries": "temporaries MB",
  "least_memory": "least MB",
}


def rounds_of(row: Mapping[str, Any], name: str) -> list[float]:
  """Returns the median step of every round of a contestant; empty if it failed.

  A step of several trials counts as one step of one trial, an Nth of the time. For
  `FLOOR`, the seconds that the row's FLOPs take at the rate of large products.
  """
  figures = row["contestants"].get(name, {})
  share = 1 / figures.get("trials", 1)
  if name == FLOOR and figures.get("seconds"):
    share = row["flops"] / figures["flops"]
  return [share * statistics.median(x) for x in figures.get("seconds", [])]


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


def compare(rows: Iterable[dict[str, Any]]) -> str:
  """Returns a table: a line for each contestant of each row, failed ones too.

  `ours / this` is above 1 if the contestant is faster than our step. Memory is in MB.
  """
  lines = []
  for row in rows:
    sizes = {k: v for k, v in row.items() if k not in ("contestants", "flops")}
    ours = rounds_of(row, OURS)
    for name, facts in row["contestants"].items():
      seconds = rounds_of(row, name)
      line = sizes | {
        "contestant": name, "ms": milliseconds(seconds),
        "ours / this": spread(ratios(ours, seconds)),
      }
      peak = peak_flops(facts.get("hardware", ""))
      if peak and seconds:
        line["MFU"] = f"{row['flops'] / statistics.median(seconds) / peak:.0%}"
      sizes_mb = {title: facts.get(key) for key, title in _SIZES.items()}
      line |= {k: f"{size / 1e6:.0f}" for k, size in sizes_mb.items() if size}
      if "error" in facts:
        line["failed"] = facts["error"]
      lines.append(line)
  return tables.markdown(lines)


def write_page(
  benchmark: str,
  settings: SimpleNamespace,
  rows: Sequence[dict[str, Any]],
  explained: str,
  parts: Iterable[str],
  packages: Iterable[str] = ("jax", "torch"),
  mode: str = "",
  device: str | None = None,
  **more: Any,
) -> None:
  """Prints a benchmark's page, and writes it and the figures.

  Args:
    benchmark: its name.
    settings: what was measured.
    rows: the figures.
    explained: how it is measured: the docstring of the benchmark.
    parts: further paragraphs and tables.
    packages: whose versions count.
    mode: joins the benchmark in the name of the files.
    device: the device of all figures; by default the device of the first contestant.
    more: further figures of the record.
  """
  device = device or device_of(rows)
  record = tables.facts(["launch.benchmark", benchmark], packages) | {
    "hardware": environment.cpu(),
    "device": device,
    "settings": vars(settings),
    **more,
    "rows": rows,
  }
  chosen = ", ".join(f"{key} {value}" for key, value in vars(settings).items())
  measured = (
    f"{record['hardware']}, device {device}. Settings: {chosen}. Times: median over "
    "rounds. Ratios: median over rounds [least, greatest]."
  )
  kind = settings.preset if settings.preset == "quick" else slug(device)
  path = Path(OUTPUT.value) / (NAME.value or f"{benchmark}{mode}-{kind}")
  title = f"`launch.benchmark {benchmark}`"
  tables.write_page(path, title, record, [explained.strip(), measured, *parts])


def device_of(rows: Iterable[Mapping[str, Any]]) -> str:
  """Returns the hardware that the contestants ran on, of the first that ran."""
  facts = (x for row in rows for x in row["contestants"].values())
  return next((x["hardware"] for x in facts if "hardware" in x), "unknown")


def slug(name: str) -> str:
  """Returns a name for files."""
  return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
