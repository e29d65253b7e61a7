"""A search: Optuna proposes trials, their run folders hold how good they were.

`search.journal` in the sweep folder has every trial that was asked for. Any number of
processes share it, on any engine: each asks for trials of its own, and takes over those
of a process that is gone. The lock of a run folder keeps two from training one trial.
"""

import dataclasses
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli, jobs, results_csv, trials
from launch.engines.engine import words
from launch.states import State, Trial
from mtp_jax import files, run_folder
from mtp_jax.config import Config, ConfigError, type_name

# Flags that are defined here belong to the command that asked for them, in its --help.
flags.disclaim_key_flags()

JOURNAL = "search.journal"
_LOCK = ".search.lock"
_FINAL = ("config", "diverged")  # Such a trial would end the same way.
_Suggest = Callable[[Any], trials.Overrides]


def define_flags() -> None:
  """Defines `--search` and what belongs to it."""
  flags.DEFINE_enum(
    "search", None, ["optuna"],
    "train the trials that Optuna asks for, instead of sweep(): the same command again "
    "continues, and several at once share the work", allow_override=True,
  )
  flags.DEFINE_multi_string(
    "space", [],
    "search: KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=A,B,..., separated by blanks "
    "('optimizer.learning_rate=1e-4:1e-2:log mtp.depth=1:4 mtp.kind=parallel,"
    "sequential'); by default search(trial) of the experiment returns the overrides",
    allow_override=True,
  )
  flags.DEFINE_string(
    "objective", "main_loss", "search: the column of results.csv that counts",
    allow_override=True,
  )
  flags.DEFINE_bool(
    "maximize", False, "search: the objective is to be large", allow_override=True
  )
  flags.DEFINE_integer(
    "trials", 20, "search: how many, over all processes and starts", lower_bound=1,
    allow_override=True,
  )
  flags.DEFINE_integer(
    "at_once", None,
    "search: trials that this process has open; by default --parallel times --pack, 8 "
    "on a cluster", lower_bound=1, allow_override=True,
  )


def from_flags(root: Path) -> "Search":
  """Returns the search that the flags name.

  Raises:
    ConfigError: no space, a bad one, or another search in the folder.
  """
  for name in ("sweep", "only"):
    if flags.FLAGS[name].present:
      raise ConfigError(f"--{name} is for the trials of a sweep, not for --search.")
  file, preset = cli.config_file()
  given = list(words("space", flags.FLAGS.space))
  experiment = trials.load_experiment(file)
  if given:
    suggest = parse_space(given)
  elif hasattr(experiment, "search"):
    arguments = () if preset is None else (preset,)
    suggest = lambda trial: experiment.search(trial, *arguments)  # noqa: E731
  else:
    raise ConfigError(
      f"--space is required with --search: {file} has no function search(trial)."
    )
  return Search(
    root, cli.load_config(), cli.config_overrides(), suggest, flags.FLAGS.objective,
    flags.FLAGS.maximize,
  )


def in_folder(root: Path) -> list[Trial]:
  """Returns the trials of the search in a sweep folder, if there is one."""
  if not (root / JOURNAL).exists():
    return []
  found = Search(root, cli.load_config(), cli.config_overrides(), lambda trial: {})
  return found.planned()


def parse_space(given: Sequence[str]) -> _Suggest:
  """Returns what suggests overrides for `KEY=LOW:HIGH[:log]` and `KEY=A,B,...`.

  Raises:
    ConfigError: no such key, or no such range.
  """
  space: dict[str, Callable[[Any], Any]] = {}
  for word in given:
    key, _, text = word.partition("=")
    kind = type_name(key)
    read = {"int": int, "float": float, "bool": _bool, "str": str}.get(kind)
    try:
      if key in space or read is None or not text:
        raise ValueError
      if ":" in text:
        low, high, *log = text.split(":")
        low, high = read(low), read(high)
        if kind not in ("int", "float") or log not in ([], ["log"]) or not low < high:
          raise ValueError
        if log and not low > 0:
          raise ValueError
        space[key] = _range(key, kind, low, high, bool(log))
      else:
        space[key] = _choice(key, [read(x) for x in text.split(",")])
    except ValueError as error:
      raise ConfigError(
        "--space must be KEY=LOW:HIGH, KEY=LOW:HIGH:log (LOW above 0) or KEY=A,B,..., "
        f"each key once, with values of the key's type ({kind}), got {word!r}."
      ) from error
  return lambda trial: {key: suggest(trial) for key, suggest in space.items()}


