"""From an experiment file to the trials of a sweep: named, checked, none started.

An experiment file has `get_config([preset])` and generators `sweep_<name>([preset])` of
dotted overrides, crossed by name. A function `sweep([preset])` instead says what the
trials are, one by one. Every function gets the preset, if one is named.
"""

import collections
import dataclasses
import fnmatch
import functools
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from launch import cli
from mtp_jax import accounting
from mtp_jax.checkpoint import check_resumable
from mtp_jax.config import (
  Config,
  ConfigError,
  difference,
  dotted_keys,
  from_config_dict,
  validate,
  with_overrides,
)
from mtp_jax.data.sources import DataError
from mtp_jax.train_step import shape_of

Overrides = dict[str, Any]
_MAX_SHOWN = 10
_MAX_NAME = 200  # Bytes: file systems allow 255.
_TAIL_BYTES = 1 << 16


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
    return shape_of(self.resolved)

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
  """What a trial's run folder says.

  kind: waiting (nothing there yet) | running | stopped | failed | done.
  step: the last one that was logged. seconds: of training alone.
  train_loss, eval_loss: nats per next token, of the last logged interval and of the
  final evaluation; None where there is none.
  """

  kind: str
  step: int = 0
  seconds: float = 0.0
  train_loss: float | None = None
  eval_loss: float | None = None


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
    ConfigError: an unknown name, or two generators that set the same key.
  """
  arguments = () if preset is None else (preset,)
  if names is None and hasattr(experiment, "sweep"):
    return [_named([point]) for point in experiment.sweep(*arguments)]
  generators = {
    name.removeprefix("sweep_"): function
    for name, function in vars(experiment).items()
    if name.startswith("sweep_")
  }
  for name in names or ():
    if name not in generators:
      raise ConfigError(
        f"--sweep must name some of {', '.join(generators) or 'none (no sweeps)'}, "
        f"got {name!r}."
      )
  chosen = [list(generators[name](*arguments)) for name in names or generators]
  return [_named(parts) for parts in itertools.product(*chosen) if parts]


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


def check_folders(trials: list[Trial]) -> None:
  """Checks that the trials find their input files, and no other run in their folders.

  Raises:
    ConfigError: names the trials that cannot run, and why.
  """
  check_files = functools.cache(cli.check_files)

  def check(trial: Trial) -> None:
    check_files(trial.config.data, trial.config.tokenizer)
    _check_folder(trial)

  _collect_errors(check, [(trial.name, trial) for trial in trials])


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


def read_state(trial: Trial) -> State:
  """Returns the state of a trial from its run folder."""
  folder = trial.workdir
  last = _last_train_record(folder / "metrics.jsonl")
  progress = {
    "step": last["step"], "seconds": last["seconds"], "train_loss": last["loss"][0]
  } if last else {}
  if (folder / "DONE").exists():
    result = json.loads((folder / "eval.json").read_text())
    return State("done", **progress, eval_loss=result["main_loss"]["mean"])
  if cli.is_in_use(folder):
    return State("running", **progress)
  if (folder / "error.txt").exists():
    return State("failed", **progress)
  begun = (folder / "config.json").exists()
  return State("stopped" if begun else "waiting", **progress)


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


def _check_folder(trial: Trial) -> None:
  """Refuses a run folder that holds something else than the trial."""
  saved_config = trial.workdir / "config.json"
  if not saved_config.exists():
    return
  saved = from_config_dict(json.loads(saved_config.read_text()))
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
  if not path.exists():
    return None
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
    # The first line of the tail and the last one may be cut.
    for line in reversed(file.read().split(b"\n")):
      try:
        record = json.loads(line)
      except ValueError:
        continue
      if record["kind"] == "train":
        return record
  return None
