"""Trackers have what metrics.jsonl has: one run, each step once, after kills too."""

import importlib.util
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import textwrap
from typing import ClassVar

import pytest

from launch.engines import kubernetes
from mtp_jax import run_folder, trackers
from mtp_jax.config import ConfigError
from mtp_jax.metrics import MetricsWriter
from tests.commands import ROOT

pytest_plugins = ("tests.commands",)


def train_record(step, clock=0.0):
  return {
    "kind": "train", "step": step, "seconds": clock + step, "loss": [step / 8, None],
  }


def diagnostics_record(step):
  return {"kind": "diagnostics", "step": step, "cosine": {"trunk": step + 0.5}}


def records(steps, clock=0.0):
  """Diagnostics are measured before a step, all else after it."""
  for step in steps:
    yield diagnostics_record(step)
    yield train_record(step + 1, clock)


def expected(folder):
  """Returns (name, step) -> number of all that metrics.jsonl has."""
  found = {}
  for line in (folder / "metrics.jsonl").open():
    record = json.loads(line)
    for name, value in trackers.named_scalars(record).items():
      assert (name, record["step"]) not in found
      found[name, record["step"]] = value
  return found


def without_clock(values):
  return {key: x for key, x in values.items() if key[0] != "train/seconds"}


class Memory:
  """A tracker in this process, which keeps the runs of earlier starts."""

  runs: ClassVar[dict] = {}

  def __init__(self, workdir, run_id, config):
    self.points = self.runs.setdefault((workdir.name, run_id), {})

  def last_step(self, kind):
    steps = [step for name, step in self.points if name.startswith(f"{kind}/")]
    return max(steps, default=-1)

  def write(self, record):
    if record["step"] == 99:
      raise ConnectionError("no route\nto the server")
    for name, value in trackers.named_scalars(record).items():
      assert (name, record["step"]) not in self.points, "a step twice"
      self.points[name, record["step"]] = value

  def close(self):
    pass


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A run folder with two trackers in memory, which forget between tests."""
  monkeypatch.setattr(trackers, "TRACKERS", {"a": ("json",), "b": ("json",)})
  monkeypatch.setattr(trackers, "_KINDS", {"a": Memory, "b": Memory})
  monkeypatch.setattr(Memory, "runs", {})
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "config.json").write_text('{"name": "tiny"}')
  return folder


def points(folder):
  ((_, found),) = Memory.runs.items()
  return found


def write(folder, step, steps, clock=0.0):
  with MetricsWriter(folder, step) as writer:
    for record in records(steps, clock):
      writer.write(record)


def test_a_tracker_has_what_the_file_has(run):
  trackers.want(run, ["a"])
  write(run, 0, range(6))
  assert points(run) == expected(run) and len(points(run)) == 3 * 6


def test_steps_that_are_done_again_are_there_once_with_their_first_values(run):
  trackers.want(run, ["a"])
  write(run, 0, range(6))
  before = dict(points(run))
  trackers.want(run, ["a"])  # The same command again: the same id.
  write(run, 4, range(4, 9), clock=100.0)  # Killed after step 6, saved at step 4.
  assert before.items() <= points(run).items()
  assert without_clock(points(run)) == without_clock(expected(run))
  write(run, 4, range(4, 5), clock=200.0)
  write(run, 4, range(4, 9), clock=300.0)
  assert without_clock(points(run)) == without_clock(expected(run))


def test_what_a_killed_process_did_not_send_is_sent_at_the_next_start(run):
  trackers.want(run, ["a"])
  write(run, 0, range(6))
  for key in [key for key in points(run) if key[1] > 2]:
    del points(run)[key]
  write(run, 4, range(4, 9), clock=100.0)
  assert points(run) == expected(run)


def test_a_tracker_that_comes_later_gets_all(run):
  write(run, 0, range(3))
  trackers.want(run, ["a"])
  write(run, 3, range(3, 5))
  assert points(run) == expected(run)


def test_a_tracker_that_fails_ends_nothing_and_catches_up(run):
  trackers.want(run, ["a"])
  with pytest.warns(UserWarning) as caught:
    write(run, 0, range(96, 101))
  assert [str(x.message) for x in caught] == [
    "a gets no more records (ConnectionError: no route); the next start sends them."
  ]
  assert max(step for _, step in points(run)) == 98
  assert max(step for _, step in expected(run)) == 101


def test_every_tracker_has_the_id_of_the_run_which_stays(run):
  trackers.want(run, ["a"])
  first = run_folder.read(run, "trackers.json")
  trackers.want(run, ["b", "a"])
  assert run_folder.read(run, "trackers.json") == first | {"trackers": ["a", "b"]}
  trackers.want(run.parent, ["a"])
  assert run_folder.read(run.parent, "trackers.json")["id"] != first["id"]


def test_names_and_packages_are_checked(monkeypatch):
  assert trackers.parse(None) == []
  assert trackers.parse("mlflow,wandb,mlflow") == ["mlflow", "wandb"]
  for text in ("", "wandb,", "aim"):
    with pytest.raises(ConfigError, match=rf"^--track must be some of .*'{text}'\.$"):
      trackers.parse(text)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  message = r"^--track=wandb needs the package wandb, .* 'mtp_jax\[track\]'\.$"
  with pytest.raises(ConfigError, match=message):
    trackers.check(["wandb"])
  trackers.check([])


def test_every_command_that_trains_passes_trackers_on(command, tmp_path):
  root = tmp_path / "runs"
  arguments = ("launch.sweep", "--config=experiments/ntp_baseline.py",
               f"--workdir={root}", "--track=wandb,mlflow")
  bad = command(*arguments[:-1], "--track=aim", "--on=print")
  assert (bad.code, root.exists()) == (2, False)
  assert bad.output.startswith("error: --track must be some of wandb, mlflow, trackio")
  assert command(*arguments, "--on=print").code == 0
  found = [run_folder.read(x, "trackers.json") for x in run_folder.folders_below(root)]
  assert len({x["id"] for x in found}) == len(found) == 5
  assert all(x["trackers"] == ["wandb", "mlflow"] for x in found)
  pods = ("--on=kubernetes", "--kubernetes=image=a claim=b")
  dry = command(*arguments, "--dry_run", *pods)
  assert dry.output.count('launch.train \\"$@\\" --track=wandb,mlflow') == 5
  assert kubernetes.Kubernetes(root, None).track == ()


# The real ones, offline, each written to by processes of which one is killed.

WRITER = textwrap.dedent("""
  import os, pathlib, signal, sys, time
  from mtp_jax import trackers
  from tests.test_trackers import MetricsWriter, records

  folder, names, step, first, last, end = sys.argv[1:]
  folder = pathlib.Path(folder)
  trackers.want(folder, names.split(","))
  with MetricsWriter(folder, int(step)) as writer:
    for record in records(range(int(first), int(last)), clock=float(first)):
      writer.write(record)
    if end == "killed":
      time.sleep(1)
      os.kill(os.getpid(), signal.SIGKILL)
