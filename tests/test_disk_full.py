"""A full disk: one message, a last word where there is room, and nothing lost."""

import concurrent.futures
import errno
import os
import signal
import sys
import types

import pytest

from launch import exits, jobs, report, results_csv, states, status, train, trials
from launch.engines import local, workers
from launch.engines.workers import Slot
from launch.states import Job
from mtp_jax import files
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.interrupt import Interrupted
from mtp_jax.metrics import MetricsWriter
from mtp_jax.run import Diverged, Run
from mtp_jax.stopwatch import Stopwatch
from tests.commands import run_report
from tests.tiny_runs import read_metrics, run_config, without_wall_clock, write_texts

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  texts = write_texts(tmp_path_factory.mktemp("corpus") / "texts")
  off = {"eval.line_prompts": 0, "eval.function_prompts": 0, "mtp.depth": 1}
  return run_config(texts, off)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  assert train.train(config, workdir, Stopwatch()).code == exits.DONE
  return workdir


def full_file(name):
  """Makes one of the files that are written in one piece find no room."""

  def fill(patch):
    write = files.write_whole

    def write_whole(file, content):
      if os.path.basename(file) == name:
        raise FULL
      write(file, content)

    patch.setattr(files, "write_whole", write_whole)

  return fill


def full_writer(attributes, mode):
  """Makes an open file one that has no room; so it also fails when it is closed."""

  def fill(patch):
    begin = MetricsWriter.__init__

    def init(writer, *args):
      begin(writer, *args)
      *path, last = attributes
      for name in path:
        writer = getattr(writer, name)
      setattr(writer, last, open("/dev/full", mode))

    patch.setattr(MetricsWriter, "__init__", init)

  return fill


def full_checkpoint(patch):
  def save(*_, **__):
    raise FULL

  patch.setattr("orbax.checkpoint.CheckpointManager.save", save)


def full_status(patch):
  """All but the text that stands in status.json: there is room for another one."""
  write_text = status.Path.write_text

  def write(path, text):
    if path.name == "status.tmp":
      raise FULL
    write_text(path, text)

  patch.setattr(status.Path, "write_text", write)


PLACES = {
  "config.json": full_file("config.json"),
  "run.json": full_file("run.json"),
  "startup.json": full_file("startup.json"),
  "metrics.jsonl": full_writer(["_file"], "w"),
  "tensorboard": full_writer(
    ["_tensorboard", "_writer", "_py_recordio_writer", "_writer"], "wb"
  ),
  "checkpoints": full_checkpoint,
  "eval.json": full_file("eval.json"),
}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_training_reports_its_own_error_and_goes_on_when_there_is_room(
  config, undisturbed, tmp_path, monkeypatch, capfd
):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "status.json").write_text("{}\n" + " " * 1000)
  for name, fill in PLACES.items():
    with monkeypatch.context() as patch:
      fill(patch)
      full_status(patch)
      end = train.train(config, workdir, Stopwatch())
    wanted = str(FULL)
    if name == "checkpoints":
      wanted = f"could not write a checkpoint to {workdir}/checkpoints (OSError: {FULL}"
    assert end.message.startswith(wanted), name
    assert (end.code, end.exit_class) == (1, "infrastructure")
    error = capfd.readouterr().err
    assert error.endswith(f"error: {end.message}\n") and "Traceback" not in error, name
    left = status.read(workdir)
    assert (left["state"], left["exit_class"]) == ("ended", "infrastructure"), name
    assert not (workdir / "DONE").exists()
  assert train.train(config, workdir, Stopwatch()).code == exits.DONE
  found, wanted = (
    [without_wall_clock(record) for record in read_metrics(folder)]
    for folder in (workdir, undisturbed)
  )
  assert found == wanted


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capfd):
  record = {"step": 3, "loss": [1.5], "tokens_per_second": 10.0}
  full_status(monkeypatch)
  with status.Status(tmp_path) as observer:
    observer.begins(12)  # There is none yet.
    observer.logged(record)
    observer.ended("done")
  assert capfd.readouterr().err == (
    f"warning: {tmp_path}/status.json could not be written ({FULL}).\n"
  )
  assert not list(tmp_path.iterdir())


