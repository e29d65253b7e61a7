"""The table results.csv of a sweep: a row for every run folder, read from its files.

A job writes it when it ends, so nothing but run folders is read.
"""

import contextlib
import csv
import fcntl
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import paths
from mtp_jax import files, run_folder
from mtp_jax.config import flatten

FILE = "results.csv"
_LOCK = ".results.lock"


def collect(root: Path) -> Path:
  """Writes `results.csv` of a sweep folder; returns its path.

  Where it cannot be written a warning is printed: no trial depends on it.

  Columns: `trial`; `complete`, whether it is trained and evaluated; `step`, the last
  one known; `exit_class` and `reason` of the last end; the trial's `folder`; every
  config key that is not the same in all rows; and the measures of eval.json, means
  beside `_stderr`, lists numbered from 0, other entries by their names. Missing values
  are empty.
  """
  path = root / FILE
  try:
    # The process that reads first must not write last.
    with one_at_a_time(root / _LOCK):
      _write(path, _rows(root))
  except OSError as error:
    with contextlib.suppress(OSError):
      print(f"warning: {path} could not be written ({error}).", file=sys.stderr)
  return path


@contextlib.contextmanager
def one_at_a_time(lock_file: Path) -> Iterator[None]:
  """Waits until no other process is in here with this file."""
  with lock_file.open("w") as lock:
    with contextlib.suppress(OSError):  # Not every file system has locks.
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, list(dict.fromkeys(x for row in rows for x in row)))
  writer.writeheader()
  writer.writerows(rows)
  files.write_whole(path, text.getvalue().encode())


def _rows(root: Path) -> list[dict[str, Any]]:
  folders = run_folder.folders_below(root)
  found = {folder: paths.read_json(folder / run_folder.CONFIG) for folder in folders}
  configs = {folder: flatten(config) for folder, config in found.items() if config}
  values: dict[str, set[str]] = {}
  for key in dict.fromkeys(key for config in configs.values() for key in config):
    values[key] = {json.dumps(config.get(key)) for config in configs.values()}
  varying = [key for key, x in values.items() if key != "name" and len(x) > 1]
  return [_row(folder, config, varying) for folder, config in configs.items()]


def _row(folder: Path, config: dict[str, Any], varying: list[str]) -> dict[str, Any]:
  complete = run_folder.is_done(folder)
  result = paths.read_json(folder / run_folder.EVAL) if complete else {}
  status = paths.read_json(folder / run_folder.STATUS)
  row = {
    "trial": run_folder.trial_of(folder, str(config.get("name"))),
    "complete": complete,
    "step": result.pop("step", status.get("step", 0)),
    "exit_class": "done" if complete else status.get("exit_class"),
    "reason": None if complete else status.get("reason"),
    "folder": folder.name,
  } | {key: config.get(key) for key in varying}
  return row | measures(result)


def measures(result: dict[str, Any]) -> dict[str, Any]:
  """Returns the columns of an eval.json."""
  columns: dict[str, Any] = {}
  for name, value in result.items():
    columns |= _columns(name, value)
  return columns


def _columns(name: str, value: Any) -> dict[str, Any]:
  """Returns the cells of an entry of eval.json, however deep it is."""
  if isinstance(value, dict) and "mean" in value:
    return {name: value["mean"], f"{name}_stderr": value.get("stderr")}
  if isinstance(value, dict | list):
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    columns: dict[str, Any] = {}
    for key, entry in entries:
      columns |= _columns(f"{name}_{key}", entry)
    return columns
  return {name: value}
