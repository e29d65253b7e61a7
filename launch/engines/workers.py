"""Worker processes that train the trials of a sweep, one trial or pack at a time each.

A worker is a pool of one process, with its own share of the CPU cores (XLA starts as
many threads) and of the GPUs. It keeps corpora and compiled programs from trial to
trial, so trials of one program compile once. What a trial prints goes to `log.txt` in
its run folder, its end to `status.json` there and to its `Outcome`.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from launch import cli, exits
from launch.huge_pages import start_with_huge_pages
from launch.states import Trial
from launch.status import Status, exit_class_of, last_words
from mtp_jax import run_folder
from mtp_jax.config import Config, ConfigError
from mtp_jax.environment import cpu_cores
from mtp_jax.interrupt import Interrupted
from mtp_jax.pack import fit_pack
from mtp_jax.pack_program import fitting_size
from mtp_jax.train import fit

_GPUS = "CUDA_VISIBLE_DEVICES"
_SPAWN = multiprocessing.get_context("spawn")  # A fork would share JAX's threads.
_seen_warnings: list[str] = []


class WorkerError(RuntimeError):
  """A worker process ended before it could train anything."""


class Slot(NamedTuple):
  """The share of the machine that a worker has.

  cores: CPU cores; None where a process cannot be pinned.
  gpus:  for CUDA_VISIBLE_DEVICES; None leaves it as it is.
  """

  cores: list[int] | None
  gpus: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a trial ended in a worker.

  kind: done | failed | claimed (another process has the run folder) | stopped (saved
    after SIGTERM) | died (the worker was killed).
  text: why it failed or died; its first line is a summary.
  exit_class: of a trial that failed or died, see `launch.exits`.
  warnings: of the run, a damaged checkpoint perhaps.
  """

  kind: Literal["done", "failed", "claimed", "stopped", "died"]
  text: str = ""
  exit_class: str = ""
  warnings: tuple[str, ...] = ()


class Worker:
  """The sweep's side of one worker process.

  trials: those in training, none while it is idle, starting or measuring.
  program: of the last trial that it got, which is compiled.
  future: of what it does; at first of `devices`.
  """

  def __init__(self, slot: Slot, compilation_cache: str):
    self.slot = slot
    self.trials: list[Trial] = []
    self.program: Config | None = None
    self._pool = ProcessPoolExecutor(
      1, _SPAWN, initializer=begin, initargs=(slot, compilation_cache)
    )
    before = set(multiprocessing.active_children())
    # Ctrl-C reaches every process of the terminal; the sweep alone is to answer it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with start_with_huge_pages():
      self.future: Future[Any] = self._pool.submit(devices)
    signal.signal(signal.SIGINT, handler)
    (self.process,) = set(multiprocessing.active_children()) - before

  def give(self, trials: list[Trial], size: int | None = None) -> None:
    """Starts training a trial, or several as a pack of `size`."""
    self.trials, self.program = trials, trials[0].program
    self._submit(train, [(trial.config, trial.workdir) for trial in trials], size)

  def measure(self, trial: Trial, most: int) -> None:
    """Starts to measure how many trials of this program fit, at most `most`."""
    self.program = trial.program
    self._submit(measure, trial.resolved, most)

  def _submit(self, *work: Any) -> None:
    try:
      self.future = self._pool.submit(*work)
    except BrokenProcessPool as error:  # It was killed while it was idle.
      self.future = Future()
      self.future.set_exception(error)

  def result(self) -> Any:
    """Returns what its work returned; an `Outcome` of kind died if it was killed."""
    try:
      return self.future.result()
    except BrokenProcessPool:
      # The pool's thread waits for the process too, and may see first how it ended.
      self._pool.shutdown()
      code = self.process.exitcode
      if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory, perhaps)" if -code == signal.SIGKILL else ""
        text = f"the worker was ended by {name}{hint}"
      else:
        text = f"the worker ended with exit code {code}"
      return Outcome("died", text, "infrastructure")

  def stop(self) -> None:
    """Asks it to save and end."""
    self.process.terminate()

  def close(self) -> None:
    """Ends it, at once if it is at work, and waits."""
    if not self.future.done():
      self.process.kill()
    self._pool.shutdown()