def _range(key: str, kind: str, low: Any, high: Any, log: bool) -> Callable[[Any], Any]:
  return lambda trial: getattr(trial, f"suggest_{kind}")(key, low, high, log=log)


def _choice(key: str, values: list[Any]) -> Callable[[Any], Any]:
  return lambda trial: trial.suggest_categorical(key, values)


def _bool(text: str) -> bool:
  if text.lower() not in ("true", "false"):
    raise ValueError
  return text.lower() == "true"


@dataclasses.dataclass(frozen=True)
class Open:
  """An open trial: asked for, and no value told yet."""

  number: int
  trial: Trial


class Search:
  """The trials of a search in a sweep folder.

  Args:
    root: the sweep folder.
    base, overrides: of every trial, see `trials.plan`.
    suggest: an Optuna trial -> overrides.
    objective: a measure of eval.json, by its column in results.csv.
    maximize: whether the objective is to be large.

  Raises:
    ConfigError: Optuna is not installed, or the folder has a search for another
      objective.
  """

  def __init__(
    self,
    root: Path,
    base: Config,
    overrides: trials.Overrides,
    suggest: _Suggest,
    objective: str = "main_loss",
    maximize: bool = False,
  ):
    self._optuna = _import_optuna()
    self._root, self._base, self._overrides = root, base, overrides
    self._suggest, self._objective = suggest, objective
    self._direction = "maximize" if maximize else "minimize"
    self._tried: set[int] = set()  # By this process.

  def next(self, number: int, at_once: int) -> tuple[list[Trial], list[Trial]]:
    """Tells what has ended and asks for more.

    Args:
      number: trials of the whole search.
      at_once: trials that this process has open.

    Returns:
      The trials to be trained by this process, and those that have ended.
    """
    self._root.mkdir(parents=True, exist_ok=True)
    # No two processes may take over one trial, or ask for the last one.
    with results_csv.one_at_a_time(self._root / _LOCK):
      study = self._study()
      mine = [x for x in self._tell(study) if not self._is_of_another(study, x.number)]
      while len(mine) < at_once and _num_counted(study) < number:
        mine += self._ask(study)
      mine = mine[:at_once]
      self._tried |= {x.number for x in mine}
      for x in mine:  # Those taken over too.
        study.set_user_attr(f"asker {x.number}", _own_name())
      return [x.trial for x in mine], self._ended(study)

  def planned(self) -> list[Trial]:
    """Returns all trials that were asked for, whatever became of them."""
    if not (self._root / JOURNAL).exists():
      return []
    try:
      study = self._optuna.load_study(study_name="search", storage=self._storage())
    except KeyError:  # The process that made the journal was killed.
      return []
    return [self._trial(x) for x in _asked(study)]

  def summary(self) -> str:
    """Returns how many trials have ended, and the best."""
    study = self._study()
    done = [x for x in study.trials if x.state.name == "COMPLETE"]
    failed = sum(x.state.name == "FAIL" and _is_asked(x) for x in study.trials)
    text = f"{len(done)} trial(s) done, {failed} failed, in {self._root}"
    if not done:
      return text
    best = self._trial(study.best_trial)
    return (
      f"{text}\nbest {self._objective} {study.best_value:.6g}: {best.name} in "
      f"{best.workdir}"
    )

  def _storage(self) -> Any:
    storages = self._optuna.storages
    backend = storages.journal.JournalFileBackend(str(self._root / JOURNAL))
    return storages.JournalStorage(backend)

  def _study(self) -> Any:
    study = self._optuna.create_study(
      storage=self._storage(), study_name="search", direction=self._direction,
      load_if_exists=True,
    )
    wanted = [self._direction, self._objective]
    if study.user_attrs.setdefault("objective", wanted) != wanted:
      direction, objective = study.user_attrs["objective"]
      raise ConfigError(
        f"--objective must be {objective} ({direction}), which the search in "
        f"{self._root} has, got {self._objective} ({self._direction})."
      )
    if not study.trials:
      study.set_user_attr("objective", wanted)
    return study

  def _tell(self, study: Any) -> list[Open]:
    """Tells the values of trials that have ended; returns those that nobody trains."""
    fail = self._optuna.trial.TrialState.FAIL
    for x in study.trials:
      if x.state.name == "RUNNING" and not _is_asked(x):
        study.tell(x.number, state=fail)  # Its process was killed amid asking.
    asked = [x for x in _asked(study) if x.state.name == "RUNNING"]
    planned = {x.number: self._trial(x) for x in asked}
    states = jobs.share(list(planned.values()), jobs.read_states([*planned.values()]))
    left = []
    for number, trial in planned.items():
      state = states[trial.name]
      if state.kind == "done":
        self._tell_value(study, number, trial)
      elif state.kind == "failed" and self._is_final(number, state):
        study.tell(number, state=fail)
      elif state.kind not in ("running", "queued"):
        left.append(Open(number, trial))
    return left

  def _is_final(self, number: int, state: State) -> bool:
    return state.exit_class in _FINAL or number in self._tried

  def _tell_value(self, study: Any, number: int, trial: Trial) -> None:
    measures = results_csv.measures(
      files.read_json(trial.workdir / run_folder.EVAL)
    )
    if self._objective not in measures:
      known = sorted(x for x, y in measures.items() if isinstance(y, int | float))
      raise ConfigError(
        f"--objective must be one of {', '.join(known)}, got {self._objective!r}."
      )
    value = measures[self._objective]
    if value is None:  # Nothing was measured, or it was not finite.
      study.tell(number, state=self._optuna.trial.TrialState.FAIL)
    else:
      study.tell(number, float(value))

  def _is_of_another(self, study: Any, number: int) -> bool:
    """Returns whether another process of this machine asked, and still runs."""
    host, _, pid = study.user_attrs[f"asker {number}"].rpartition(":")
    if host != socket.gethostname() or int(pid) == os.getpid():
      return False
    try:
      os.kill(int(pid), 0)
    except ProcessLookupError:
      return False
    except PermissionError:
      pass
    return True

  def _ask(self, study: Any) -> list[Open]:
    """Asks for a trial; returns nothing where its config cannot work."""
    # Of processes with one seed, each must have its own suggestions.
    seed = (self._base.seed * 1_000_003 + len(study.trials)) % 2**32
    with warnings.catch_warnings(action="ignore"):
      study.sampler = self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)
      asked = study.ask()
      try:
        overrides = self._suggest(asked)
      except ValueError as error:  # The trials before had another space.
        study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        raise ConfigError(f"--space: {error}") from error
    name = f"trial={asked.number},{trials.name_of(overrides)}"
    point = overrides | {"name": name}
    try:
      trial = self._plan(point)
    except ConfigError as error:
      print(f"not trained: {error}", flush=True)
      asked.set_user_attr("refused", str(error))
      study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
      return []
    study.set_user_attr(f"asker {asked.number}", _own_name())
    asked.set_user_attr("overrides", point)
    return [Open(asked.number, trial)]

  def _trial(self, asked: Any) -> Trial:
    return self._plan(asked.user_attrs["overrides"])

  def _plan(self, point: trials.Overrides) -> Trial:
    (trial,) = trials.plan(self._base, self._overrides, [point], self._root)
    return trial

  def _ended(self, study: Any) -> list[Trial]:
    return [self._trial(x) for x in study.trials if x.state.name == "COMPLETE"]


def _is_asked(trial: Any) -> bool:
  """Returns whether the process that asked lived to note what for."""
  return "overrides" in trial.user_attrs


def _asked(study: Any) -> list[Any]:
  return [x for x in study.trials if _is_asked(x)]


def _num_counted(study: Any) -> int:
  return sum(_is_asked(x) or "refused" in x.user_attrs for x in study.trials)


def _own_name() -> str:
  return f"{socket.gethostname()}:{os.getpid()}"


def _import_optuna() -> Any:
  try:
    import optuna
  except ImportError as error:
    raise ConfigError(
      "--search=optuna needs the package optuna, which is not installed: pip install "
      "'mtp_jax[search]'."
    ) from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna
