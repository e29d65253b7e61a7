"""How the trials of a sweep get machines: one interface, four engines.

  local       worker processes on this machine
  slurm       job arrays
  kubernetes  a JobSet for every trial
  print       nothing but the commands, for any other scheduler

An engine only starts `launch.train`, or what it does, in run folders: all that is known
of a trial lies there. `job.json` says who was last asked to train it, `status.json` how
far it is. So any engine can be asked for the state of a trial, whoever started it.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

# Every task of a Slurm job imports this package: the rest waits until it is needed.
if TYPE_CHECKING:
  from launch.trials import Trial

NAMES = ("local", "slurm", "kubernetes", "print")
RECORD = "job.json"

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
  """What a scheduler says about the last job of a trial.

  state: queued | running | cancelled | ended (however) | unknown, to a scheduler that
    has forgotten it or cannot be asked.
  id, host: as the scheduler calls them.
  reason: why it waits or ended, if the scheduler says so.
  """

  state: Literal["queued", "running", "cancelled", "ended", "unknown"]
  id: str = ""
  host: str = ""
  reason: str = ""


class Engine(Protocol):
  """Gives machines to trials.

  needs_folders: training begins elsewhere, so run folders are prepared first.
  outcome: what `submit` has done with trials, in words.
  """

  needs_folders: bool
  outcome: str

  def check(self, planned: list["Trial"]) -> None:
    """Raises ConfigError if the trials could not be started. Starts nothing."""

  def preview(self, planned: list["Trial"]) -> str:
    """Returns what `submit` would hand over: scripts, manifests, commands; or ''."""

  def submit(self, planned: list["Trial"]) -> int:
    """Starts trials, or waits until they are trained; returns the exit code.

    Raises:
      ConfigError: the scheduler refuses them.
    """

  def jobs(self, records: dict[str, Record]) -> dict[str, Job]:
    """Returns the jobs of trials by name, from their records."""

  def cancel(self, records: dict[str, Record]) -> str:
    """Ends the jobs of these trials, saved if they can; returns what was done."""


def write_record(workdir: Path, engine: str, **facts: Any) -> None:
  """Notes in a run folder which job it was given to, now."""
  record = {"engine": engine, "submitted": time.time(), **facts}
  temporary = workdir / f"{RECORD}.tmp"
  temporary.write_text(json.dumps(record) + "\n")
  temporary.replace(workdir / RECORD)


def read_record(workdir: Path) -> Record | None:
  """Returns the record of a run folder, None where there is none."""
  with contextlib.suppress(OSError, ValueError):
    return json.loads((workdir / RECORD).read_text())
  return None


def find_jobs(planned: Iterable["Trial"]) -> dict[str, Job]:
  """Returns the last job of every trial that a scheduler was given, by its name."""
  found: dict[str, Job] = {}
  for engine, records in _by_engine(planned).items():
    found |= _asking(engine).jobs(records)
  return found


def cancel(planned: Iterable["Trial"]) -> list[str]:
  """Ends the jobs of trials; returns what was done, a line for each engine."""
  return [
    _asking(engine).cancel(records) for engine, records in _by_engine(planned).items()
  ]


def _by_engine(planned: Iterable["Trial"]) -> dict[str, dict[str, Record]]:
  engines: dict[str, dict[str, Record]] = {}
  for trial in planned:
    if record := read_record(trial.workdir):
      engines.setdefault(record["engine"], {})[trial.name] = record | {
        "workdir": str(trial.workdir)
      }
  return engines


def _asking(name: str) -> Engine:
  """Returns an engine that starts nothing: its jobs are to be asked for or ended."""
  match name:
    case "slurm":
      from launch.engines.slurm import Slurm

      return Slurm()
    case "kubernetes":
      from launch.engines.kubernetes import Kubernetes

      return Kubernetes()
    case _:
      from launch.engines.local import Local

      return Local()
