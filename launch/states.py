"""Trials of a sweep and their states, read from run folders: who is at work on each.

`job.json` in a run folder names the engine and the job that a trial was last given to,
`status.json` its progress. So a state can be read whoever started the trial.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from launch import paths, status
from mtp_jax import accounting, files, run_folder
from mtp_jax.config import Config, ConfigError
from mtp_jax.effects import essential
from mtp_jax.program import ProgramConfig, program_config

Record = dict[str, Any]

_TAIL_BYTES = 1 << 16
# The fields of the last record of metrics.jsonl that a state shows.
_SHOWN = {"step", "seconds", "loss", "tokens_per_second"}
# Where locks of other hosts do not show, a run that another host wrote about within
# this time counts as running.
_SILENT_SECONDS = 600
_STAYS = ("done", "running", "queued")
# What a copy of a run folder does not take over.
_OF_ONE_FOLDER = (
  run_folder.LOCK, run_folder.JOB, run_folder.CONFIG, run_folder.RUN, run_folder.DONE,
  run_folder.ERROR, run_folder.ATTEMPTS, run_folder.TRACKERS,
  run_folder.WANDB, run_folder.PROFILE,
)


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a sweep.

  config:   what the run is started with; its `name` is the trial's.
  resolved: what is trained (arm `flops` becomes a longer plain NTP run).
  workdir:  its run folder.
  """

  config: Config
  resolved: Config
  workdir: Path

  @property
  def name(self) -> str:
    return self.config.name

  @functools.cached_property
  def program(self) -> ProgramConfig:
    """What compiled programs depend on; trials that are equal in it share programs."""
    return program_config(self.resolved)

  @property
  def counts(self) -> accounting.Counts:
    return _counts(self.program)

  @property
  def num_steps(self) -> int:
    return self.resolved.train.num_steps

  @property
  def num_tokens(self) -> int:
    data = self.resolved.data
    return self.num_steps * data.batch_size * data.seq_len

  @functools.cached_property
  def cost(self) -> float:
    """Training FLOPs per token."""
    return accounting.train_flops_per_token(self.resolved)

  @property
  def flops(self) -> float:
    """Training FLOPs from the first step to the last."""
    return self.num_tokens * self.cost


@functools.cache
def _counts(program: ProgramConfig) -> accounting.Counts:
  return accounting.count(program)


