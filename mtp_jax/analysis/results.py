"""What an experiment measured, as small tables to keep: `experiments/results/NAME`.

trials.csv   one row a trial: state, size, cost (`added_parameters`: parameters that the
             deployed model lacks), and the config keys (dotted) that vary.
metrics.csv  long: the final evaluation; see `runs.Runs`.
curves.csv   long: the validation and test records of training.
run.json     the commands, commits, hardware, versions, seeds and day of the runs, what
             is still missing (`interim`, in words; empty: nothing), and under `config`
             every config value that all trials share.

Nothing is rounded. A ladder keeps the tables of its report instead, see `read_ladder`.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mtp_jax.analysis.runs import (
  CURVE_COLUMNS,
  METRIC_COLUMNS,
  Runs,
  RunsError,
  read_json,
  require,
)
from mtp_jax.config import flatten, to_dict
from mtp_jax.files import write_json

# Trials that agree in these start alike and see the same data in the same order.
REPLICATE = ("seed", "data.seed")
# Config values that trials must have; a function chooses a value of the column.
Where = dict[str, Any]
_STATE = (
  "trial", "status", "step", "size", "tokens", "train_flops", "train_seconds",
)
# Written for every trial; older results lack them.
_COUNTS = (
  "added_parameters", "flops_per_token", "stopped_step", "stopped_tokens",
)
_ALWAYS = (*REPLICATE, "data.source", "mtp.kind", "mtp.depth")
_CURVES = tuple(column for column in CURVE_COLUMNS if column != "seconds")
# What older curves lack: they hold validation records only.
_NEW_CURVES = {"split": "validation", "task_new": math.nan}
_NUMBERS = {
  *_STATE, *_COUNTS, *_ALWAYS, *METRIC_COLUMNS, *_CURVES, "gain", "slope", "low",
  "high", "n",
} - {"trial", "status", "metric", "data.source", "mtp.kind", "split"}


@dataclasses.dataclass(frozen=True)
class Facts:
  """Where results come from: run.json without the config. `date` is a UTC day.

  interim: how far an experiment is whose verdicts may still change; older run.json lack
           the key.
  """

  command: tuple[str, ...]
  commit: tuple[str, ...]
  hardware: tuple[str, ...]
  versions: tuple[str, ...]
  seeds: tuple[int, ...]
  finished: int
  trials: int
  date: str
  interim: str = ""


@dataclasses.dataclass(frozen=True)
class Results:
  """A results folder; `trials` has every config key, the shared ones included."""

  folder: Path
  trials: pd.DataFrame
  metrics: pd.DataFrame
  curves: pd.DataFrame
  facts: Facts

  def key(self, key: str) -> str:
    """Returns `key` if trials have it.

    Raises:
      RunsError: they do not; names the file.
    """
    if key not in self.trials:
      raise RunsError(
        f"{self.folder / 'trials.csv'}: key {key!r} is missing, and run.json has it "
        f"not either; the claims need it."
      )
    return key

  def select(self, where: Where) -> pd.DataFrame:
    """Returns the finished trials whose dotted config keys have these values.

    A function, such as `max`, chooses among the values that all trials have.

    Raises:
      RunsError: there is no such key.
    """
    rows = self.trials[self.trials["status"] == "finished"]
    for key, value in where.items():
      values = self.trials[self.key(key)]
      rows = rows[rows[key] == (value(values) if callable(value) else value)]
    return rows

  def measured(self, metric: str, where: Where, at_depth: int = 0) -> pd.DataFrame:
    """Returns `select(where)` with column `value`, NaN where it was not measured."""
    metrics = self.metrics
    own = metrics[(metrics["metric"] == metric) & (metrics["at_depth"] == at_depth)]
    rows = self.select(where)
    means = rows["trial"].map(own.set_index("trial")["mean"])
    return rows.assign(value=means.astype(float))  # Without a row the map has no type.

  def value(
    self, metric: str, where: Where, at_depth: int = 0, by: Sequence[str] = ()
  ) -> pd.Series:
    """Returns the metric of an arm, indexed by REPLICATE and the keys `by`."""
    keys = [*REPLICATE, *map(self.key, by)]
    return by_key(self.measured(metric, where, at_depth), keys)


def by_key(rows: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
  """Returns `value` indexed by the keys, which must tell the trials apart.

  Raises:
    RunsError: they do not; names two trials.
  """
  twice = rows[rows.duplicated(list(keys), keep=False)]
  if len(twice):
    names = " and ".join(twice["trial"].iloc[:2])
    raise RunsError(
      f"trials {names} have the same {', '.join(keys)}: a claim cannot tell which of "
      f"them to take."
    )
  # Without trials pandas would take the values for text.
  return rows.set_index(list(keys))["value"].astype(float)


@dataclasses.dataclass(frozen=True)
class LadderResults:
  """The tables of `launch.report` that claims about a ladder need; see gains.py."""

  folder: Path
  pairs: pd.DataFrame
  slopes: pd.DataFrame
  facts: Facts


def of(runs: Runs, commands: Sequence[str] = (), interim: str = "") -> Results:
  """Returns what `read` returns, of run folders."""
  trials = runs.trials.reset_index(drop=True)
  trials = trials.assign(added_parameters=trials["total"] - trials["deployed"])
  config = pd.DataFrame([flatten(to_dict(config)) for config in trials["config"]])
  curves = runs.curves.loc[runs.curves["split"] != "train", list(_CURVES)]
  facts = dataclasses.replace(_facts(trials, commands), interim=interim)
  table = pd.concat([trials[[*_STATE, *_COUNTS]], config.drop(columns="name")], axis=1)
  return Results(runs.root, table, runs.metrics, curves, facts)


def write(
  runs: Runs, folder: Path, commands: Sequence[str], interim: str = ""
) -> list[Path]:
  """Writes the results folder of `runs`; returns its files.

  Raises:
    RunsError: no trial is finished. Nothing is written then.
  """
  if not (runs.trials["status"] == "finished").any():
    raise RunsError(
      f"{runs.root}: no trial is finished, so there are no results to keep: "
      f"{', '.join(unfinished(runs))}."
    )
  results = of(runs, commands, interim)
  first, *others = [flatten(to_dict(config)) for config in runs.trials["config"]]
  # What all trials share stands once, in run.json.
  shared = {
    key: value for key, value in first.items()
    if key != "name" and all(config[key] == value for config in others)
  }
  left_out = {"name", *shared, *_ALWAYS}
  own = [key for key in first if key not in left_out]
  tables = {
    "trials.csv": results.trials[[*_STATE, *_COUNTS, *_ALWAYS, *own]],
    "metrics.csv": results.metrics,
    "curves.csv": results.curves,
  }
  folder.mkdir(parents=True, exist_ok=True)
  for name, table in tables.items():
    table.to_csv(folder / name, index=False)
  run = dataclasses.asdict(results.facts) | {"config": shared}
  write_json(folder / "run.json", run)
  return [*(folder / name for name in tables), folder / "run.json"]


def unfinished(runs: Runs) -> list[str]:
  """Returns how far each trial that is not finished got."""
  rows = runs.trials[runs.trials["status"] != "finished"]
  return [
    f"{row['trial']} (step {row['step']} of {row['num_steps']})"
    for _, row in rows.iterrows()
  ]


def read(folder: Path) -> Results:
  """Reads what `write` wrote.

  Raises:
    RunsError: a file is missing or damaged; names it and the key.
  """
  path = folder / "run.json"
  run = read_json(path)
  if run is None:
    raise RunsError(f"{path}: no such file; launch.report --results writes it.")
  facts = _read_facts(run, path)
  trials = _read_table(folder / "trials.csv", (*_STATE, *_ALWAYS))
  shared = require(run, "config", path)
  if not isinstance(shared, dict):
    raise RunsError(f"{path}: config must hold keys and values, got {shared!r}.")
  missing = {k: [v] * len(trials) for k, v in shared.items() if k not in trials}
  trials = pd.concat([trials, pd.DataFrame(missing, index=trials.index)], axis=1)
  metrics = _read_table(folder / "metrics.csv", METRIC_COLUMNS)
  needed = [x for x in _CURVES if x not in _NEW_CURVES]
  curves = _read_table(folder / "curves.csv", needed)
  curves = curves.assign(**{k: v for k, v in _NEW_CURVES.items() if k not in curves})
  for name, table in (("metrics.csv", metrics), ("curves.csv", curves)):
    strangers = set(table["trial"]) - set(trials["trial"])
    if strangers:
      raise RunsError(
        f"{folder / name}: trial must be one of trials.csv, got {min(strangers)!r}."
      )
  return Results(folder, trials, metrics, curves, facts)


def read_ladder(folder: Path) -> LadderResults:
  """Reads the tables that `launch.report` left of a ladder.

  Raises:
    RunsError: see `read`.
  """
  texts = ("commit", "hardware", "versions")
  trials = _read_table(folder / "all_trials.csv", ("status", "seed", *texts))
  method = ("method", "kind", "depth", "arm", "metric", "comparison")
  pairs = ("seed", "data_seed", "size", "gain")
  slopes = ("n", "slope", "low", "high")
  return LadderResults(
    folder,
    _read_table(folder / "all_pairs.csv", (*method, *pairs)),
    _read_table(folder / "all_slopes.csv", (*method, *slopes)),
    _facts(trials.fillna(dict.fromkeys(texts, "")), ()),
  )


def _read_facts(run: Any, path: Path) -> Facts:
  values = {}
  for field in dataclasses.fields(Facts):
    if field.name == "interim" and field.name not in run:
      continue
    value = require(run, field.name, path)
    kind = list if typing.get_origin(field.type) is tuple else field.type
    if not isinstance(value, kind):
      raise RunsError(
        f"{path}: {field.name} must be of type {kind.__name__}, got {value!r}."
      )
    values[field.name] = tuple(value) if kind is list else value
  return Facts(**values)


def _facts(trials: pd.DataFrame, commands: Iterable[str]) -> Facts:
  """Returns the facts of run folders, or of the table of trials of a report."""
  distinct: Callable[[str], tuple] = lambda key: tuple(  # noqa: E731
    x for x in dict.fromkeys(trials[key]) if x
  )
  return Facts(
    command=tuple(commands),
    commit=distinct("commit"),
    hardware=distinct("hardware"),
    versions=distinct("versions"),
    seeds=tuple(sorted({int(seed) for seed in trials["seed"]})),
    finished=int((trials["status"] == "finished").sum()),
    trials=len(trials),
    # Reports did not always keep it.
    date=max(trials["date"].dropna(), default="") if "date" in trials else "",
  )


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
  """Returns a CSV file that has the columns, and numbers where they are due."""
  try:
    # Empty is "not measured"; no word, such as an arm called "NA", is.
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
  except FileNotFoundError as e:
    raise RunsError(f"{path}: no such file; the claims need it.") from e
  except (ValueError, OSError) as e:
    raise RunsError(f"{path}: not a table ({e}).") from e
  for column in columns:
    if column not in table:
      raise RunsError(f"{path}: key {column!r} is missing; the claims need it.")
    values = table[column]
    is_wrong = pd.to_numeric(values, errors="coerce").isna() & values.notna()
    if column in _NUMBERS and is_wrong.any():
      raise RunsError(
        f"{path}, line {2 + is_wrong.idxmax()}: {column} must be a number, got "
        f"{values[is_wrong].iloc[0]!r}."
      )
  return table
