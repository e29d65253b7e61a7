"""The engine of one machine: which worker trains which trial, and how a sweep ends."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from launch import cli, exits, results_csv, states, status, trials
from launch.engines import workers
from launch.engines.display import Display, duration, seconds_left
from launch.engines.order import (
  MOST_PACKED,
  in_packs,
  next_trial,
  pack_size,
  preview_packs,
)
from launch.engines.workers import Outcome, Slot, Worker, WorkerError
from launch.states import Choice, Job, Record, Trial
from mtp_jax import run_folder
from mtp_jax.config import Config, ConfigError
from mtp_jax.config_rules import validate

_SECONDS_BETWEEN_LOOKS = 1.0


class Sweep:
  """One pass over the trials of a sweep; see `run`.

  Args:
    choice: which trials are to be trained, and the states of all.
    root: the sweep folder.
    compilation_cache: folder of compiled programs; empty for none.
    max_attempts: how often a trial is started that ends for no fault of its own.
    pack: most trials of one program that are trained in one program; None is as many as
      fit, up to `MOST_PACKED`.
  """

  def __init__(
    self,
    choice: Choice,
    root: Path,
    compilation_cache: str,
    max_attempts: int = 1,
    pack: int | None = 1,
  ):
    self._planned, self._copies = choice.planned, choice.copies
    self._waiting, self._states = list(choice.todo), dict(choice.states)
    self._root = root
    self._compilation_cache = compilation_cache
    self._max_attempts = max_attempts
    self._pack = pack
    # By program: trials that fit, as measured; and the size of its packs.
    self._fitting: dict[Config, int] = {}
    self._sizes: dict[Config, int] = {}
    self._not_packed: set[str] = set()  # Their pack failed.
    self._num_devices = 1
    self._num_programs = len({trial.program for trial in self._waiting})
    self._failed = {t.name: "another process trains it" for t in choice.active}
    for trial in choice.given_up:
      reason = self._states[trial.name].reason
      self._failed[trial.name] = f"{reason} (not tried again without --again)"
    self._attempts: collections.Counter[str] = collections.Counter()
    self._workers: list[Worker] = []
    self._began = time.monotonic()
    self._done_before = sum(map(self._done_work, self._planned))
    self._signum: int | None = None
    self._stopped_at, self._ends_at_once = 0.0, False
    self._num_workers, self._has_ended = 1, False
    self._display = Display(str(root))

  def run(self, slots: list[Slot]) -> int:
    """Trains what is not done, with a worker for each slot; returns the exit code.

    Raises:
      ConfigError: a trial does not fit the devices that the workers found.
      WorkerError: a worker could not start.
    """
    slots = slots[: len(self._waiting)]
    self._num_workers = len(slots)
    if slots:
      self._root.mkdir(parents=True, exist_ok=True)
      self._say(
        f"{len(self._waiting)} of {len(self._planned)} trial(s) to train with "
        f"{len(slots)} worker(s), {sum(t.flops for t in self._waiting):.3g} FLOPs, in "
        f"{self._root}"
      )
    old = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
      self._workers = [Worker(slot, self._compilation_cache) for slot in slots]
      with self._display:
        while self._workers:
          concurrent.futures.wait(
            [worker.future for worker in self._workers], _SECONDS_BETWEEN_LOOKS,
            concurrent.futures.FIRST_COMPLETED,
          )
          for worker in [w for w in self._workers if w.future.done()]:
            self._answer(worker)
          self._show()
          if self._ends_at_once:
            raise SystemExit(128 + self._signum)
    finally:
      for worker in self._workers:
        worker.close()
      for signum, handler in old.items():
        signal.signal(signum, handler)
    return self._summary()

  def _answer(self, worker: Worker) -> None:
    """Notes what a worker has done and gives it what comes next."""
    result, has_died = worker.result(), False
    given, worker.trials = worker.trials, []
    match result:
      case (str() as platform, int() as num_devices):
        self._check_devices(platform, num_devices)
      case int():
        self._fitting[worker.program] = result
      case Outcome(kind="died"):
        has_died = True
        if given:
          self._note_all(given, [result])
        elif worker.program is not None:  # It died of measuring: two do not fit.
          self._fitting[worker.program] = 1
        elif self._signum is None:
          raise WorkerError(f"a worker could not start: {result.text}.")
      case _:
        self._note_all(given, result)
    goes_on = bool(self._waiting) and self._signum is None
    if goes_on and not has_died:
      self._give(worker)
      return
    self._workers.remove(worker)
    worker.close()
    if goes_on:
      self._workers.append(Worker(worker.slot, self._compilation_cache))

  def _give(self, worker: Worker) -> None:
    busy = [other for other in self._workers if other is not worker and other.program]
    trial = next_trial(self._waiting, worker, busy)
    mates = self._mates(trial)
    if len(mates) > 1 and self._pack is None and trial.program not in self._fitting:
      worker.measure(trial, min(len(mates), MOST_PACKED))
      self._say(f"{trial.name}: measures how many trials of its program fit", False)
      return
    size = self._size(trial, len(mates))
    given = in_packs(mates, self._states, size)[0] if size > 1 else [trial]
    pack = f" in a pack of {len(given)}" if len(given) > 1 else ""
    for trial in given:
      self._waiting.remove(trial)
      state = self._states[trial.name]
      with self._warnings(trial):
        trial.workdir.mkdir(parents=True, exist_ok=True)
        (trial.workdir / run_folder.ERROR).unlink(missing_ok=True)
        states.write_record(
          trial.workdir, "local", host=socket.gethostname(), pid=os.getpid()
        )
      self._attempts[trial.name] += 1
      how = f"continues near step {state.step}" if state.step else "starts"
      self._say(f"{trial.name}: {how}{pack}", False)
    is_plain = size == 1 and (self._pack == 1 or self._num_devices == 1)
    worker.give(given, None if is_plain else size)

  def _mates(self, trial: Trial) -> list[Trial]:
    """Returns the waiting trials that may be in a pack with this one, itself too."""
    if self._pack == 1 or trial.name in self._not_packed:
      return [trial]
    return [
      other
      for other in self._waiting
      if other.program == trial.program and other.name not in self._not_packed
    ]

  def _size(self, trial: Trial, num_mates: int) -> int:
    """Returns the size of a pack with this trial; a program keeps its size."""
    if trial.name in self._not_packed:
      return 1
    if trial.program not in self._sizes:
      most = self._fitting.get(trial.program, 1) if self._pack is None else self._pack
      num_workers = len(self._workers) / self._num_programs
      self._sizes[trial.program] = pack_size(num_mates, most, num_workers)
    return self._sizes[trial.program]

  def _note_all(self, given: list[Trial], outcomes: list[Outcome]) -> None:
    """Notes the end of a trial, or of a pack; a failed pack has a single outcome."""
    first = outcomes[0]
    names = ", ".join(trial.name for trial in given)
    for text in first.warnings:
      self._say(f"{names}: warning: {text}")
    if len(given) == len(outcomes) or self._signum is not None:
      for trial, outcome in zip(given, outcomes * len(given), strict=False):
        self._note(trial, outcome)
      return
    text = first.text or "the worker was told to stop (SIGTERM)"
    self._say(
      f"a pack of {len(given)} failed, each is tried alone: {text.splitlines()[0]}"
    )
    # It may be the fault of another one, or of their number: no attempt is counted.
    for trial in given:
      self._attempts[trial.name] -= 1
      self._not_packed.add(trial.name)
      self._waiting.append(trial)

  def _note(self, trial: Trial, outcome: Outcome) -> None:
    """Notes the end of a trial, for better or worse."""
    self._states[trial.name] = state = states.read_state(trial)
    if outcome.kind == "done":
      self._has_ended = True
      loss = math.nan if state.eval_loss is None else state.eval_loss
      seconds = duration(state.seconds)
      self._say(
        f"{trial.name}: done, eval loss {loss:.4f}, {seconds} of training "
        f"[{self._progress()[1]}]",
        False,
      )
    elif self._signum is not None:
      self._say(f"{trial.name}: stopped near step {state.step}")
    elif outcome.kind == "claimed":
      self._failed[trial.name] = f"another process trains it: {outcome.text}"
      self._say(f"{trial.name}: not trained here: {outcome.text}")
    else:
      self._note_failure(trial, outcome)
    results_csv.collect(self._root)

  def _note_failure(self, trial: Trial, outcome: Outcome) -> None:
    text = outcome.text or "the worker was told to stop (SIGTERM)"
    with self._warnings(trial):
      (trial.workdir / run_folder.ERROR).write_text(text + "\n")
    if outcome.kind == "died":
      status.left_behind(trial.workdir, outcome.exit_class, text)
    attempt, summary = self._attempts[trial.name], text.splitlines()[0]
    if exits.is_retried(outcome.exit_class) and attempt < self._max_attempts:
      self._waiting.append(trial)
      self._say(
        f"{trial.name}: attempt {attempt} of {self._max_attempts} failed: {summary}"
      )
      return
    self._failed[trial.name] = text
    self._say(f"{trial.name}: FAILED: {summary} [{self._progress()[1]}]")

  @contextlib.contextmanager
  def _warnings(self, trial: Trial) -> Iterator[None]:
    """Prints what could not be written: a disk may be full."""
    try:
      yield
    except OSError as error:
      self._say(f"{trial.name}: warning: {error}")

  def _check_devices(self, platform: str, num_devices: int) -> None:
    self._num_devices = num_devices
    shared = any(worker.slot.gpus is None for worker in self._workers)
    if platform != "cpu" and len(self._workers) > 1 and shared:
      raise ConfigError(
        f"--parallel must be 1 on {platform}: workers can share CPU cores and "
        f"GPUs that are known before they start; got {len(self._workers)}."
      )
    for trial in self._waiting:
      try:
        validate(trial.config, num_devices if self._pack == 1 else 1, platform)
      except ConfigError as error:
        raise ConfigError(f"{trial.name}: {error}") from error

  def _stop(self, signum: int, _: Any) -> None:
    """Saves the running trials on the first signal, ends at once on the second."""
    now = time.monotonic()
    if self._signum is not None:
      # Some tools signal a process and its group at once: that is one signal, not two.
      self._ends_at_once |= now - self._stopped_at > _SECONDS_BETWEEN_LOOKS
      return
    self._signum, self._stopped_at = signum, now
    for worker in self._workers:
      worker.stop()
    os.write(1, b"saving; a second signal ends at once\n")  # Printing is not safe here.

  def _share_done(self, trial: Trial) -> float:
    """Returns the share of a trial's steps that it has taken; 1, if it is done."""
    state = self._states[trial.name]
    return 1.0 if state.kind == "done" else state.step / trial.num_steps

  def _work(self, trial: Trial) -> float:
    """Returns what the time of a trial is taken to be proportional to.

    Smaller models take longer for their FLOPs, between not at all and as their cost:
    the root of the cost is assumed.
    """
    return 0.0 if trial.name in self._copies else trial.flops / math.sqrt(trial.cost)

  def _done_work(self, trial: Trial) -> float:
    return self._share_done(trial) * self._work(trial)

  def _progress(self) -> tuple[float, str]:
    """Returns the share of FLOPs done, and the progress as a line."""
    for trial in (trial for worker in self._workers for trial in worker.trials):
      self._states[trial.name] = states.read_state(trial)
    trained = [trial for trial in self._planned if trial.name not in self._copies]
    done = sum(self._share_done(trial) * trial.flops for trial in trained)
    share = done / sum(trial.flops for trial in trained)
    # A copy of a run gets its results when the sweep has ended.
    run_of = (self._copies.get(trial.name, trial) for trial in self._planned)
    finished = sum(self._states[trial.name].kind == "done" for trial in run_of)
    text = f"{finished}/{len(self._planned)} trials, {share:.0%} of the FLOPs"
    if (seconds := self._seconds_left()) is not None:
      text += f", about {duration(seconds)} left"
    return share, text

  def _seconds_left(self) -> float | None:
    """Returns how long the sweep will take, at the speed of this pass so far.

    None before a trial has ended: until then most of the time goes into compilation.
    """
    trained = [trial for trial in self._planned if trial.name not in self._copies]
    left = [self._work(trial) - self._done_work(trial) for trial in trained]
    done = sum(map(self._work, trained)) - sum(left) - self._done_before
    is_known = self._has_ended or not self._waiting
    if not (self._workers and is_known and done > 0):
      return None
    elapsed = time.monotonic() - self._began
    return seconds_left(elapsed, done, left, self._num_workers)

  def _show(self) -> None:
    """Shows the overall progress."""
    if self._signum is not None:
      return
    at_work = [
      f"{trial.name}: step {self._states[trial.name].step:,} of {trial.num_steps:,}"
      for worker in self._workers for trial in worker.trials
    ]
    self._display.show(*self._progress(), at_work)

  def _say(self, text: str, is_news: bool = True) -> None:
    self._display.say(text, is_news)

  def _summary(self) -> int:
    """Prints how the sweep ended; returns the exit code."""
    if self._signum is not None:
      name = signal.Signals(self._signum).name
      print(f"{name}: the sweep has stopped; the same command continues it.")
      return 128 + self._signum
    for name, original in self._copies.items():
      if self._states[original.name].kind != "done":
        self._failed[name] = f"the same run as {original.name}"
    if self._failed:
      print(f"{len(self._failed)} of {len(self._planned)} trial(s) failed:")
      for name, text in self._failed.items():
        print(f"  {name}: {text.splitlines()[0]}")
      print(
        f"{self._root}/FOLDER/{run_folder.ERROR} has more (mtp-jax status lists the "
        "folders); the same command tries them again (with --again also what was bad "
        "input or diverged)."
      )
      return 1
    print(f"all {len(self._planned)} trial(s) are done in {self._root}.")
    return 0