""")


def wandb_points(folder, run_id):
  """Reads the one file of an offline run, which is a log of LevelDB."""
  from wandb.proto import wandb_internal_pb2

  (path,) = (folder / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
  data, chunk, found = path.read_bytes(), b"", {}
  place = 7  # After the header.
  while place + 7 <= len(data):
    if 32768 - place % 32768 < 7:  # Padding at the end of a block.
      place += 32768 - place % 32768
      continue
    _, size, kind = struct.unpack("<IHB", data[place : place + 7])
    chunk += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):  # A whole record, or the last part of one.
      record = wandb_internal_pb2.Record.FromString(chunk)
      chunk = b""
      if record.HasField("history"):
        row = {
          ".".join(x.nested_key) or x.key: json.loads(x.value_json)
          for x in record.history.item
        }
        step = record.history.step.num
        for name in row.keys() - {"_step", "_runtime", "_timestamp"}:
          assert (name, step) not in found
          found[name, step] = row[name]
  return found


def mlflow_points(folder, run_id):
  from mlflow import MlflowClient

  client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
  experiment = client.get_experiment_by_name("mtp_jax")
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.data.tags["mtp_jax_run"] == run_id and run.info.run_name == "n=1,seed=0"
  assert run.info.status == "FINISHED" and run.data.params["trunk.kind"] == "llama"
  found = {}
  for name in run.data.metrics:
    for point in client.get_metric_history(run.info.run_id, name):
      assert (name, point.step) not in found
      found[name, point.step] = point.value
  return found


def trackio_points(folder, run_id):
  database = sqlite3.connect(folder.parent / "trackio" / "mtp_jax.db")
  rows = database.execute("select run_name, step, metrics from metrics").fetchall()
  found = {}
  for name, step, values in rows:
    assert name == f"n=1,seed=0-{run_id}"
    for key, value in json.loads(values).items():
      assert (key, step) not in found
      found[key, step] = value
  return found


@pytest.mark.slow
@pytest.mark.parametrize("name, read", [
  ("wandb", wandb_points), ("mlflow", mlflow_points), ("trackio", trackio_points),
])
def test_one_run_with_every_step_once_after_a_kill(tmp_path, name, read):
  for module in trackers.TRACKERS[name]:
    pytest.importorskip(module)
  folder = tmp_path / "sweep" / "run"
  folder.mkdir(parents=True)
  config = {"name": "n=1,seed=0", "trunk": {"kind": "llama"}}
  (folder / "config.json").write_text(json.dumps(config))
  quiet = {
    "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder.parent / "trackio"),
    "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
  }

  def process(*arguments):
    return subprocess.run(
      [sys.executable, "-c", WRITER, str(folder), name, *map(str, arguments)],
      env=os.environ | quiet, cwd=tmp_path, capture_output=True, text=True,
    )

  killed = process(0, 0, 6, "killed")
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  run_id = run_folder.read(folder, "trackers.json")["id"]
  resumed = process(4, 4, 9, "well")
  assert resumed.returncode == 0, resumed.stderr
  assert run_folder.read(folder, "trackers.json")["id"] == run_id
  found, wanted = read(folder, run_id), expected(folder)
  assert without_clock(found) == without_clock(wanted)
  assert len(found) == len(wanted) == 3 * 9
  # What was done once is equal in all, and so is a file that was written anew.
  last = 9 if name == "wandb" else 4
  once = {key: x for key, x in wanted.items() if key[1] <= last}
  assert once.items() <= found.items()
