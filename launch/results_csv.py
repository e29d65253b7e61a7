"""The table results.csv of a sweep: a row for every run folder, from its files.

Only files of the run folders are read, so a job can write the table when it ends.
"""

import contextlib
import csv
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "results.csv"
_LOCK = ".results.lock"


def collect(root: Path) -> Path:
  """Writes `results.csv` of a sweep folder; returns its path.

  Where it cannot be written a warning says so: no trial depends on it.

  Columns: `trial`; `complete`, whether it is trained and evaluated; `step`, the last
  one known; `exit_class` and `reason` of the last end; every config key that is not
  the same in all rows; and the measures of eval.json, means beside `_stderr`, lists
  numbered from 0, other entries by their names. What is not there is empty.
  """
  path = root / FILE
  try:
    with _one_at_a_time(root):
      _write(path, _rows(root))
  except OSError as error:
    with contextlib.suppress(OSError):
      print(f"warning: {path} could not be written ({error}).", file=sys.stderr)
  return path


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
  columns = dict.fromkeys(column for row in rows for column in row)
  temporary = path.with_suffix(f".{os.getpid()}.tmp")
  try:
    with temporary.open("w", newline="") as file:
      writer = csv.DictWriter(file, list(columns), restval="")
      writer.writeheader()
      writer.writerows(rows)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def _rows(root: Path) -> list[dict[str, Any]]:
  found = sorted(path.parent for path in root.glob("*/config.json"))
  runs = {folder: _read(folder / "config.json") for folder in found}
  configs = {folder: _flat(config) for folder, config in runs.items() if config}
  keys = dict.fromkeys(key for config in configs.values() for key in config)
  varying = [
    key
    for key in keys
    if key != "name"
    and len({json.dumps(config.get(key)) for config in configs.values()}) > 1
  ]
  return [_row(folder, config, varying) for folder, config in configs.items()]


@contextlib.contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
  """Waits for others: who reads first must not write last."""
  with (root / _LOCK).open("w") as lock:
    with contextlib.suppress(OSError):  # Not every file system has locks.
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _row(folder: Path, config: dict[str, Any], varying: list[str]) -> dict[str, Any]:
  complete = (folder / "DONE").exists()
  result = (_read(folder / "eval.json") if complete else None) or {}
  status = _read(folder / "status.json") or {}
  row = {
    "trial": folder.name,
    "complete": complete,
    "step": result.get("step", status.get("step", 0)),
    "exit_class": "done" if complete else status.get("exit_class"),
    "reason": None if complete else status.get("reason"),
  }
  return row | {key: config.get(key) for key in varying} | _measures(result)


def _measures(result: dict[str, Any]) -> dict[str, Any]:
  measures: dict[str, Any] = {}
  for name, value in result.items():
    if name != "step":
      measures |= _columns(name, value)
  return measures


def _columns(name: str, value: Any) -> dict[str, Any]:
  if isinstance(value, dict) and "mean" in value:
    return {name: value["mean"], f"{name}_stderr": value.get("stderr")}
  if isinstance(value, dict | list):
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    columns: dict[str, Any] = {}
    for key, entry in entries:
      columns |= _columns(f"{name}_{key}", entry)
    return columns
  return {name: value}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _read(path: Path) -> dict[str, Any] | None:
  with contextlib.suppress(OSError, ValueError):
    return json.loads(path.read_text())
  return None
