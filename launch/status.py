"""The file status.json of a run at work, and the watch over steps that do not end.

Process 0 writes `status.json` in the run folder at the start, with every log line and
at the end. Whatever kills a job leaves the last one, so what is about to happen is
written before it does.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from launch import cli, distributed, exits, paths
from mtp_jax import run_folder
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import ConfigError
from mtp_jax.data.sources import DataError
from mtp_jax.files import plain
from mtp_jax.run import Diverged
from mtp_jax.run_log import Observer

# After so long without a step a process notes that it waits: sooner than JAX gives up.
_NOTICE_SECONDS = 5
_SLOW_FACTOR = 10
# The first step after a pause may wait for processes that still compile; it has ended
# when the second is on its way.
_STEPS_AFTER_PAUSE = 2


# What these say is meant for the user, without a traceback.
_EXPLAINED = {
  ConfigError: "config",
  DataError: "config",
  Diverged: "diverged",
  CheckpointError: "infrastructure",
}


def exit_class_of(error: BaseException) -> str | None:
  """Returns the class (see `exits`) of an error that explains itself, else None."""
  if cli.is_disk_full(error):
    return "infrastructure"
  found = (name for kind, name in _EXPLAINED.items() if isinstance(error, kind))
  return next(found, None)


class Status(Observer):
  """The status of a run; a context manager, within which it also watches the steps.

  Several processes wait for each other in every step. JAX notices a process that is
  gone or frozen, but not a process that is alive and stuck. So each process
  watches its own steps, and ends if none ends for `stall_seconds` and ten times the
  slowest so far.

  Nothing is written before `begins`.

  Args:
    workdir: the run folder.
    stall_seconds: 0 watches nothing.
  """

  def __init__(self, workdir: Path, stall_seconds: int = 0):
    self._path = workdir / run_folder.STATUS
    self._stall_seconds = stall_seconds
    self._record = {
      "state": "starting",
      "step": 0,
      "num_steps": None,
      "loss": None,
      "tokens_per_second": None,
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "num_processes": jax.process_count(),
      "job_id": exits.job_id(),
      "exit_class": None,
      "reason": None,
    }
    # A signal may end the process amid a write, and have its own last word.
    self._lock = threading.RLock()
    self._is_warned = False
    self._leaves = threading.Event()
    self._thread: threading.Thread | None = None
    # Of the steps since the last pause: how many, when the last ended; and of the
    # watcher: seconds that it has been awake for since.
    self._steps, self._ended_at, self._waited = 0, 0.0, 0
    self._slowest = 0.0

  def __enter__(self) -> "Status":
    return self

  def __exit__(self, *_: object) -> None:
    if self.has_begun:
      _begun.remove(self)
    self._leaves.set()
    if self._thread is not None:
      self._thread.join()

  @property
  def has_begun(self) -> bool:
    return self in _begun

  def begins(self, num_steps: int) -> None:
    _begun.append(self)
    self._write(num_steps=num_steps)
    if jax.process_count() > 1 and self._stall_seconds:
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()

  def pauses(self, activity: str) -> None:
    self._steps = 0
    if activity == "evaluating" and self._record["state"] != activity:
      self._write(state=activity)

  def stepped(self, step: int) -> None:
    now = time.monotonic()
    if self._steps >= _STEPS_AFTER_PAUSE:
      self._slowest = max(self._slowest, now - self._ended_at)
    self._ended_at, self._waited = now, 0
    self._steps += 1
    self._record["step"] = step

  def logged(self, record: dict[str, Any]) -> None:
    self._write(
      state="training",
      step=record["step"],
      loss=record["loss"][0],
      tokens_per_second=record["tokens_per_second"],
      reason=None,
    )

  @property
  def has_ended(self) -> bool:
    return self._record["state"] == "ended"

  def ended(self, exit_class: str, reason: str | None = None) -> None:
    """Writes how it ended; of `reason`, the first line."""
    reason = (reason or "").strip().partition("\n")[0] or None
    self._write(state="ended", exit_class=exit_class, reason=reason)

  def _write(self, **changes: Any) -> None:
    with self._lock:
      self._record |= changes
      if jax.process_index() != 0:
        return
      try:
        _write(self._path, self._record)
      except OSError as error:  # It is for those who look on; training needs it not.
        if not self._is_warned:
          self._is_warned = True
          _warn(f"{self._path} could not be written ({error}).")

  def _watch(self) -> None:
    while not self._leaves.wait(1.0):
      # Only waking seconds count: a suspended machine has no stuck peer.
      if self._steps < _STEPS_AFTER_PAUSE:
        continue
      self._waited += 1
      waited, slowest = self._waited, self._slowest
      if waited == max(_NOTICE_SECONDS, int(2 * slowest) + 1):
        self._notice(waited)
      if waited > max(self._stall_seconds, _SLOW_FACTOR * slowest):
        self._give_up(waited)

  def _notice(self, waited: int) -> None:
    text = (
      f"no step has ended for {waited} s after step {self._record['step']} (slowest so "
      f"far: {self._slowest:.1f} s); another process may be gone, frozen or stuck"
    )
    self._write(reason=text)
    print(f"process {jax.process_index()}: {text}.", file=sys.stderr, flush=True)

  def _give_up(self, waited: int) -> None:
    text = (
      f"no step has ended for {waited} s after step {self._record['step']}, more than "
      f"--stall_seconds={self._stall_seconds}: a process is stuck, or the network is. "
      "The run continues from its newest checkpoint when it is started again."
    )
    self.ended("infrastructure", text)
    print(f"error: {text}", file=sys.stderr, flush=True)
    distributed.leave(exits.FAILED, together=False)


_begun: list[Status] = []


def last_words(exit_class: str, reason: str) -> None:
  """Notes how the process ends in every run folder that it is at work in."""
  for status in _begun:
    if not status.has_ended:
      status.ended(exit_class, reason)


def refused(workdir: Path, reason: str) -> None:
  """Notes a config error in a run folder that exists and that no job holds."""
  left_behind(workdir, "config", reason)


def left_behind(workdir: Path, exit_class: str, reason: str) -> None:
  """Notes how a job ended that could not say so, where no other holds the folder."""
  if not workdir.is_dir():
    return
  with contextlib.suppress(Exception), run_folder.exclusive(workdir):
    record = read(workdir) | {
      "state": "ended",
      "exit_class": exit_class,
      "reason": reason.partition("\n")[0],
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "job_id": exits.job_id(),
    }
    _write(workdir / run_folder.STATUS, record)


def read(workdir: Path) -> dict[str, Any]:
  """Returns the status of a run folder, {} where there is none."""
  return paths.read_json(workdir / run_folder.STATUS)


def _write(path: Path, record: dict[str, Any]) -> None:
  """Replaces the file at once, but does not wait for the disk: it is written often.

  On a full disk the old file has room for the new text, but may be found half written.

  Raises:
    OSError: it could not be written.
  """
  temporary = path.with_suffix(".tmp")
  text = json.dumps(plain(record | {"time": time.time()})) + "\n"
  try:
    temporary.write_text(text)
    temporary.replace(path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    if not cli.is_disk_full(error) or not path.exists():
      raise
    with path.open("r+") as file:
      file.write(text)
      file.truncate()


def _warn(text: str) -> None:
  with contextlib.suppress(OSError):  # stderr may be a file on the same disk.
    print(f"warning: {text}", file=sys.stderr, flush=True)
