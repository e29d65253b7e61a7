"""The trials of an experiment file: their names and configs, checked before any starts.

An experiment file has `get_config([preset])` and generators `sweep_<name>([preset])` of
dotted overrides, crossed by name. A function `sweep([preset])` instead yields the
trials one by one. Every function gets the preset, if one is named.
"""

import collections
import fnmatch
import functools
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from launch import cli, exits
from launch.states import Trial
from mtp_jax import accounting, run_folder
from mtp_jax.checkpoint import check_resumable
from mtp_jax.config import (
  Config,
  ConfigError,
  difference,
  dotted_keys,
  to_dict,
  with_overrides,
)
from mtp_jax.config_rules import validate
from mtp_jax.data.sources import DataError
from mtp_jax.saved_model import check_source

# Flags that are defined here belong to the command that asked for them, in its --help.
flags.disclaim_key_flags()

Overrides = dict[str, Any]
_MAX_SHOWN = 10
_MAX_NAME = 200  # Bytes: file systems allow 255.


def define_workdir() -> None:
  """Defines `--workdir` of a sweep."""
  cli.define_workdir(
    "folder of the sweep, in which each trial has its run folder; by default runs/NAME "
    "or runs/NAME_PRESET of the experiment",
    required=False,
  )


def define_flags() -> None:
  """Defines `--sweep` and `--only`, which choose among the trials of `--config`."""
  flags.DEFINE_list(
    "sweep", None, "which sweep_<name> of the experiment to cross; by default all",
    allow_override=True,
  )
  flags.DEFINE_string(
    "only", None, "only the trials whose name has these parts, each a shell pattern, "
    "separated by commas: kind=sequential,seed=*", allow_override=True,
  )


def from_flags(root: Path) -> tuple[list[Trial], list[Trial]]:
  """Returns all trials of the experiment in a sweep folder, and the trials of `--only`.

  Raises:
    ConfigError: see `points`, `plan` and `select`.
  """
  file, preset = cli.config_file()
  swept = points(load_experiment(file), preset, flags.FLAGS.sweep)
  everything = plan(cli.load_config(), cli.config_overrides(), swept, root)
  return everything, select(everything, flags.FLAGS.only)


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
    workdir = run_folder.of_trial(root, config.name)
    trials.append(Trial(config, accounting.resolve(config), workdir))

  swept = list(swept) or [{}]
  _collect_errors(add, [(point.get("name", base.name), point) for point in swept])
  name, count = collections.Counter(trial.name for trial in trials).most_common(1)[0]
  if count > 1:
    raise ConfigError(
      f"name must be different for every trial, got {name!r} {count} times."
    )
  # Different names can have one short folder: a run would take over another's.
  folders: dict[Path, Trial] = {}
  for trial in trials:
    if (other := folders.setdefault(trial.workdir, trial)) is not trial:
      raise ConfigError(
        f"name must give every trial a folder of its own, got {other.name!r} and "
        f"{trial.name!r}, both {trial.workdir.name!r}."
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
  (trial.workdir / run_folder.ERROR).unlink(missing_ok=True)
  # Not `write_config`: the tokenizer is not in the run folder yet.
  run_folder.write(trial.workdir, run_folder.CONFIG, to_dict(trial.config))


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


def _named(parts: Sequence[Overrides]) -> Overrides:
  """Returns the union of some overrides, with the name they give a trial."""
  merged: Overrides = {}
  for part in parts:
    if twice := (merged.keys() & part.keys()) - {"name"}:
      raise ConfigError(
        f"{min(twice)}: set by two of the sweeps; choose among them with --sweep."
      )
    merged |= part
  names = [part.get("name", name_of(part)) for part in parts]
  return merged | {"name": ",".join(filter(None, names)) or "default"}


def _parts(point: Overrides) -> list[str]:
  return point.get("name", "").split(",")


def name_of(overrides: Overrides) -> str:
  """Returns `depth=2,trunk.kind=gpt2`: made of what is set, whatever else there is."""
  return ",".join(f"{_short(k)}={_text(v)}" for k, v in overrides.items())


@functools.cache
def _short(key: str) -> str:
  """Drops the section of a key of `mtp`, and of a key that no other section has."""
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
  """Calls `check` on every item; the errors are raised together, equal errors once."""
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
    if run_folder.is_run(trial.workdir):
      check_resumable(run_folder.read_config(trial.workdir), trial.config)

  _collect_errors(check, [(trial.name, trial) for trial in trials])


def _check_folder(trial: Trial) -> None:
  """Refuses a run folder that holds something else than the trial."""
  if not (trial.workdir / run_folder.CONFIG).exists():
    return
  saved = run_folder.read_config(trial.workdir)
  if run_folder.is_begun(trial.workdir):
    check_resumable(saved, trial.config)
  if not run_folder.is_done(trial.workdir):
    return
  for key, (there, now) in difference(saved, trial.config).items():
    if key.startswith("eval."):
      raise ConfigError(
        f"{key} must be {there!r}, with which the trial was evaluated, got {now!r}; "
        f"remove {trial.workdir / run_folder.DONE} to evaluate it again."
      )
