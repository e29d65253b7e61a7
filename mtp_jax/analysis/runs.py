"""Run folders as tables: one row a trial.

config.json, eval.json and metrics.jsonl are all that decides a number; parameters and
FLOPs follow from the config. A run.json adds only the commit, the hardware and the
versions. A trial is finished when it has an eval.json.
"""

import dataclasses
import datetime
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mtp_jax import accounting, files, run_folder
from mtp_jax.config import (
  Config,
  ConfigError,
  MtpConfig,
  from_saved,
  next_token_only,
)

SCALARS = ("main_loss", "bits_per_byte", "simulated_accepted_length")
GENERATIVE = (
  "task_accuracy", "next_line_exact_match", "function_parses",
  "decoded_tokens_per_round", "sampled_tokens_per_round",
)
# What not every evaluation has: those of older code, or without `eval.both_proposals`.
OPTIONAL = (
  "task_new", "argmax_proposal_tokens_per_round", "sample_proposal_tokens_per_round",
)
PER_DEPTH = ("depth_loss", "depth_accuracy")  # Depth 0 is the next token.
# From depth 1; measures of decoding are null where nothing was decoded.
PER_DRAFT = (
  "teacher_forced_agreement", "joint_prefix_agreement", "decoded_survival",
  "decoded_acceptance", "sampled_survival", "sampled_acceptance",
)

METRIC_COLUMNS = ("trial", "metric", "at_depth", "mean", "stderr", "count")
CURVE_COLUMNS = (
  "trial", "split", "step", "tokens", "seconds", "loss", "bits_per_byte",
  "task_accuracy", "task_new",
)


class RunsError(ValueError):
  """A folder or file that cannot be read; the message names it, and the line."""


@dataclasses.dataclass(frozen=True)
class Runs:
  """Everything below one folder.

  trials:  one row a trial; `config` holds the Config as asked for.
  metrics: long: trial, metric, at_depth, mean, stderr (over held-out documents), count
           (of what was averaged, where eval.json has it). `task_accuracy:GROUP` is the
           accuracy of one group of a task's prompts.
  curves:  long: trial, split (train, validation or test), step, tokens, seconds, loss
           (next token), bits_per_byte, task_accuracy, task_new; NaN: not measured.
  """

  root: Path
  trials: pd.DataFrame
  metrics: pd.DataFrame
  curves: pd.DataFrame

  def of_source(self, source: str) -> "Runs":
    """Returns the trials on one text or task."""
    is_own = self.trials["config"].map(lambda config: config.data.source == source)
    names = self.trials.loc[is_own, "trial"]
    tables = {
      name: table[table["trial"].isin(names)].reset_index(drop=True)
      for name, table in vars(self).items() if name != "root"
    }
    return Runs(self.root, **tables)


def load(root: Path) -> Runs:
  """Reads all run folders in and below `root`.

  Raises:
    RunsError: nothing there, or a file that is damaged or breaks the contract.
  """
  root = Path(root)
  if not root.is_dir():
    raise RunsError(f"{root}: no such folder.")
  trials, metrics, curves = [], [], []
  for folder in _run_folders(root):
    try:
      trial, its_metrics, its_curve = _load_run(root, folder)
    except RunsError:
      raise
    except (ValueError, TypeError, AttributeError, LookupError) as e:
      raise RunsError(
        f"{folder}: its files must be what training wrote ({type(e).__name__}: {e})."
      ) from e
    trials.append(trial)
    metrics += its_metrics
    curves += its_curve
  if not trials:
    raise RunsError(
      f"{root}: no run folder in it or below it (a run folder has a "
      f"{run_folder.CONFIG})."
    )
  return Runs(
    root,
    pd.DataFrame(trials),
    pd.DataFrame(metrics, columns=METRIC_COLUMNS).astype({"count": "Int64"}),
    pd.DataFrame(curves, columns=CURVE_COLUMNS),
  )


def baseline(config: Config) -> Config:
  """Returns plain next-token prediction at the same model size."""
  return dataclasses.replace(config, mtp=next_token_only(config.mtp))


def counts(config: Config) -> accounting.Counts:
  """Returns `accounting.count` of what is trained; trials of one shape share it."""
  resolved = accounting.resolve(config)
  return _count(
    dataclasses.replace(
      resolved,
      name="",
      seed=0,
      mtp=_shape(resolved.mtp),
      data=dataclasses.replace(resolved.data, seed=0, path=""),
      optimizer=dataclasses.replace(resolved.optimizer, learning_rate=1.0),
      train=dataclasses.replace(
        resolved.train, num_steps=1, trunk_from="", start_from=""
      ),
    )
  )


_count = functools.lru_cache(maxsize=None)(accounting.count)


def _shape(mtp: MtpConfig) -> MtpConfig:
  return dataclasses.replace(mtp, weight=0.0, final_weight=0.0, schedule="constant")


def _run_folders(root: Path) -> Iterator[Path]:
  for folder, below, names in os.walk(root):
    below.sort()
    if run_folder.CONFIG in names:
      below.clear()
      yield Path(folder)


