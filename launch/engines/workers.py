"""Worker processes that train the trials of a sweep, one or a pack at a time each.

A worker has a slot: its own share of the CPU cores (XLA starts as many threads) and of
the GPUs. It keeps corpora and compiled programs from trial to trial, so trials of one
shape compile once. What a trial prints goes to `log.txt` in its run folder; what
becomes of it goes to `status.json` there, and comes back as an `Event`. A worker that
is killed is an event too.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from launch import cli, exits
from launch.huge_pages import start_with_huge_pages
from launch.status import Status, exit_class_of, last_words
from launch.trials import Trial
from mtp_jax import accounting
from mtp_jax.config import Config, ConfigError
from mtp_jax.environment import cpu_cores
from mtp_jax.pack import fitting_size
from mtp_jax.train import Interrupted, fit, fit_pack

_GPUS = "CUDA_VISIBLE_DEVICES"
_SPAWN = multiprocessing.get_context("spawn")  # A fork would share JAX's threads.


class WorkerError(RuntimeError):
  """A worker process ended before it could train anything."""


class Slot(NamedTuple):
  """What a worker has of the machine.

  cores: CPU cores; None where a process cannot be pinned.
  gpus:  for CUDA_VISIBLE_DEVICES; None leaves it as it is.
  """

  cores: list[int] | None
  gpus: str | None = None


@dataclasses.dataclass(frozen=True)
class Event:
  """What happened in a worker.

  kind: ready | done | failed | claimed (another process has the run folder) | stopped
    (saved after SIGTERM) | warning | died.
  text: why it failed or died, or the warning; its first line is a summary.
  exit_class: of a trial that failed or died, see `launch.exits`.
  platform, num_devices: of a worker that is ready.
  size: trials of a pack that fit its memory, of a worker that has measured.
  parts: of a pack that has ended, the events of its trials.
  """

  kind: Literal[
    "ready", "done", "failed", "claimed", "stopped", "warning", "died", "measured",
    "packed",
  ]
  text: str = ""
  exit_class: str = ""
  platform: str = ""
  num_devices: int = 0
  size: int = 0
  parts: tuple["Event", ...] = ()


class Worker:
  """The sweep's end of one worker process.

  trials: those it trains, none while it is idle or starting.
  shape: that of the last trial it was given.
  measures: it tries how many trials of its shape fit.
  """

  def __init__(self, slot: Slot, compilation_cache: str):
    self.slot = slot
    self.trials: list[Trial] = []
    self.shape: Config | None = None
    self.measures = False
    self._connection, theirs = _SPAWN.Pipe()
    self._process = _SPAWN.Process(
      target=_serve, args=(theirs, slot.cores, compilation_cache)
    )
    # Ctrl-C reaches every process of the terminal; the sweep alone is to answer it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with start_with_huge_pages(), _seeing(slot.gpus):
      self._process.start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()

  def fileno(self) -> int:
    """For `multiprocessing.connection.wait`: readable when there is an event."""
    return self._connection.fileno()

  def give(self, trials: list[Trial], size: int | None = None) -> None:
    """Starts training a trial, or several as a pack of `size`."""
    self.trials, self.shape = trials, trials[0].shape
    runs = [(trial.config, trial.workdir) for trial in trials]
    self._send(*((train, *runs[0]) if size is None else (train_pack, runs, size)))

  def measure(self, trial: Trial, most: int) -> None:
    """Starts looking how many trials of this shape fit, at most `most`."""
    self.shape, self.measures = trial.shape, True
    self._send(measure, trial.resolved, most)

  def _send(self, *work: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # It died: the next event says so.
      self._connection.send(work)

  def event(self) -> Event:
    """Returns the next event; waits for it."""
    try:
      return self._connection.recv()
    except (EOFError, OSError):
      self._process.join()
      code = self._process.exitcode
      if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory, perhaps)" if -code == signal.SIGKILL else ""
        text = f"the worker was ended by {name}{hint}"
      else:
        text = f"the worker ended with exit code {code}"
      return Event("died", text, "infrastructure")

  def stop(self) -> None:
    """Asks it to save and end."""
    self._process.terminate()

  def close(self) -> None:
    """Ends it at once if it is at work, and waits."""
    self._connection.close()
    if self.trials or self.measures:
      self._process.kill()
    self._process.join()


def wait(workers: list[Worker], seconds: float) -> list[Worker]:
  """Returns the workers that have an event, at the latest after `seconds`."""
  return multiprocessing.connection.wait(workers, seconds)


def slots(num_workers: int) -> list[Slot]:
  """Returns what each worker gets of the CPU cores, and of the GPUs if JAX uses them.

  Raises:
    ConfigError: there are fewer cores than workers, or GPUs cannot be shared evenly.
  """
  pins, cores = hasattr(os, "sched_setaffinity"), cpu_cores()
  if not 1 <= num_workers <= len(cores):
    raise ConfigError(
      f"--parallel must be from 1 to the number of CPU cores ({len(cores)}), got "
      f"{num_workers}."
    )
  gpus = _gpus() if num_workers > 1 else []
  if gpus and len(gpus) % num_workers:
    raise ConfigError(
      f"--parallel must divide the number of GPUs ({len(gpus)}): every worker gets as "
      f"many; got {num_workers}."
    )
  bounds = [len(cores) * i // num_workers for i in range(num_workers + 1)]
  each = len(gpus) // num_workers
  return [
    Slot(
      cores[a:b] if pins else None,
      ",".join(gpus[i * each : (i + 1) * each]) if gpus else None,
    )
    for i, (a, b) in enumerate(itertools.pairwise(bounds))
  ]


def _gpus() -> list[str]:
  """Names the GPUs that JAX would use, without starting it."""
  wanted = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
  if wanted not in ("", "cuda", "gpu"):
    return []
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  if not any("cuda" in plugin.name for plugin in plugins):
    return []
  visible = os.environ.get(_GPUS)
  if visible is None:
    found = Path("/dev").glob("nvidia[0-9]*")
    return sorted((path.name.removeprefix("nvidia") for path in found), key=int)
  return [gpu for gpu in visible.split(",") if gpu and gpu != "-1"]


@contextlib.contextmanager
def _seeing(gpus: str | None) -> Iterator[None]:
  """Shows these GPUs alone to the processes that are started inside."""
  if gpus is None:
    yield
    return
  before = os.environ.get(_GPUS)
  os.environ[_GPUS] = gpus
  try:
    yield
  finally:
    if before is None:
      del os.environ[_GPUS]
    else:
      os.environ[_GPUS] = before


def _serve(
  connection: multiprocessing.connection.Connection,
  cores: list[int] | None,
  compilation_cache: str,
) -> None:
  """Does what comes over `connection` until it ends: the life of a worker."""
  os.setpgrp()  # See `Worker`: Ctrl-C stays with the sweep.
  if cores is not None:
    os.sched_setaffinity(0, cores)
  # While `fit` trains, a handler of its own saves first.
  signal.signal(signal.SIGTERM, _end_at_once)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  cli.use_compilation_cache(compilation_cache)
  warnings.showwarning = lambda message, category, filename, *_: _report(
    connection, message, filename
  )
  # The sweep closes its end when there is nothing left to do.
  with contextlib.suppress(EOFError, OSError):
    platform, num_devices = jax.default_backend(), jax.device_count()
    connection.send(Event("ready", platform=platform, num_devices=num_devices))
    while True:
      work, *args = connection.recv()
      connection.send(work(*args))


def train(config: Config, workdir: Path) -> Event:
  """Trains one trial and returns what became of it; raises nothing."""
  return _or_failed(_train, config, workdir)


def _train(config: Config, workdir: Path) -> Event:
  with contextlib.ExitStack() as stack:
    if event := _taken(stack, workdir):
      return event
    stack.enter_context(_output_to(workdir / "log.txt"))
    status = _status(stack, config, workdir)
    try:
      fit(config, workdir, progress=False, observer=status)
    except Exception as error:
      return _ended(status, error)
    return _ended(status)


def train_pack(runs: list[tuple[Config, Path]], size: int) -> Event:
  """Trains trials of one shape as a pack; see `train` and `fit_pack`.

  The event has those of the trials as its parts, or it is a failure of them all. What
  libraries print goes to the log of the first trial, and the others say so.
  """
  return _or_failed(_train_pack, runs, size)


def _or_failed(work: Callable[..., Event], *args: Any) -> Event:
  """Returns what `work` returns, or that it failed: no log can be opened, perhaps."""
  try:
    return work(*args)
  except Exception as error:
    return Event("failed", *_explain(error))


def _train_pack(runs: list[tuple[Config, Path]], size: int) -> Event:
  with contextlib.ExitStack() as stack:
    events = [_taken(stack, workdir) for _, workdir in runs]
    ours = [run for run, event in zip(runs, events, strict=True) if event is None]
    if not ours:
      return Event("packed", parts=tuple(events))
    (_, first), *others = ours
    stack.enter_context(_output_to(first / "log.txt"))
    for _, workdir in others:
      with (workdir / "log.txt").open("a") as log:
        log.write(f"trained in a pack: see {first / 'log.txt'}\n")
    statuses = [_status(stack, *run) for run in ours]
    try:
      outcomes = fit_pack(*zip(*ours, strict=True), size=size, observers=statuses)
    except Exception as error:
      failures = [_ended(status, error) for status in statuses]
      return failures[0]
    ended = iter([
      _ended(status, outcome if isinstance(outcome, Exception) else None)
      for status, outcome in zip(statuses, outcomes, strict=True)
    ])
    return Event("packed", parts=tuple(event or next(ended) for event in events))


def measure(config: Config, most: int) -> Event:
  """Returns the size of a pack that fits, 1 if it cannot be found out."""
  try:
    return Event("measured", size=fitting_size(config, most, jax.devices()))
  except jax.errors.JaxRuntimeError:  # No memory for the program, or to compile it.
    traceback.print_exc()
    return Event("measured", size=1)


def _taken(stack: contextlib.ExitStack, workdir: Path) -> Event | None:
  """Holds a run folder, or says why there is nothing to be trained in it."""
  try:
    stack.enter_context(cli.exclusive(workdir))
  except ConfigError as error:
    return Event("claimed", str(error))
  # By another sweep, since this one looked.
  return Event("done") if (workdir / "DONE").exists() else None


def _status(stack: contextlib.ExitStack, config: Config, workdir: Path) -> Status:
  num_steps = accounting.resolve(config).train.num_steps
  return stack.enter_context(Status(workdir, num_steps, stall_seconds=0))


def _end_at_once(signum: int, _: Any) -> None:
  """Ends the worker between trials, or on a second signal; raises nothing."""
  last_words("yielded", f"{signal.Signals(signum).name}, nothing new was saved")
  os._exit(128 + signum)


def _ended(status: Status, error: Exception | None = None) -> Event:
  """Notes the end of a trial in its run folder; returns it as an event."""
  if error is None:
    status.ended("done")
    return Event("done")
  if isinstance(error, Interrupted):
    status.ended("yielded", str(error))
    return Event("stopped")
  text, exit_class = _explain(error)
  status.ended(exit_class, text)
  return Event("failed", text, exit_class)


def _explain(error: Exception) -> tuple[str, str]:
  """Returns what to tell of it, its first line a summary, and its exit class."""
  if exit_class := exit_class_of(error):
    return f"{type(error).__name__}: {error}", exit_class
  trace = "".join(traceback.format_exception(error))
  return f"{exits.describe(error)}\n\n{trace}", "infrastructure"


def _report(connection: Any, message: Warning | str, filename: str) -> None:
  """Sends the warnings that speak of the run (a damaged checkpoint); logs all."""
  with contextlib.suppress(OSError):  # The disk of the log is full.
    print(f"warning: {message}", file=sys.stderr, flush=True)
  if "mtp_jax" in Path(filename).parts:
    connection.send(Event("warning", str(message)))


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
  """Appends what is written to stdout and stderr, by libraries in C++ too."""
  saved = [os.dup(fd) for fd in (1, 2)]
  with path.open("ab") as log:
    for fd in (1, 2):
      os.dup2(log.fileno(), fd)
  try:
    yield
  finally:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):  # The disk of the log is full.
        stream.flush()
    for fd, old in zip((1, 2), saved, strict=True):
      os.dup2(old, fd)
      os.close(old)


def _end_with_parent() -> None:
  """Saves and ends when the sweep is gone, however it went."""
  multiprocessing.parent_process().join()
  os.kill(os.getpid(), signal.SIGTERM)
