"""From an experiment file to the trials of a sweep: named, checked, none started.

An experiment file has `get_config([preset])` and generators `sweep_<name>([preset])` of
dotted overrides, crossed by name. A function `sweep([preset])` instead says what the
trials are, one by one. Every function gets the preset, if one is named.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import functools
import importlib.util
import itertools
import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from launch import cli, engines, exits, status
from launch.engines import Job
from mtp_jax import accounting
from mtp_jax.checkpoint import check_resumable, read_config
from mtp_jax.config import (
  Config,
  ConfigError,
  difference,
  dotted_keys,
  essential,
  to_dict,
  with_overrides,
)
from mtp_jax.config_rules import validate
from mtp_jax.data.sources import DataError
from mtp_jax.files import is_begun
from mtp_jax.metrics import write_json
from mtp_jax.program import program_config
from mtp_jax.saved_model import check_source

Overrides = dict[str, Any]
_MAX_SHOWN = 10
_MAX_NAME = 200  # Bytes: file systems allow 255.
_TAIL_BYTES = 1 << 16
# What is shown of the last record of metrics.jsonl.
_SHOWN = {"step", "seconds", "loss", "tokens_per_second"}
# Where locks do not say it, a run that another machine wrote about so lately is taken
# to be at work there.
_SILENT_SECONDS = 600
_STAYS = ("done", "running", "queued")
_OF_ONE_FOLDER = (
  cli.LOCK, engines.RECORD, "config.json", "run.json", "DONE", "error.txt",
  "attempts.jsonl",
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
  def shape(self) -> Config:
    """Trials of equal shape share their compiled programs."""
    return program_config(self.resolved)

  @property
  def counts(self) -> accounting.Counts:
    return _counts(self.shape)

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


@dataclasses.dataclass(frozen=True)
class State:
  """What a trial's run folder says, and the scheduler that it was given to.

  kind: waiting (nothing there yet) | queued | running | stopped (saved) | cancelled |
    failed | lost (its process is gone without a word) | done.
  step: the last one that was logged. seconds: of training alone.
  train_loss, eval_loss: nats per next token, of the last logged interval and of the
  final evaluation; None where there is none.
  tokens_per_second: of the last logged interval. host: where it is or last was.
  exit_class: of its last end, see `launch.exits`. reason: for what it is, one line.
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
  """Which trials a sweep is to start.

  todo:     nobody is at them, and they are not done.
  active:   queued or running.
  given_up: ended in bad input or diverged: it would end the same way.
  states:   of all trials, by name.
  copies:   by name, trials that get the results of another one (`copies`).
  """

  todo: list[Trial]
  active: list[Trial]
  given_up: list[Trial]
  states: dict[str, State]
  copies: dict[str, Trial]


