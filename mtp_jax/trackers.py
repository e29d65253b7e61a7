"""Trackers of a run, besides TensorBoard: Weights & Biases, MLflow, trackio.

metrics.jsonl is the truth, a tracker has a copy. At every start of a run all records of
metrics.jsonl are offered to its trackers, then each new one when it is written. A
tracker takes what is after the last step that it has: a run that was killed sends what
was lost, and of steps that are done again the tracker keeps the first values. Only what
a clock measured can differ then, on the same devices.

trackers.json in the run folder names the trackers, and has one id for the run in each.
Where they keep a run is up to their own variables (WANDB_MODE, MLFLOW_TRACKING_URI,
TRACKIO_DIR, ...). A tracker that fails ends no training.
"""

import contextlib
import contextvars
import fcntl
import importlib.util
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mtp_jax import run_folder
from mtp_jax.config import ConfigError, flatten

PROJECT = "mtp_jax"
# What --track calls them, and the modules that they need.
TRACKERS = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy"),
            "trackio": ("trackio",)}


class Sink(Protocol):
  """Takes the records of one run."""

  def write(self, record: dict[str, Any]) -> None:
    """Takes a record; steps of a kind increase."""

  def close(self) -> None:
    """Sends what is not sent yet."""


class Tracker(Sink, Protocol):
  """Has records of earlier starts of the run."""

  def last_step(self, kind: str) -> int:
    """Returns the last step of which it has a record of this kind, or -1."""


def parse(text: str | None) -> list[str]:
  """Returns the names in --track.

  Raises:
    ConfigError: there is no such tracker.
  """
  names = list(dict.fromkeys(text.split(","))) if text is not None else []
  for name in names:
    if name not in TRACKERS:
      raise ConfigError(
        f"--track must be some of {', '.join(TRACKERS)}, separated by commas, got "
        f"{text!r}."
      )
  return names


def check(names: Sequence[str]) -> None:
  """Checks that the packages of trackers are installed.

  Raises:
    ConfigError: names the first one that is missing, and how to get it.
  """
  for name in names:
    for module in TRACKERS[name]:
      if importlib.util.find_spec(module) is None:
        raise ConfigError(
          f"--track={name} needs the package {module}, which is not installed: pip "
          "install 'mtp_jax[track]'."
        )


def want(workdir: Path, names: Sequence[str]) -> None:
  """Notes in a run folder that its records go to these trackers too."""
  found = run_folder.read(workdir, run_folder.TRACKERS)
  found = found or {"id": uuid.uuid4().hex[:12], "trackers": []}
  found["trackers"] = list(dict.fromkeys([*found["trackers"], *names]))
  run_folder.write(workdir, run_folder.TRACKERS, found)


