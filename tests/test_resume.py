"""A run that was stopped, by whatever and whenever, ends as one that never was."""

import functools
import json
import multiprocessing
import os
import signal
import sys

import jax
import pytest

from mtp_jax import train
from mtp_jax.checkpoint import Checkpointer
from tests.tiny_runs import read_metrics, run_config, without_wall_clock, write_texts

# A server that has imported JAX, but not started it, forks every process: one import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mtp_jax.train", "tensorboardX"])


def stop_after_step(step, signum):
  """Makes the process send itself a signal while that step is computed."""
  advance = train.Progress.advance

  def advance_and_stop(bar, now):
    advance(bar, now)
    if now == step:
      os.kill(os.getpid(), signum)

  train.Progress.advance = advance_and_stop


def kill_while_saving(step):
  """Makes the process kill itself while that step's checkpoint is written."""
  save = Checkpointer.save

  def save_and_die(checkpointer, state, *args):
    now = int(state.step)
    save(checkpointer, state, *args)
    if now == step:
      os.kill(os.getpid(), signal.SIGKILL)

  Checkpointer.save = save_and_die


def child(config, workdir, cache, fault):
  """Trains on one device in a process of its own."""
  # As in tests.common.quick_jit: most of the time would go into compiling.
  os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if fault is not None:
    fault()
  try:
    train.fit(config, workdir)
  except train.Interrupted as stop:
    sys.exit(128 + stop.signum)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A function that trains in a child and returns its exit code; and the texts."""
  folder = tmp_path_factory.mktemp("resume")
  config = run_config(write_texts(folder / "texts"))

  def run(workdir, fault=None):
    args = (config, workdir, folder / "cache", fault)
    process = PROCESSES.Process(target=child, args=args)
    process.start()
    process.join()
    return process.exitcode

  return run


@pytest.fixture(scope="module")
def never_stopped(runs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("never_stopped")
  assert runs(workdir) == 0
  return workdir


def finished_steps(workdir):
  reader = Checkpointer(workdir, read_only=True)
  steps = reader.steps()
  reader.close()
  return steps


def assert_same_run(workdir, expected):
  """Fails unless checkpoints, records and evaluation agree to the last bit."""
  assert (workdir / "DONE").exists()
  found, wanted = (
    [without_wall_clock(record) for record in read_metrics(folder)]
    for folder in (workdir, expected)
  )
  assert found == wanted
  evaluations = (
    without_wall_clock(json.loads((folder / "eval.json").read_text()))
    for folder in (workdir, expected)
  )
  assert next(evaluations) == next(evaluations)
  states, metas = [], []
  for folder in (workdir, expected):
    reader = Checkpointer(folder, read_only=True)
    meta = reader.meta(12)
    states.append(meta.pop("fingerprint"))  # Of parameters, moments and the rest.
    del meta["progress"]  # Seconds.
    metas.append(meta)
    reader.close()
  assert states[0] == states[1]
  assert metas[0] == metas[1]


def test_killed_at_any_step(runs, never_stopped, tmp_path):
  # Before the first checkpoint, amid a log interval, during a save, near the end.
  during_save = functools.partial(kill_while_saving, 8)
  for fault in (
    functools.partial(stop_after_step, 2, signal.SIGKILL),
    functools.partial(stop_after_step, 7, signal.SIGKILL),
    during_save,
    functools.partial(stop_after_step, 11, signal.SIGKILL),
  ):
    assert runs(tmp_path, fault) == -signal.SIGKILL
    if fault is during_save:
      assert finished_steps(tmp_path) == [4]
    # A kill amid a write leaves half a record.
    with (tmp_path / "metrics.jsonl").open("a") as file:
      file.write('{"kind": "train", "st')
  assert not (tmp_path / "DONE").exists()
  assert runs(tmp_path) == 0
  assert_same_run(tmp_path, never_stopped)


def test_signals_save_at_once_and_the_run_goes_on(runs, never_stopped, tmp_path):
  for step, signum in ((5, signal.SIGTERM), (10, signal.SIGINT)):
    fault = functools.partial(stop_after_step, step, signum)
    assert runs(tmp_path, fault) == 128 + signum
    assert finished_steps(tmp_path)[-1] == step
  assert runs(tmp_path) == 0
  assert_same_run(tmp_path, never_stopped)
