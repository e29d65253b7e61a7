"""Who has the trials of a sweep: every engine is asked for the jobs that it was given.

Any engine can be asked for a trial, whoever started it, because `job.json` in the run
folder names the engine and the job.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from launch import exits, states
from launch.engines.kubernetes import Kubernetes
from launch.engines.local import Local
from launch.engines.printed import Printed
from launch.engines.slurm import Slurm
from launch.states import Choice, Job, Record, State, Trial

ENGINES = {
  "local": Local, "slurm": Slurm, "kubernetes": Kubernetes, "print": Printed
}


def find(planned: Iterable[Trial]) -> dict[str, Job]:
  """Returns by name the last job of every trial that a scheduler has."""
  found: dict[str, Job] = {}
  for engine, records in _by_engine(planned).items():
    found |= ENGINES[engine].jobs(records)
  return found


def cancel(planned: Iterable[Trial]) -> list[str]:
  """Ends the jobs of trials; returns a line for each engine."""
  return [
    ENGINES[engine].cancel(records) for engine, records in _by_engine(planned).items()
  ]


def _by_engine(planned: Iterable[Trial]) -> dict[str, dict[str, Record]]:
  engines: dict[str, dict[str, Record]] = {}
  for trial in planned:
    record = states.read_record(trial.workdir)
    if record and record.get("engine") in ENGINES:
      engines.setdefault(record["engine"], {})[trial.name] = record | {
        "workdir": str(trial.workdir)
      }
  return engines


def read_states(planned: list[Trial]) -> dict[str, State]:
  """Returns the state of every trial by its name; asks each scheduler once."""
  jobs = find(planned)
  found = {
    trial.name: states.read_state(trial, jobs.get(trial.name)) for trial in planned
  }
  for name, original in states.copies(planned, found).items():
    reason = f"the same run as {original.name}"
    found[name] = dataclasses.replace(found[name], reason=reason)
  return found


def share(planned: Sequence[Trial], found: dict[str, State]) -> dict[str, State]:
  """Gives trials the results of equal trials that are done; returns the new states."""
  originals, after = states.copies(planned, found), dict(found)
  for trial in planned:
    original = originals.get(trial.name)
    if original is not None and found[original.name].kind == "done":
      states.adopt(trial, original)
      after[trial.name] = states.read_state(trial)
  return after


def choose(planned: list[Trial], again: bool) -> Choice:
  """Returns which trials are to be started; with `again` also those given up."""
  found = read_states(planned)
  choice = Choice(planned, [], [], [], found, states.copies(planned, found))
  for trial in planned:
    state = found[trial.name]
    if trial.name in choice.copies:
      continue
    if state.kind in ("queued", "running"):
      choice.active.append(trial)
    elif state.kind == "failed" and not (again or exits.is_retried(state.exit_class)):
      choice.given_up.append(trial)
    elif state.kind != "done":
      choice.todo.append(trial)
  return choice