@dataclasses.dataclass(frozen=True)
class Job:
  """The last job of a trial, as its scheduler reports it.

  state: queued | running | cancelled | ended (however) | unknown, if the scheduler has
    forgotten the job or does not answer.
  id, host: the scheduler's names.
  reason: why the job waits or ended, if the scheduler reports it.
  """

  state: Literal["queued", "running", "cancelled", "ended", "unknown"]
  id: str = ""
  host: str = ""
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class State:
  """The state of a trial.

  kind: waiting (never begun) | queued | running | stopped (saved) | cancelled | failed
    | lost (its process is gone and wrote no end) | done.
  step: the last one logged. seconds: of training alone.
  train_loss, eval_loss: nats per next token, of the last logged interval and of the
    final evaluation; None before these.
  tokens_per_second: of the last logged interval. host: where it is or last was.
  exit_class: of its last end, see `launch.exits`. reason: one line.
  """

  kind: str
  step: int = 0
  seconds: float = 0.0
  train_loss: float | None = None
  eval_loss: float | None = None
  tokens_per_second: float | None = None
  host: str | None = None
  exit_class: str | None = None
  reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which trials of a sweep are to be started.

  planned:  all of them.
  todo:     nobody is at work on them, and they are not done.
  active:   queued or running.
  given_up: ended in bad input or diverged, and would end the same way.
  states:   of all trials, by name.
  copies:   by name, trials that get the results of an equal one; see `copies`.
  """

  planned: list[Trial]
  todo: list[Trial]
  active: list[Trial]
  given_up: list[Trial]
  states: dict[str, State]
  copies: dict[str, Trial]


def write_record(workdir: Path, engine: str, **facts: Any) -> None:
  """Notes in a run folder the engine and the job that it was given to, now."""
  record = {"engine": engine, "submitted": time.time(), **facts}
  files.write_whole(workdir / run_folder.JOB, (json.dumps(record) + "\n").encode())


def read_record(workdir: Path) -> Record | None:
  """Returns the record of a run folder, None where there is none."""
  return paths.read_json(workdir / run_folder.JOB) or None


def read_state(trial: Trial, job: Job | None = None) -> State:
  """Returns the state of a trial from its run folder, and its job if it has one."""
  folder = trial.workdir
  last_status = _last_status(folder)
  last = _last_train_record(folder / run_folder.METRICS)
  facts = {"host": last_status.get("host") or (job.host if job else None) or None}
  if last:
    facts |= {
      "step": last["step"],
      "seconds": last["seconds"],
      "train_loss": last["loss"][0],
      "tokens_per_second": last["tokens_per_second"],
    }
  if run_folder.is_done(folder):
    try:
      loss = files.read_json(folder / run_folder.EVAL)["main_loss"]["mean"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      reason = (
        f"{folder / run_folder.EVAL} cannot be read ({type(error).__name__}); remove "
        f"{folder / run_folder.DONE} to evaluate again"
      )
      return State("failed", **facts, exit_class="config", reason=reason)
    return State("done", **facts, eval_loss=loss)
  has_job = job is not None and job.state in ("queued", "running")
  in_use = run_folder.is_in_use(folder)
  if in_use or (has_job and job.state == "running"):
    # The status of an earlier attempt has ended; its reason is not of this one.
    is_current = last_status.get("state") != "ended"
    reason = last_status.get("reason") if is_current else None
    return State("running", **facts, reason=reason)
  if has_job:
    return State("queued", **facts, reason=job.reason or None)
  if job is not None and job.state == "cancelled":
    return State("cancelled", **facts)
  is_unknown = in_use is None and (job is None or job.state == "unknown")
  if is_unknown and _lives_elsewhere(last_status):
    return State("running", **facts, reason="as its machine wrote lately")
  return dataclasses.replace(_ended(folder, last_status, job), **facts)


def _ended(folder: Path, last_status: dict[str, Any], job: Job | None) -> State:
  """Returns the state of a trial that no process is at work on."""
  job_reason = job.reason if job is not None else ""
  if last_status.get("state") == "ended":
    exit_class = last_status["exit_class"]
    kind = "stopped" if exit_class in ("yielded", "done") else "failed"
    reason = last_status["reason"] or job_reason or None
    return State(kind, exit_class=exit_class, reason=reason)
  if last_status:
    reason = job_reason or "its process is gone and wrote no reason"
    return State("lost", exit_class="infrastructure", reason=reason)
  error_file = folder / run_folder.ERROR
  if error_file.exists():
    reason = error_file.read_text().partition("\n")[0]
    return State("failed", exit_class="infrastructure", reason=reason)
  if job is not None and job.state == "ended":
    reason = job_reason or "its job ended before training began"
    return State("lost", exit_class="infrastructure", reason=reason)
  written = (run_folder.METRICS, run_folder.CHECKPOINTS)
  begun = any((folder / name).exists() for name in written)
  return State("stopped" if begun else "waiting")


def _last_status(folder: Path) -> dict[str, Any]:
  """Returns status.json, or {} if it is older than the job the trial was given to."""
  found, record = status.read(folder), read_record(folder)
  return {} if record and found and found["time"] < record["submitted"] else found


def _lives_elsewhere(last_status: dict[str, Any]) -> bool:
  """Returns whether another host wrote about the trial lately."""
  return (
    bool(last_status)
    and last_status["state"] != "ended"
    and last_status["host"] != socket.gethostname()
    and time.time() - last_status["time"] < _SILENT_SECONDS
  )


def _last_train_record(path: Path) -> dict[str, Any] | None:
  """Returns the last whole `train` line near the end of a metrics.jsonl."""
  if not path.is_file():
    return None
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
    # The first line of the tail and the last one may be cut.
    for line in reversed(file.read().split(b"\n")):
      with contextlib.suppress(
        ValueError, KeyError, TypeError, AttributeError, RecursionError
      ):
        record = json.loads(line)
        if record["kind"] == "train" and _SHOWN <= record.keys():
          return record
  return None


def copies(
  planned: Iterable[Trial], states: dict[str, State] | None = None
) -> dict[str, Trial]:
  """Returns, by the name of a trial, the equal trial that is trained in its place.

  A sweep over depth and lambda has the baseline once for each lambda. Of equal runs
  (`effects.essential`) one is trained: the first or, by `states`, the furthest; `adopt`
  gives the others its results. Trials that are queued, running or done are no copies.
  """
  groups: dict[Config, list[Trial]] = {}
  for trial in planned:
    groups.setdefault(essential(trial.resolved), []).append(trial)

  def progress(trial: Trial) -> tuple[int, int]:
    state = states[trial.name]
    return (*_STAYS, state.kind).index(state.kind), -state.step

  found = {}
  for group in groups.values():
    original = min(group, key=progress) if states else group[0]
    for trial in group:
      stays = states is not None and states[trial.name].kind in _STAYS
      if trial is not original and not stays:
        found[trial.name] = original
  return found


def adopt(trial: Trial, original: Trial) -> None:
  """Fills the run folder of a trial from an equal trial that is done.

  Does nothing where a process holds the folder, or where the original has no readable
  run.json, which is printed. DONE is written last: a copy that was interrupted is made
  again.
  """
  run_file = original.workdir / run_folder.RUN
  try:
    run = files.read_json(run_file)
  except (OSError, ValueError) as error:
    text = f"warning: {trial.name} gets no results: {run_file} cannot be read ({error})"
    print(text, file=sys.stderr, flush=True)
    return
  logs = run_folder.logs(original.workdir)
  with contextlib.suppress(ConfigError), run_folder.exclusive(trial.workdir):
    for path in sorted(original.workdir.iterdir()):
      copy = trial.workdir / path.name
      if path.name in _OF_ONE_FOLDER or path in logs:
        continue
      if path.is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
      else:
        shutil.copy2(path, copy)
    facts = run | {"same_run_as": original.name}
    run_folder.write(trial.workdir, run_folder.RUN, facts)
    run_folder.write_config(trial.workdir, trial.config)
    (trial.workdir / run_folder.ERROR).unlink(missing_ok=True)
    (trial.workdir / run_folder.DONE).touch()