def _load_run(root: Path, folder: Path) -> tuple[dict, list[dict], list[dict]]:
  config = _read_config(folder / run_folder.CONFIG)
  name = run_folder.trial_of(folder, config.name)
  if folder != root:
    name = (folder.relative_to(root).parent / name).as_posix()
  records = _read_records(folder / run_folder.METRICS)
  evaluation = read_json(folder / run_folder.EVAL)
  run = read_json(folder / run_folder.RUN) or {}
  counted, plain = counts(config), counts(baseline(config))
  trained = [x for x in records if x["kind"] == "train"]
  if evaluation is not None:
    status = "finished"
  else:
    status = "unfinished" if trained else "not started"
  last = trained[-1] if trained else {}
  trial = {
    "trial": name,
    "status": status,
    "step": last.get("step", 0),
    "num_steps": accounting.resolve(config).train.num_steps,
    "config": config,
    "size": plain.deployed,
    "deployed": counted.deployed,
    "total": counted.total,
    "flops_per_token": counted.train_flops_per_token,
    "learning_rate": config.optimizer.learning_rate,
    "seed": config.seed,
    "data_seed": config.data.seed,
    "skipped_steps": int(last.get("nonfinite_steps", 0)),
    "tokens": math.nan,
    "train_flops": math.nan,
    "train_seconds": math.nan,
    "split": config.eval.split,
    "num_documents": 0,
    "stopped_step": math.nan,
    "stopped_tokens": math.nan,
    "date": "",
    "commit": run.get("commit", ""),
    "hardware": run.get("hardware", ""),
    "versions": " ".join(f"{k} {v}" for k, v in run.get("versions", {}).items()),
  }
  metrics = []
  if evaluation is not None:
    path = folder / run_folder.EVAL
    keys = ("step", "tokens", "train_flops", "train_seconds", "num_documents")
    trial |= {key: require(evaluation, key, path) for key in keys}
    # Null where training did not stop on success; older runs could not.
    stopped = evaluation.get("stopped") or {}
    trial |= {f"stopped_{key}": _number(stopped.get(key)) for key in ("step", "tokens")}
    trial["date"] = _day(path)
    metrics = [{"trial": name} | x for x in _metrics(evaluation, path)]
  curve = [{"trial": name} | x for x in _curve(records, folder / run_folder.METRICS)]
  return trial, metrics, curve


def _metrics(evaluation: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
  """Yields the rows of an eval.json, without `trial`; see mtp_jax/evaluate.py."""

  def row(metric: str, depth: int, value: dict[str, float]) -> dict[str, Any]:
    mean, error = (_number(require(value, key, path)) for key in ("mean", "stderr"))
    return {
      "metric": metric,
      "at_depth": depth,
      "mean": mean,
      "stderr": error,
      "count": value.get("count"),
    }

  for metric in SCALARS:
    yield row(metric, 0, require(evaluation, metric, path))
  for metric in (*GENERATIVE, *OPTIONAL):
    value = evaluation.get(metric) if metric in OPTIONAL else require(
      evaluation, metric, path
    )
    if value is not None:
      yield row(metric, 0, value)
  # Only tasks have groups.
  for group, value in evaluation.get("task_accuracy_groups", {}).items():
    yield row(f"task_accuracy:{group}", 0, value)
  for metrics, first in ((PER_DEPTH, 0), (PER_DRAFT, 1)):
    for metric in metrics:
      for depth, value in enumerate(require(evaluation, metric, path) or (), first):
        yield row(metric, depth, value)


def _curve(records: list[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
  for record in records:
    split = record["kind"]
    if split in ("validation", "test") or (split == "train" and "loss" in record):
      keys = ("step", "tokens", "seconds")
      values = {key: _number(require(record, key, path)) for key in keys}
      values["loss"] = _number(require(record, "loss", path)[0])
      if split != "train":
        require(record, "bits_per_byte", path)
      scores = ("bits_per_byte", "task_accuracy", "task_new")
      yield {"split": split} | values | {x: _number(record.get(x)) for x in scores}


def _read_config(path: Path) -> Config:
  try:
    return from_saved(read_json(path))
  except ConfigError as e:
    raise RunsError(f"{path}: {e}") from e


def read_json(path: Path) -> Any:
  """Returns the object in it, or None where there is no such file."""
  try:
    return files.read_json(path)
  except FileNotFoundError:
    return None
  except json.JSONDecodeError as e:
    raise RunsError(f"{path}, line {e.lineno}: not JSON ({e}).") from e
  except (OSError, ValueError) as e:
    raise RunsError(f"{path}: {e}") from e


def _text(path: Path) -> str:
  try:
    return path.read_text()
  except (OSError, UnicodeDecodeError) as e:
    reason = getattr(e, "strerror", None) or e
    raise RunsError(f"{path}: it cannot be read ({reason}).") from e


def _read_records(path: Path) -> list[dict[str, Any]]:
  """Returns the records of a metrics.jsonl.

  A run that was killed may leave half a line at the end; that one is passed over.
  """
  if not path.exists():
    return []
  records = []
  for number, line in enumerate(_text(path).splitlines(keepends=True), start=1):
    try:
      record = json.loads(line)
      if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
        raise ValueError("a record needs the keys kind and step")
    except (ValueError, RecursionError) as e:
      if not line.endswith("\n"):
        break
      raise RunsError(f"{path}, line {number}: not a record ({e}).") from e
    records.append(record)
  return records


def _day(path: Path) -> str:
  """Returns the day on which a file was written, in UTC."""
  written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
  return written.date().isoformat()


def _number(value: float | None) -> float:
  """null is NaN: a loss that diverged, an error over fewer than two documents."""
  return math.nan if value is None else float(value)


def require(values: Any, key: str, path: Path) -> Any:
  if not isinstance(values, dict) or key not in values:
    raise RunsError(f"{path}: key {key!r} is missing; the report needs it.")
  return values[key]