def load_experiment(file: Path) -> ModuleType:
  """Returns the module of an experiment file."""
  spec = importlib.util.spec_from_file_location("experiment", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def points(
  experiment: ModuleType, preset: str | None, names: Sequence[str] | None = None
) -> list[Overrides]:
  """Returns the overrides of every trial of an experiment, each with its `name`.

  `names` chooses among the `sweep_<name>` generators and crosses them in that order;
  None means `sweep` where there is one, else all generators in the order of the file.

  Raises:
    ConfigError: an unknown name, two generators that set the same key, or a generator
      that raises or has something else than overrides.
  """
  arguments = () if preset is None else (preset,)
  if names is None and hasattr(experiment, "sweep"):
    return [_named([point]) for point in _called(experiment, "sweep", arguments)]
  generators = {
    name.removeprefix("sweep_"): name
    for name in vars(experiment)
    if name.startswith("sweep_")
  }
  for name in names or ():
    if name not in generators:
      raise ConfigError(
        f"--sweep must name some of {', '.join(generators) or 'none (no sweeps)'}, "
        f"got {name!r}."
      )
  chosen = [
    _called(experiment, generators[name], arguments) for name in names or generators
  ]
  return [_named(parts) for parts in itertools.product(*chosen) if parts]


def _called(
  experiment: ModuleType, name: str, arguments: tuple[str, ...]
) -> list[Overrides]:
  """Returns what a function of an experiment yields; it is the user's own code."""
  try:
    found = list(getattr(experiment, name)(*arguments))
  except Exception as error:
    # A ValueError is the experiment's own message; all else is a fault in its code.
    reason = str(error) if type(error) is ValueError else exits.describe(error)
    raise ConfigError(f"--config: {name}(): {reason}") from error
  for point in found:
    if not isinstance(point, dict):
      raise ConfigError(
        f"--config: {name}() must yield dicts of overrides, got {point!r}."
      )
  return found


def plan(
  base: Config, overrides: Overrides, swept: Iterable[Overrides], root: Path
) -> list[Trial]:
  """Returns the trials of a sweep, their configs checked.

  Args:
    base: the experiment's config.
    overrides: of the command line; they win over the sweep's, but may not set what
      the trials are named by.
    swept: from `points`; none means the config itself.
    root: the sweep folder.

  Raises:
    ConfigError: names the trials that cannot run, and why.
  """
  trials: list[Trial] = []

  def add(point: Overrides) -> None:
    for key in overrides:
      if any(part.startswith(f"{_short(key)}=") for part in _parts(point)):
        raise ConfigError(f"{key}: set by the sweep; choose what varies with --sweep.")
    config = with_overrides(base, point | overrides)
    _check_name(config.name)
    validate(config)
    trials.append(Trial(config, accounting.resolve(config), root / config.name))

  swept = list(swept) or [{}]
  _collect_errors(add, [(point.get("name", base.name), point) for point in swept])
  name, count = collections.Counter(trial.name for trial in trials).most_common(1)[0]
  if count > 1:
    raise ConfigError(
      f"name must be different for every trial, got {name!r} {count} times."
    )
  return trials


def check_folders(trials: list[Trial], files_are_here: bool = True) -> None:
  """Checks that the trials find their input files, and no other run in their folders.

  Args:
    trials: of a sweep.
    files_are_here: trials are trained where the same files are seen.

  Raises:
    ConfigError: names the trials that cannot run, and why.
  """
  check_files = functools.cache(cli.check_files)

  def check(trial: Trial) -> None:
    if files_are_here:
      config = cli.of_run(trial.config, trial.workdir)
      check_files(config.data, config.tokenizer)
      check_source(trial.config, trial.workdir)
    _check_folder(trial)

  _collect_errors(check, [(trial.name, trial) for trial in trials])


def check_devices(trials: list[Trial], num_devices: int, source: str) -> None:
  """Checks that every mesh fits the devices that a trial will have.

  Args:
    trials: of a sweep.
    num_devices: of one trial.
    source: which flags say so.

  Raises:
    ConfigError: names the trials that do not fit, and why.
  """

  def check(trial: Trial) -> None:
    try:
      validate(trial.config, num_devices)
    except ConfigError as error:
      raise ConfigError(f"{error} The devices come from {source}.") from error

  _collect_errors(check, [(trial.name, trial) for trial in trials])


def prepare(trial: Trial) -> None:
  """Fills the run folder with its config: `launch.train --workdir` then trains it."""
  trial.workdir.mkdir(parents=True, exist_ok=True)
  (trial.workdir / "error.txt").unlink(missing_ok=True)
  write_json(trial.workdir / "config.json", to_dict(trial.config))


def select(trials: list[Trial], pattern: str | None) -> list[Trial]:
  """Returns the trials that `--only` names.

  The pattern is one or several parts of a name, separated by commas, each a shell
  pattern: `kind=sequential,seed=*` wants both.

  Raises:
    ConfigError: no trial matches.
  """
  if pattern is None:
    return trials
  wanted = pattern.split(",")
  chosen = [
    trial
    for trial in trials
    if all(fnmatch.filter(trial.name.split(","), part) for part in wanted)
  ]
  if not chosen:
    examples = "\n".join(f"  {trial.name}" for trial in trials[:_MAX_SHOWN])
    raise ConfigError(f"--only: no trial matches {pattern!r}; there are\n{examples}")
  return chosen


def read_states(planned: list[Trial]) -> dict[str, State]:
  """Returns the state of every trial by its name; asks the schedulers once."""
  jobs = engines.find_jobs(planned)
  states = {trial.name: read_state(trial, jobs.get(trial.name)) for trial in planned}
  for name, original in copies(planned, states).items():
    reason = f"the same run as {original.name}"
    states[name] = dataclasses.replace(states[name], reason=reason)
  return states


def copies(
  planned: Iterable[Trial], states: dict[str, State] | None = None
) -> dict[str, Trial]:
  """Returns, by the name of a trial, the one that is trained in its place.

  A sweep over depth and lambda has the baseline once for each lambda: one of equal runs
  (`config.essential`) is trained, the first or, by `states`, the one that is furthest;
  `share` gives the others its results. Trials that are at work or done stay.
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


def share(planned: Sequence[Trial], states: dict[str, State]) -> dict[str, State]:
  """Gives trials the results of one that is done and the same run, see `copies`.

  Returns the states after that.
  """
  originals, after = copies(planned, states), dict(states)
  for trial in planned:
    original = originals.get(trial.name)
    if original is not None and states[original.name].kind == "done":
      adopt(trial, original)
      after[trial.name] = read_state(trial)
  return after


def adopt(trial: Trial, original: Trial) -> None:
  """Fills the run folder of a trial from that of one that is the same run, and done.

  Does nothing where a process holds the folder.
  """
  with contextlib.suppress(ConfigError), cli.exclusive(trial.workdir):
    for path in sorted(original.workdir.iterdir()):
      copy = trial.workdir / path.name
      if path.is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
      elif path.name not in _OF_ONE_FOLDER and not path.name.startswith("log."):
        shutil.copy2(path, copy)
    run = json.loads((original.workdir / "run.json").read_text())
    write_json(trial.workdir / "run.json", run | {"same_run_as": original.name})
    write_json(trial.workdir / "config.json", to_dict(trial.config))
    (trial.workdir / "error.txt").unlink(missing_ok=True)
    (trial.workdir / "DONE").touch()


def read_state(trial: Trial, job: Job | None = None) -> State:
  """Returns the state of a trial from its run folder, and its job if there is one."""
  folder = trial.workdir
  said = _last_status(folder)
  last = _last_train_record(folder / "metrics.jsonl")
  facts = {"host": said.get("host") or (job.host if job else None) or None}
  if last:
    facts |= {
      "step": last["step"],
      "seconds": last["seconds"],
      "train_loss": last["loss"][0],
      "tokens_per_second": last["tokens_per_second"],
    }
  if (folder / "DONE").exists():
    try:
      result = json.loads((folder / "eval.json").read_text())
      return State("done", **facts, eval_loss=result["main_loss"]["mean"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
      reason = (
        f"{folder / 'eval.json'} cannot be read ({type(error).__name__}); remove "
        f"{folder / 'DONE'} to evaluate again"
      )
      return State("failed", **facts, exit_class="config", reason=reason)
  at_work = job is not None and job.state in ("queued", "running")
  in_use = cli.is_in_use(folder)
  if in_use or (at_work and job.state == "running"):
    now = said.get("state") != "ended"  # Else an earlier attempt said so.
    return State("running", **facts, reason=said.get("reason") if now else None)
  if at_work:
    return State("queued", **facts, reason=job.reason or None)
  if job is not None and job.state == "cancelled":
    return State("cancelled", **facts)
  is_unknown = in_use is None and (job is None or job.state == "unknown")
  if is_unknown and _lives_elsewhere(said):
    return State("running", **facts, reason="as its machine wrote lately")
  return dataclasses.replace(_ended(folder, said, job), **facts)


def _ended(folder: Path, said: dict[str, Any], job: Job | None) -> State:
  """Returns what became of a trial at which nobody is."""
  job_reason = job.reason if job is not None else ""
  if said.get("state") == "ended":
    exit_class, reason = said["exit_class"], said["reason"] or job_reason or None
    kind = "stopped" if exit_class in ("yielded", "done") else "failed"
    return State(kind, exit_class=exit_class, reason=reason)
  if said:
    reason = job_reason or "its process is gone; it left no word"
    return State("lost", exit_class="infrastructure", reason=reason)
  if (folder / "error.txt").exists():
    reason = (folder / "error.txt").read_text().partition("\n")[0]
    return State("failed", exit_class="infrastructure", reason=reason)
  if job is not None and job.state == "ended":
    reason = job_reason or "its job ended before training began"
    return State("lost", exit_class="infrastructure", reason=reason)
  begun = (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()
  return State("stopped" if begun else "waiting")


def _last_status(folder: Path) -> dict[str, Any]:
  """Returns status.json, but not if it is older than the job the trial was given to."""
  said, record = status.read(folder) or {}, engines.read_record(folder)
  return {} if record and said and said["time"] < record["submitted"] else said


def _lives_elsewhere(said: dict[str, Any]) -> bool:
  """Whether another machine is at it whose lock the file system does not show here."""
  return (
    bool(said)
    and said["state"] != "ended"
    and said["host"] != socket.gethostname()
    and time.time() - said["time"] < _SILENT_SECONDS
  )


def choose(planned: list[Trial], again: bool) -> Choice:
  """Returns what is to be started; with `again` also what was given up."""
  states = read_states(planned)
  choice = Choice([], [], [], states, copies(planned, states))
  for trial in planned:
    state = states[trial.name]
    if trial.name in choice.copies:
      continue
    if state.kind in ("queued", "running"):
      choice.active.append(trial)
    elif state.kind == "failed" and not (again or exits.is_retried(state.exit_class)):
      choice.given_up.append(trial)
    elif state.kind != "done":
      choice.todo.append(trial)
  return choice


def _named(parts: Sequence[Overrides]) -> Overrides:
  """Returns the union of some overrides, with the name they give a trial."""
  merged: Overrides = {}
  for part in parts:
    if twice := (merged.keys() & part.keys()) - {"name"}:
      raise ConfigError(
        f"{min(twice)}: set by two of the sweeps; choose among them with --sweep."
      )
    merged |= part
  names = [part.get("name", _name_of(part)) for part in parts]
  return merged | {"name": ",".join(filter(None, names)) or "default"}


def _parts(point: Overrides) -> list[str]:
  return point.get("name", "").split(",")


def _name_of(overrides: Overrides) -> str:
  """Returns `depth=2,trunk.kind=gpt2`: made of what is set, whatever else there is."""
  return ",".join(f"{_short(k)}={_text(v)}" for k, v in overrides.items())


@functools.cache
def _short(key: str) -> str:
  """Drops the section of a key of `mtp`, and of one that no other section has."""
  leaf = key.rpartition(".")[2]
  same = [k for k in dotted_keys() if k.rpartition(".")[2] == leaf]
  return leaf if key.startswith("mtp.") or same == [key] else key


def _text(value: Any) -> str:
  if isinstance(value, (list, tuple)):
    return "+".join(map(_text, value))
  text = f"{value:g}" if isinstance(value, float) else str(value)
  return re.sub(r"[^A-Za-z0-9._+-]", "-", text)


def _check_name(name: str) -> None:
  if not re.fullmatch(rf"[A-Za-z0-9=,._+-]{{1,{_MAX_NAME}}}", name):
    raise ConfigError(
      f"name must be 1 to {_MAX_NAME} letters, digits or any of '=,._+-', got {name!r}."
    )


def _collect_errors(check: Callable[[Any], None], named: list[tuple[str, Any]]) -> None:
  """Calls `check` on every item; the errors are raised together, equal ones once."""
  problems: dict[str, list[str]] = {}
  for name, item in named:
    try:
      check(item)
    except (ConfigError, DataError) as error:
      problems.setdefault(str(error), []).append(name)
  if not problems:
    return
  lines = []
  for error, names in list(problems.items())[:_MAX_SHOWN]:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    lines.append(f"{names[0]}{others}: {error}")
  if len(problems) > _MAX_SHOWN:
    lines.append(f"and {len(problems) - _MAX_SHOWN} other problems.")
  raise ConfigError("\n".join(lines))


def check_active(trials: Iterable[Trial]) -> None:
  """Checks that what others are to train, or train already, is what is planned.

  Raises:
    ConfigError: names the trials that have another config, and the difference.
  """

  def check(trial: Trial) -> None:
    if (trial.workdir / "config.json").exists():
      check_resumable(read_config(trial.workdir), trial.config)

  _collect_errors(check, [(trial.name, trial) for trial in trials])


def _check_folder(trial: Trial) -> None:
  """Refuses a run folder that holds something else than the trial."""
  saved_config = trial.workdir / "config.json"
  if not saved_config.exists():
    return
  saved = read_config(trial.workdir)
  if is_begun(trial.workdir):
    check_resumable(saved, trial.config)
  if not (trial.workdir / "DONE").exists():
    return
  for key, (there, now) in difference(saved, trial.config).items():
    if key.startswith("eval."):
      raise ConfigError(
        f"{key} must be {there!r}, with which the trial was evaluated, got {now!r}; "
        f"remove {trial.workdir / 'DONE'} to evaluate it again."
      )


@functools.cache
def _counts(shape: Config) -> accounting.Counts:
  return accounting.count(shape)


def _last_train_record(path: Path) -> dict[str, Any] | None:
  """Returns the last whole `train` line near the end of a metrics.jsonl."""
  if not path.is_file():
    return None
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
    # The first line of the tail and the last one may be cut.
    for line in reversed(file.read().split(b"\n")):
      try:
        record = json.loads(line)
        if record["kind"] == "train" and _SHOWN <= record.keys():
          return record
      except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        continue
  return None