@dataclasses.dataclass(frozen=True)
class Local:
  """Worker processes on this machine; see `Engine`.

  root, compilation_cache, max_attempts, pack: see `Sweep`.
  parallel: trials that are trained at once.
  """

  needs_folders: ClassVar = False
  outcome: ClassVar = "trained"

  root: Path
  compilation_cache: str = ""
  parallel: int = 1
  max_attempts: int = 1
  pack: int | None = 1

  def check(self, todo: list[Trial]) -> None:
    workers.slots(self.parallel)
    if self.pack != 1:
      trials.check_devices(todo, 1, "--pack: each trial has one of its own")

  def preview(self, todo: list[Trial]) -> str:
    """Returns the packs in which trials would be trained, if any are to be."""
    self.check(todo)
    if self.pack == 1:
      return ""
    found = {trial.name: states.read_state(trial) for trial in todo}
    waiting = [trial for trial in todo if found[trial.name].kind != "done"]
    return preview_packs(waiting, found, self.pack, self.parallel)

  def submit(self, choice: Choice) -> int:
    sweep = Sweep(
      choice, self.root, self.compilation_cache, self.max_attempts, self.pack
    )
    try:
      return sweep.run(workers.slots(self.parallel))
    except WorkerError as error:
      return cli.fail(str(error), exits.FAILED)

  @staticmethod
  def jobs(records: dict[str, Record]) -> dict[str, Job]:
    """Returns nothing: run folders tell all, a worker holds the lock of its own."""
    return {}

  @staticmethod
  def cancel(records: dict[str, Record]) -> str:
    """Stops the sweeps that train these trials, with all that they train."""
    busy = [r for r in records.values() if run_folder.is_in_use(Path(r["workdir"]))]
    pids = {r["pid"] for r in busy if r["host"] == socket.gethostname()}
    for pid in pids:
      os.kill(pid, signal.SIGTERM)
    text = f"local: told {len(pids)} sweep(s) to save and stop"
    elsewhere = {r["host"] for r in busy} - {socket.gethostname()}
    if elsewhere:
      text += f"; stop those on {', '.join(sorted(elsewhere))} there"
    return text
