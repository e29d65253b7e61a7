"""A run that was stopped, by whatever and whenever, ends as one that never was."""

import functools
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import jax
import pytest

from mtp_jax import train
from mtp_jax.checkpoint import Checkpointer
from mtp_jax.config import with_overrides
from mtp_jax.interrupt import Interrupted
from mtp_jax.run_log import RunLog
from tests.quick_xla import xla_flags
from tests.tiny_runs import read_metrics, run_config, without_wall_clock, write_texts

# A server that has imported JAX, but not started it, forks every process: one import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mtp_jax.train", "tensorboardX"])

NUM_STEPS, SAVE_EVERY = 12, 4


def stop_after_step(step, signum):
  """Makes the process send itself a signal while that step is computed."""
  stepped = RunLog.stepped

  def stepped_and_stop(log):
    stepped(log)
    now = log.step
    if now == step:
      os.kill(os.getpid(), signum)
    if now >= step and jax.process_count() > 1:
      time.sleep(1)  # JAX tells the other processes within a second or so.

  RunLog.stepped = stepped_and_stop


def kill_while_saving(step):
  """Makes the process kill itself while that step's checkpoint is written."""
  save = Checkpointer.save

  def save_and_die(checkpointer, state, *args):
    now = int(state.step)
    save(checkpointer, state, *args)
    if now == step:
      os.kill(os.getpid(), signal.SIGKILL)

  Checkpointer.save = save_and_die


def child(config, cache, workdir, fault, num_devices=1):
  """Trains in a process of its own."""
  os.environ["XLA_FLAGS"] = xla_flags(num_devices)
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if fault is not None:
    fault()
  try:
    train.fit(config, workdir)
  except Interrupted as stop:
    sys.exit(128 + stop.signum)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A config, and the folder of compiled programs that all processes share."""
  folder = tmp_path_factory.mktemp("resume")
  steps = {"train.num_steps": NUM_STEPS, "checkpoint.every_steps": SAVE_EVERY}
  return run_config(write_texts(folder / "texts"), steps), folder / "cache"


def run(tiny, workdir, fault=None, num_devices=1):
  """Returns the exit code of a process that trains."""
  args = (*tiny, workdir, fault, num_devices)
  process = PROCESSES.Process(target=child, args=args)
  process.start()
  process.join()
  return process.exitcode


@pytest.fixture(scope="module")
def never_stopped(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("never_stopped")
  assert run(tiny, workdir) == 0
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
    meta = reader.meta(NUM_STEPS)
    states.append(meta.pop("fingerprint"))  # Of parameters, moments and the rest.
    del meta["progress"]  # Seconds.
    metas.append(meta)
    reader.close()
  assert states[0] == states[1]
  assert metas[0] == metas[1]


def draw_kills():
  """Returns [(step, during_save)], in order; prints what repeats the draw.

  RESUME_SEED fixes it. A step may be drawn twice: before its save and during it.
  """
  seed = int(os.environ.get("RESUME_SEED") or random.SystemRandom().randrange(10**6))
  rng = random.Random(seed)
  kills = [(step, False) for step in rng.sample(range(1, NUM_STEPS + 1), 3)]
  kills.append((rng.randrange(SAVE_EVERY, NUM_STEPS + 1, SAVE_EVERY), True))
  kills.sort()
  print(f"RESUME_SEED={seed} repeats this draw of (step, during_save): {kills}")
  return kills


@pytest.mark.slow
def test_killed_at_random_steps_and_during_a_save(tiny, never_stopped, tmp_path):
  # Every process goes on before the step at which it is killed: they are in order.
  for step, during_save in draw_kills():
    if during_save:
      fault = functools.partial(kill_while_saving, step)
    else:
      fault = functools.partial(stop_after_step, step, signal.SIGKILL)
    assert run(tiny, tmp_path, fault) == -signal.SIGKILL
    if during_save:
      assert finished_steps(tmp_path) == list(range(SAVE_EVERY, step, SAVE_EVERY))
    # A kill amid a write leaves half a record.
    with (tmp_path / "metrics.jsonl").open("a") as file:
      file.write('{"kind": "train", "st')
  assert not (tmp_path / "DONE").exists()
  assert run(tiny, tmp_path) == 0
  assert_same_run(tmp_path, never_stopped)


@pytest.mark.slow
def test_signals_save_at_once_and_the_run_goes_on(tiny, never_stopped, tmp_path):
  for step, signum in ((5, signal.SIGTERM), (10, signal.SIGINT)):
    fault = functools.partial(stop_after_step, step, signum)
    assert run(tiny, tmp_path, fault) == 128 + signum
    assert finished_steps(tmp_path)[-1] == step
  assert run(tiny, tmp_path) == 0
  assert_same_run(tmp_path, never_stopped)


def assert_close_evaluation(workdir, expected):
  found, wanted = (
    json.loads((folder / "eval.json").read_text()) for folder in (workdir, expected)
  )
  for key in ("main_loss", "bits_per_byte", "next_line_exact_match"):
    assert found[key]["mean"] == pytest.approx(wanted[key]["mean"], rel=1e-5)


@pytest.mark.slow
def test_a_run_may_go_on_on_another_mesh(tiny, never_stopped, tmp_path):
  config, cache = tiny
  sharded = with_overrides(config, {"mesh.fsdp": 2}), cache
  fault = functools.partial(stop_after_step, 10, signal.SIGTERM)
  assert run(sharded, tmp_path, fault, num_devices=2) == 128 + signal.SIGTERM
  assert run(tiny, tmp_path) == 0
  assert_close_evaluation(tmp_path, never_stopped)