def slots(num_workers: int) -> list[Slot]:
  """Returns each worker's share of the CPU cores, and of the GPUs if JAX uses them.

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


# In the worker.


def begin(slot: Slot, compilation_cache: str) -> None:
  """Prepares a worker process: its share of the machine, its signals, its caches."""
  os.setpgrp()  # Ctrl-C stays with the sweep.
  if slot.cores is not None:
    os.sched_setaffinity(0, slot.cores)
  if slot.gpus is not None:  # CUDA reads it when JAX starts its backend.
    os.environ[_GPUS] = slot.gpus
  # While `fit` trains, a handler of its own saves first.
  signal.signal(signal.SIGTERM, _end_at_once)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  cli.use_compilation_cache(compilation_cache)
  warnings.showwarning = _show_warning


def devices() -> tuple[str, int]:
  """Returns the platform of the worker and the number of its devices."""
  return jax.default_backend(), jax.device_count()


def train(runs: list[tuple[Config, Path]], size: int | None = None) -> list[Outcome]:
  """Trains a trial, or trials of one program as a pack of `size`; raises nothing.

  Returns how each ended. A single outcome is a failure of them all. What libraries
  print goes to the log of the first trial, and the other logs name it.
  """
  _seen_warnings.clear()
  try:
    first, *others = _train(runs, size)
  except Exception as error:  # Its log cannot be opened, perhaps.
    first, others = Outcome("failed", *_explain(error)), []
  return [dataclasses.replace(first, warnings=tuple(_seen_warnings)), *others]


def _train(runs: list[tuple[Config, Path]], size: int | None) -> list[Outcome]:
  with contextlib.ExitStack() as stack:
    taken = [_taken(stack, workdir) for _, workdir in runs]
    ours = [run for run, outcome in zip(runs, taken, strict=True) if outcome is None]
    if not ours:
      return taken
    (_, first), *others = ours
    stack.enter_context(_output_to(first / run_folder.LOG))
    for _, workdir in others:
      with (workdir / run_folder.LOG).open("a") as log:
        log.write(f"trained in a pack: see {first / run_folder.LOG}\n")
    observers = [stack.enter_context(Status(workdir)) for _, workdir in ours]
    try:
      if size is None:
        results = [fit(*ours[0], progress=False, observer=observers[0])]
      else:
        results = fit_pack(*zip(*ours, strict=True), size=size, observers=observers)
    except Exception as error:
      # All end by it. Of a pack one outcome is returned: the sweep tries each alone.
      return [_ended(observer, error) for observer in observers][:1]
    ended = iter([
      _ended(observer, result if isinstance(result, Exception) else None)
      for observer, result in zip(observers, results, strict=True)
    ])
    return [outcome or next(ended) for outcome in taken]


def measure(config: Config, most: int) -> int:
  """Returns the size of a pack that fits, 1 if it cannot be found out."""
  try:
    return fitting_size(config, most, jax.devices())
  except jax.errors.JaxRuntimeError:  # No memory for the program, or to compile it.
    traceback.print_exc()
    return 1


def _taken(stack: contextlib.ExitStack, workdir: Path) -> Outcome | None:
  """Holds a run folder, or returns why there is nothing to be trained in it."""
  try:
    stack.enter_context(run_folder.exclusive(workdir))
  except ConfigError as error:
    return Outcome("claimed", str(error))
  # By another sweep, since this one looked.
  return Outcome("done") if run_folder.is_done(workdir) else None


def _end_at_once(signum: int, _: Any) -> None:
  """Ends the worker between trials, or on a second signal; raises nothing."""
  last_words("yielded", f"{signal.Signals(signum).name}, nothing new was saved")
  os._exit(128 + signum)


def _ended(status: Status, error: Exception | None = None) -> Outcome:
  """Notes the end of a trial in its run folder and returns it."""
  if error is None:
    status.ended("done")
    return Outcome("done")
  if isinstance(error, Interrupted):
    status.ended("yielded", str(error))
    return Outcome("stopped")
  text, exit_class = _explain(error)
  status.ended(exit_class, text)
  return Outcome("failed", text, exit_class)


def _explain(error: Exception) -> tuple[str, str]:
  """Returns the text of an error, its first line a summary, and its exit class."""
  if exit_class := exit_class_of(error):
    return f"{type(error).__name__}: {error}", exit_class
  trace = "".join(traceback.format_exception(error))
  return f"{exits.describe(error)}\n\n{trace}", "infrastructure"


def _show_warning(
  message: Warning | str, category: type[Warning], filename: str, *_: Any
) -> None:
  """Logs a warning; keeps this package's warnings for the sweep (a damaged checkpoint).
  """
  with contextlib.suppress(OSError):  # The disk of the log is full.
    print(f"warning: {message}", file=sys.stderr, flush=True)
  if "mtp_jax" in Path(filename).parts:
    _seen_warnings.append(str(message))


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
