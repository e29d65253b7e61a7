"""What an exit means, and what a run leaves about it."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from experiments import base
from launch import exits, status, train
from launch.engines import workers
from mtp_jax import run_folder
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import ConfigError, from_config_dict
from mtp_jax.interrupt import Interrupted
from mtp_jax.run import Diverged
from mtp_jax.stopwatch import Stopwatch


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
  for name in ("MTP_JAX_JOB_ID", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", exits.YIELD):
    monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("code, yielded, exit_class, is_retried", [
  (0, False, "done", False),
  (0, True, "yielded", True),
  (75, False, "yielded", True),
  (143, True, "yielded", True),  # srun may end a rank that has saved.
  (2, False, "config", False),
  (3, False, "diverged", False),
  (1, False, "infrastructure", True),
  (130, False, "infrastructure", True),
  (134, False, "infrastructure", True),
  (137, False, "infrastructure", True),
  (-9, False, "infrastructure", True),
])
def test_classes(code, yielded, exit_class, is_retried):
  assert exits.classify(code, yielded) == exit_class
  assert exits.is_retried(exit_class) == is_retried


@pytest.mark.parametrize("environ, name", [
  ({}, None),
  ({"SLURM_JOB_ID": "12"}, "12"),
  (
    {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"},
    "11_3",
  ),
  ({"SLURM_JOB_ID": "12", "MTP_JAX_JOB_ID": "mine"}, "mine"),
])
def test_job_id(environ, name):
  assert exits.job_id(environ) == name


@pytest.mark.parametrize("signum, num_processes, job_id, code", [
  (signal.SIGTERM, 1, None, 143),
  (signal.SIGINT, 1, None, 130),
  (signal.SIGTERM, 2, None, 75),
  (signal.SIGTERM, 1, "12", 75),
  (signal.SIGINT, 2, "12", 130),
])
def test_code_after_a_signal(monkeypatch, signum, num_processes, job_id, code):
  if job_id is not None:
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
  assert exits.after_signal(signum, num_processes, 0) == code


def test_process_0_writes_the_file_that_says_it_yielded(monkeypatch, tmp_path):
  marker = tmp_path / "yielded"
  monkeypatch.setenv(exits.YIELD, str(marker))
  assert exits.after_signal(signal.SIGTERM, 2, 1) == 0
  assert not marker.exists()
  assert exits.after_signal(signal.SIGTERM, 2, 0) == 0
  assert marker.exists()


@pytest.mark.parametrize("error, end", [
  (
    Interrupted(signal.SIGTERM, 7),
    (143, "yielded", "SIGTERM at step 7; checkpoint saved; the same command", True),
  ),
  (
    Interrupted(signal.SIGINT, 0),
    (130, "yielded", "SIGINT before the first step; the same command", True),
  ),
  (ConfigError("a.b: no"), (2, "config", "a.b: no", False)),
  (Diverged("not finite"), (3, "diverged", "not finite", True)),
  (CheckpointError("disk"), (1, "infrastructure", "disk", False)),
  (KeyError("x"), (1, "infrastructure", "KeyError: 'x'", False)),
])
def test_how_training_ends(monkeypatch, capsys, tmp_path, error, end):
  def fail(config, workdir, *, observer, holding, **_):
    with holding(workdir):
      observer.begins(config.train.num_steps)
      observer.stepped(6)
      raise error

  monkeypatch.setattr(train, "fit", fail)
  config = from_config_dict(base.get_config())
  workdir = tmp_path / "run"
  code, exit_class, message, together = end
  found = train.train(config, workdir, Stopwatch())
  assert (found.code, found.exit_class, found.together) == (code, exit_class, together)
  assert found.message.startswith(message)
  said = capsys.readouterr().err.splitlines()[-1]
  assert said == ("" if exit_class == "yielded" else "error: ") + found.message
  left = status.read(workdir)
  assert (left["state"], left["exit_class"], left["reason"]) == (
    "ended", exit_class, found.message
  )
  assert (left["step"], left["num_steps"]) == (6, config.train.num_steps)
  assert left["job_id"] is None and left["loss"] is None
  assert not run_folder.is_in_use(workdir)


def raised(work):
  """Returns the error of `work`, as raised: with the notes that it has then."""
  try:
    work()
  except Exception as error:
    return error
  pytest.fail("no error")


def caused():
  try:
    raise OSError("the disk\nis gone")
  except OSError as error:
    raise RuntimeError("a worker failed:\n\n  row 3\nmore") from error


ERRORS = {
  "of JAX": (
    jax.jit(lambda: jnp.zeros(3) + jnp.zeros(5)),
    "TypeError: add got incompatible shapes for broadcasting: (3,), (5,).",
  ),
  "cause": (
    caused, "RuntimeError: a worker failed: row 3, caused by OSError: the disk"
  ),
  "several": (
    lambda: (_ for _ in ()).throw(ExceptionGroup("two", [KeyError("a"), OSError()])),
    "ExceptionGroup: two (2 sub-exceptions), caused by KeyError: 'a'",
  ),
  "no message": (lambda: next(iter(())), "StopIteration"),
  "no memory": (
    lambda: jnp.zeros(1 << 38).block_until_ready(),
    "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 "
    "bytes. There is not enough memory: lower data.batch_size, ",
  ),
  "no memory of the host": (
    lambda: bytearray(1 << 62), "MemoryError. There is not enough memory: lower ",
  ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_keeps_its_reason(monkeypatch, capsys, tmp_path, name):
  work, text = ERRORS[name]
  error = raised(work)
  described = exits.describe(error)
  assert described.startswith(text) and "\n" not in described
  if not text.endswith(" "):
    assert described == text

  def fail(*_, observer, **__):
    observer.begins(12)
    raise error

  monkeypatch.setattr(train, "fit", fail)
  end = train.train(from_config_dict(base.get_config()), tmp_path, Stopwatch())
  assert end.message == described
  assert capsys.readouterr().err.splitlines()[-1] == f"error: {described}"
  assert status.read(tmp_path)["reason"] == described
  outcome = workers._ended(status.Status(tmp_path), error)
  assert outcome.text.splitlines()[0] == described
  assert outcome.exit_class == "infrastructure"


def test_status_follows_the_run(tmp_path):
  record = {"step": 3, "loss": [1.5, 2.5], "tokens_per_second": 10.0}
  with status.Status(tmp_path) as observer:
    observer.begins(12)
    assert status.read(tmp_path)["state"] == "starting"
    observer.pauses("compiling")
    observer.stepped(3)
    observer.logged(record)
    left = status.read(tmp_path)
    assert (left["state"], left["step"], left["loss"]) == ("training", 3, 1.5)
    observer.pauses("evaluating")
    assert status.read(tmp_path)["state"] == "evaluating"
    observer.ended("diverged", "first\nsecond")
  left = json.loads((tmp_path / "status.json").read_text())
  assert (left["state"], left["exit_class"], left["reason"]) == (
    "ended", "diverged", "first"
  )
  assert left["time"] > 0 and left["pid"] and left["host"]


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_with_nothing_to_save_leaves_a_word_and_raises_nothing(
  tmp_path, monkeypatch, capfd, signum, code
):
  ends = []
  for name in "ab":
    (tmp_path / name).mkdir()
  monkeypatch.setattr(os, "_exit", ends.append)
  with status.Status(tmp_path / "a") as first, first._lock:  # Amid a write.
    first.begins(12)
    train._end_at_once(None, signum, None)
    left = status.read(tmp_path / "a")
    assert (left["state"], left["exit_class"]) == ("ended", "yielded")
    assert left["reason"] == f"{signal.Signals(signum).name}, nothing new was saved"
  assert capfd.readouterr().err == f"{left['reason']}; the same command continues it.\n"
  with status.Status(tmp_path / "b") as done:
    done.begins(12)
    done.ended("done")
    workers._end_at_once(signum, None)
  assert status.read(tmp_path / "b")["exit_class"] == "done"
  assert ends == [code, 128 + signum]


def test_a_refused_command_says_so_where_there_is_a_folder(tmp_path):
  status.refused(tmp_path / "nowhere", "no")
  assert not (tmp_path / "nowhere").exists()
  status.refused(tmp_path, "a.b must be 1, got 2.\nmore")
  left = status.read(tmp_path)
  assert (left["exit_class"], left["reason"]) == ("config", "a.b must be 1, got 2.")
  before = (tmp_path / "status.json").read_text()
  with run_folder.exclusive(tmp_path):  # Another job's.
    status.refused(tmp_path, "other")
  assert (tmp_path / "status.json").read_text() == before