class Trackers:
  """A sink: the trackers of a run folder. One that fails is reported, and left out.

  Raises:
    ConfigError: the package of a tracker is missing.
  """

  def __init__(self, workdir: Path):
    found = run_folder.read(workdir, run_folder.TRACKERS) or {"trackers": []}
    check(found["trackers"])
    self._sinks: dict[str, tuple[Tracker, dict[str, int]]] = {}
    for name in found["trackers"]:
      config = run_folder.read(workdir, run_folder.CONFIG)
      with self._tolerant(name), contextlib.redirect_stdout(sys.stderr):
        self._sinks[name] = _KINDS[name](workdir, found["id"], config), {}

  def write(self, record: dict[str, Any]) -> None:
    kind, step = record["kind"], record["step"]
    for name, (sink, last) in list(self._sinks.items()):
      with self._tolerant(name):
        if kind not in last:
          last[kind] = sink.last_step(kind)
        if step > last[kind]:
          sink.write(record)
          last[kind] = step

  def close(self) -> None:
    for name, (sink, _) in list(self._sinks.items()):
      with self._tolerant(name), contextlib.redirect_stdout(sys.stderr):
        sink.close()

  @contextlib.contextmanager
  def _tolerant(self, name: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      self._sinks.pop(name, None)
      reason = str(error).strip().partition("\n")[0]
      warnings.warn(
        f"{name} gets no more records ({type(error).__name__}: {reason}); the next "
        "start sends them.", stacklevel=2,
      )


def scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
  """Yields (path, number) for all numbers in nested lists and dicts."""
  if isinstance(value, (dict, list)):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in items:
      yield from scalars(f"{name}/{key}", entry)
  elif value is not None:
    yield name, value


def named_scalars(record: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers of a record by what trackers call them: `train/loss/0`."""
  rest = {key: x for key, x in record.items() if key not in ("kind", "step")}
  return dict(scalars(record["kind"], rest))


def _group(workdir: Path) -> str:
  """Returns the folder above, which a sweep has in common."""
  return workdir.resolve().parent.name


class _Wandb:
  """A run of Weights & Biases, its files in the run folder.

  Offline, every start writes the whole run anew, into a folder of its own. What a
  killed start left is dropped: most of it was never written.
  """

  def __init__(self, workdir: Path, run_id: str, config: dict[str, Any]):
    import wandb

    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", PROJECT), id=run_id, name=config["name"],
      group=_group(workdir), dir=str(workdir.resolve()), config=config, resume="allow",
      reinit="create_new",  # The runs of a pack are open at once.
      settings=wandb.Settings(console="off", silent=True),
    )
    # What the server has of an earlier start; 0 where this is the first, and offline.
    self._begin = self._run.step
    if self._run.offline:
      own = Path(self._run.dir).parent
      for folder in (workdir / run_folder.WANDB).glob(f"offline-run-*-{run_id}"):
        if folder.resolve() != own.resolve() and not list(folder.glob("*.synced")):
          shutil.rmtree(folder)

  def last_step(self, kind: str) -> int:
    return self._begin - 1

  def write(self, record: dict[str, Any]) -> None:
    self._run.log(named_scalars(record), step=record["step"])

  def close(self) -> None:
    self._run.finish()


class _Mlflow:
  """A run of MLflow; without MLFLOW_TRACKING_URI in mlflow.db beside the run folder."""

  def __init__(self, workdir: Path, run_id: str, config: dict[str, Any]):
    from mlflow import MlflowClient, entities

    self._metric = entities.Metric
    folder, uri = workdir.resolve().parent, os.environ.get("MLFLOW_TRACKING_URI")
    with (folder / ".mlflow.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # Two trials must not both make the database.
      self._client = MlflowClient(uri or f"sqlite:///{folder}/mlflow.db")
      found = self._client.get_experiment_by_name(PROJECT)
      experiment = found.experiment_id if found else self._client.create_experiment(
        PROJECT, artifact_location=None if uri else f"file://{folder}/mlflow"
      )
    tags = {"mtp_jax_run": run_id, "group": _group(workdir)}
    runs = self._client.search_runs([experiment], f"tags.mtp_jax_run = '{run_id}'")
    if runs:
      self._id = runs[0].info.run_id
      self._client.update_run(self._id, "RUNNING")
    else:
      run = self._client.create_run(experiment, tags=tags, run_name=config["name"])
      self._id = run.info.run_id
      for key, value in flatten(config).items():
        self._client.log_param(self._id, key, value)
    self._has = self._client.get_run(self._id).data.metrics

  def last_step(self, kind: str) -> int:
    key = next((key for key in self._has if key.startswith(f"{kind}/")), None)
    if key is None:
      return -1
    return max(x.step for x in self._client.get_metric_history(self._id, key))

  def write(self, record: dict[str, Any]) -> None:
    now = int(1000 * time.time())
    self._client.log_batch(self._id, [
      self._metric(key, value, now, record["step"])
      for key, value in named_scalars(record).items()
    ])

  def close(self) -> None:
    self._client.set_terminated(self._id)


class _Trackio:
  """A run of trackio, in the database of this machine."""

  def __init__(self, workdir: Path, run_id: str, config: dict[str, Any]):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{config['name']}-{run_id}"
    # In a context of its own: in another one, `init` ends the run before.
    self._run = contextvars.Context().run(
      trackio.init, PROJECT, name=name, group=_group(workdir), config=config,
      resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
    )
    self._rows = SQLiteStorage.get_logs(PROJECT, name)

  def last_step(self, kind: str) -> int:
    rows = (row for row in self._rows if any(x.startswith(f"{kind}/") for x in row))
    return max((row["step"] for row in rows), default=-1)

  def write(self, record: dict[str, Any]) -> None:
    self._run.log(named_scalars(record), step=record["step"])

  def close(self) -> None:
    self._run.finish()


_KINDS = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}