def test_a_log_without_room_does_not_hide_how_it_ended(tmp_path, monkeypatch):
  def fail(*_, observer, **__):
    observer.begins(3)
    raise KeyError("x")

  config = types.SimpleNamespace()
  monkeypatch.setattr(train, "fit", fail)
  with open("/dev/full", "w") as log:
    monkeypatch.setattr(sys, "stderr", log)
    end = train.train(config, tmp_path, Stopwatch())
    with pytest.raises(OSError):
      log.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())
  assert end == train.End(1, "infrastructure", "KeyError: 'x'")
  assert status.read(tmp_path)["reason"] == "KeyError: 'x'"


@pytest.mark.parametrize("kind, is_raised", [
  (None, True), (Interrupted, True), (Diverged, False),
  (OSError, False),
])
def test_a_save_that_fails_last_hides_no_error_but_breaks_a_promise(kind, is_raised):
  class Full:
    def close(self):
      raise CheckpointError("no room")

  run = types.SimpleNamespace(checkpointer=Full())
  with pytest.raises(CheckpointError) if is_raised else pytest.warns(match="no room"):
    Run.__exit__(run, kind)


def test_a_job_that_cannot_write_that_it_yielded_says_so_by_its_code(monkeypatch):
  monkeypatch.setenv(exits.YIELD, "/nowhere/yielded")
  assert exits.after_signal(signal.SIGTERM, 2, 0) == exits.YIELDED


def test_a_worker_that_cannot_log_goes_on_with_the_next_trial(
  config, tmp_path, monkeypatch
):
  def output_to(path):
    raise FULL

  monkeypatch.setattr(workers, "_output_to", output_to)
  runs = [(config, tmp_path / "a"), (config, tmp_path / "b")]
  for outcome in (*workers.train(runs[:1]), *workers.train(runs, 2)):
    assert (outcome.kind, outcome.exit_class) == ("failed", "infrastructure")
    assert outcome.text == f"OSError: {FULL}"


def test_a_sweep_goes_past_a_trial_whose_disk_is_full(
  config, tmp_path, monkeypatch, capfd
):
  swept = [{"name": "a", "seed": 1}, {"name": "b", "seed": 2}]
  planned = trials.plan(config, {}, swept, tmp_path)
  given = []

  done = concurrent.futures.Future()
  done.set_result(None)

  class Worker(types.SimpleNamespace):
    def give(self, chosen, size):
      self.trials = chosen
      given.extend(trial.name for trial in chosen)

    def result(self):
      if not self.trials:
        return "cpu", 1
      if self.trials[0].name == "a":
        return [workers.Outcome("failed", f"OSError: {FULL}", "infrastructure")]
      for name in ("DONE", "eval.json"):
        (self.trials[0].workdir / name).write_text('{"main_loss": {"mean": 1.5}}')
      return [workers.Outcome("done")]

  def make(slot, _):
    return Worker(slot=slot, trials=[], shape=None, future=done, close=lambda: None)

  def full(*_, **__):
    raise FULL

  monkeypatch.setattr(local, "Worker", make)
  monkeypatch.setattr(states, "write_record", full)
  monkeypatch.setattr(results_csv, "_write", full)
  sweep = local.Sweep(jobs.choose(planned, again=False), tmp_path, "")
  assert sweep.run([Slot(None)]) == 1
  assert sorted(given) == ["a", "b"]
  captured = capfd.readouterr()
  assert f"1 of 2 trial(s) failed:\n  a: OSError: {FULL}" in captured.out
  assert f"b: warning: {FULL}" in captured.out
  warning = f"warning: {tmp_path}/results.csv could not be written"
  assert captured.err.startswith(warning)


def test_a_report_that_finds_no_room_is_one_message(tmp_path, monkeypatch, capsys):
  def full(*_):
    raise FULL

  monkeypatch.setattr(report, "write_report", full)
  assert run_report(workdir=str(tmp_path)) == exits.FAILED
  assert capsys.readouterr().err == (
    f"error: the report could not be written: {FULL}\n"
  )


def test_a_status_that_stayed_behind_counts_for_nothing(config, tmp_path):
  """Nobody holds the lock: whatever status.json says, the trial may be started."""
  (trial,) = trials.plan(config, {}, [{"name": "a"}], tmp_path)
  trial.workdir.mkdir()
  with status.Status(trial.workdir) as observer:
    observer.begins(12)
  state = states.read_state(trial)
  assert state.kind == "lost"
  assert state.reason == "its process is gone and wrote no reason"
  assert states.read_state(trial, Job("running")).kind == "running"
  assert jobs.choose([trial], again=False).todo == [trial]
