"""The engine of one machine: which worker trains which trial, and how a sweep ends."""

import collections
import contextlib
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch import cli, engines, exits, status, trials
from launch.engines import Job, Record, results, workers
from launch.engines.pace import Pace, Seen, Work, makespan
from launch.engines.workers import Event, Slot, Worker, WorkerError
from launch.trials import State, Trial
from mtp_jax.config import Config, ConfigError
from mtp_jax.config_rules import validate

# Of `--pack=auto`: the most that `launch.benchmark pack` measures. What a pack has
# trained since its last checkpoints is lost together.
MOST_PACKED = 32
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LINES = 60.0


def next_trial(waiting: list[Trial], worker: Worker, busy: Iterable[Worker]) -> Trial:
  """Returns what a free worker trains next.

  First a trial of the shape that it has compiled; then one of a shape that no other
  worker is at; among those the shape with the most work left. Long trials come before
  short ones, so that the sweep does not end with one worker busy and the others idle.
  """
  taken = {other.shape for other in busy}
  choice = [trial for trial in waiting if trial.shape == worker.shape]
  if not choice:
    choice = [trial for trial in waiting if trial.shape not in taken] or waiting
  work: dict[Config, float] = {}
  for trial in choice:
    work[trial.shape] = work.get(trial.shape, 0.0) + trial.flops
  return max(choice, key=lambda trial: (work[trial.shape], trial.flops))


def pack_size(num_trials: int, most: int, num_workers: float) -> int:
  """Returns the size of packs of trials of one shape, at most `most`, that are even.

  13 trials, of which 8 fit, are two packs of up to 7: one program serves both, and one
  of its places stays empty. `num_workers` are to have a pack each.
  """
  num_packs = max(-(-num_trials // most), min(num_trials, int(num_workers)), 1)
  return -(-num_trials // num_packs)


def in_packs(
  mates: list[Trial], states: dict[str, State], size: int
) -> list[list[Trial]]:
  """Returns trials of one shape as packs of at most `size`, those alike together.

  Trials at one step can share their batches, and those of one length end together. The
  longest come first, else the order is that of the sweep.
  """
  alike = sorted(mates, key=lambda trial: (states[trial.name].step, -trial.num_steps))
  return [alike[i : i + size] for i in range(0, len(alike), size)]


def preview_packs(
  waiting: list[Trial], states: dict[str, State], most: int, num_workers: int
) -> list[str]:
  """Returns a line for each pack that `Sweep` would make of trials."""
  mates: dict[Config, list[Trial]] = {}
  for trial in waiting:
    mates.setdefault(trial.shape, []).append(trial)
  lines = []
  for shape, trials_of_shape in enumerate(mates.values(), start=1):
    size = pack_size(len(trials_of_shape), most, num_workers / len(mates))
    for pack in in_packs(trials_of_shape, states, size):
      names = " ".join(trial.name for trial in pack)
      lines.append(f"shape {shape}, {len(pack)} trial(s): {names}")
  return lines


class Sweep:
  """One pass over the trials of a sweep; see `run`.

  Args:
    planned: the trials, those that are done among them.
    root: the sweep folder.
    compilation_cache: folder of compiled programs; empty for none.
    max_attempts: how often a trial is started that ends for no fault of its own.
    again: start also those that ended in bad input or diverged.
    pack: most trials of one shape that are trained in one program; None is as many as
      fit, up to `MOST_PACKED`.
  """

  def __init__(
    self,
    planned: list[Trial],
    root: Path,
    compilation_cache: str,
    max_attempts: int = 1,
    again: bool = False,
    pack: int | None = 1,
  ):
    self._planned = planned
    self._root = root
    self._compilation_cache = compilation_cache
    self._max_attempts = max_attempts
    self._pack = pack
    # By shape: trials that fit, as measured; and the size of its packs.
    self._fitting: dict[Config, int] = {}
    self._sizes: dict[Config, int] = {}
    self._not_packed: set[str] = set()  # Their pack failed.
    self._num_devices = 1
    choice = trials.choose(planned, again)
    self._states = choice.states
    self._waiting, self._copies = choice.todo, choice.copies
    self._num_shapes = len({trial.shape for trial in self._waiting})
    self._failed = {t.name: "another process trains it" for t in choice.active}
    for trial in choice.given_up:
      reason = self._states[trial.name].reason
      self._failed[trial.name] = f"{reason} (not tried again without --again)"
    self._attempts: collections.Counter[str] = collections.Counter()
    self._workers: list[Worker] = []
    self._signum: int | None = None
    self._stopped_at, self._ends_at_once = 0.0, False
    # Of this pass: when each running trial was given out, its step then, how many were
    # given out with it, and whether it is the first of its shape; what finished ones
    # took; the shapes that were given out.
    self._given: dict[str, tuple[float, int, int, bool]] = {}
    self._finished: list[tuple[Work, Seen]] = []
    self._begun: set[Config] = set()
    self._bar: tqdm | None = None
    self._last_line = time.monotonic()

  def run(self, slots: list[Slot]) -> int:
    """Trains what is not done, with a worker for each of the slots.

    Returns:
      The exit code of the command.

    Raises:
      ConfigError: a trial does not fit the devices that the workers found.
      WorkerError: a worker could not start.
    """
    slots = slots[: len(self._waiting)]
    if slots:
      self._root.mkdir(parents=True, exist_ok=True)
      self._say(
        f"{len(self._waiting)} of {len(self._planned)} trial(s) to train with "
        f"{len(slots)} worker(s), {sum(t.flops for t in self._waiting):.3g} FLOPs, in "
        f"{self._root}"
      )
      if sys.stderr.isatty():
        layout = "{percentage:3.0f}%|{bar:20}| {desc}"
        self._bar = tqdm(total=1.0, bar_format=layout, dynamic_ncols=True)
    old = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
      self._workers = [Worker(slot, self._compilation_cache) for slot in slots]
      while self._workers:
        for worker in workers.wait(self._workers, _SECONDS_BETWEEN_LOOKS):
          self._answer(worker, worker.event())
        self._show()
        if self._ends_at_once:
          raise SystemExit(128 + self._signum)
    finally:
      for worker in self._workers:
        worker.close()
      if self._bar is not None:
        self._bar.close()
      for signum, handler in old.items():
        signal.signal(signum, handler)
    return self._summary()

  def _answer(self, worker: Worker, event: Event) -> None:
    """Notes what happened in a worker and gives it what comes next."""
    if event.kind == "warning":
      names = [trial.name for trial in worker.trials]
      self._say(f"{', '.join(names) or 'worker'}: warning: {event.text}")
      return
    given, worker.trials = worker.trials, []
    measured, worker.measures = worker.measures, False
    if event.kind == "ready":
      self._check_devices(event)
    elif given:
      self._note_all(given, event)
    elif measured:  # A worker that died of it has no room for two.
      self._fitting[worker.shape] = event.size or 1
    elif self._signum is None:
      raise WorkerError(f"a worker could not start: {event.text}.")
    goes_on = bool(self._waiting) and self._signum is None
    if goes_on and event.kind != "died":
      self._give(worker)
      return
    self._workers.remove(worker)
    worker.close()
    if goes_on:
      self._workers.append(Worker(worker.slot, self._compilation_cache))

  def _give(self, worker: Worker) -> None:
    busy = [other for other in self._workers if other.trials or other.measures]
    trial = next_trial(self._waiting, worker, busy)
    mates = self._mates(trial)
    if len(mates) > 1 and self._pack is None and trial.shape not in self._fitting:
      worker.measure(trial, min(len(mates), MOST_PACKED))
      self._say(f"{trial.name}: measures how many of its shape fit")
      return
    size = self._size(trial, len(mates))
    given = in_packs(mates, self._states, size)[0] if size > 1 else [trial]
    pack = f" in a pack of {len(given)}" if len(given) > 1 else ""
    is_first = given[0].shape not in self._begun
    self._begun.add(given[0].shape)
    for trial in given:
      self._waiting.remove(trial)
      step = self._states[trial.name].step
      self._given[trial.name] = time.time(), step, len(given), is_first
      with self._warnings(trial):
        trial.workdir.mkdir(parents=True, exist_ok=True)
        (trial.workdir / "error.txt").unlink(missing_ok=True)
        engines.write_record(
          trial.workdir, "local", host=socket.gethostname(), pid=os.getpid()
        )
      self._attempts[trial.name] += 1
      how = f"continues near step {step}" if step else "starts"
      self._say(f"{trial.name}: {how}{pack}")
    is_plain = size == 1 and (self._pack == 1 or self._num_devices == 1)
    worker.give(given, None if is_plain else size)

  def _mates(self, trial: Trial) -> list[Trial]:
    """Returns the waiting trials that may be in a pack with this one, itself too."""
    if self._pack == 1 or trial.name in self._not_packed:
      return [trial]
    return [
      other
      for other in self._waiting
      if other.shape == trial.shape and other.name not in self._not_packed
    ]

  def _size(self, trial: Trial, num_mates: int) -> int:
    """Returns the size of a pack with this trial; that of a shape stays the same."""
    if trial.name in self._not_packed:
      return 1
    if trial.shape not in self._sizes:
      most = self._fitting.get(trial.shape, 1) if self._pack is None else self._pack
      num_workers = len(self._workers) / self._num_shapes
      self._sizes[trial.shape] = pack_size(num_mates, most, num_workers)
    return self._sizes[trial.shape]

  def _note_all(self, given: list[Trial], event: Event) -> None:
    """Notes the end of a trial, or of a pack."""
    if event.kind == "packed":
      for trial, part in zip(given, event.parts, strict=True):
        self._note(trial, part)
    elif len(given) == 1 or self._signum is not None:
      for trial in given:
        self._note(trial, event)
    else:
      text = event.text or "the worker was told to stop (SIGTERM)"
      self._say(
        f"a pack of {len(given)} failed, each is tried alone: {text.splitlines()[0]}"
      )
      # It may be the fault of another one, or of their number: no attempt is counted.
      for trial in given:
        self._attempts[trial.name] -= 1
        self._given.pop(trial.name)
        self._not_packed.add(trial.name)
        self._waiting.append(trial)

  def _note(self, trial: Trial, event: Event) -> None:
    """Notes the end of a trial, for better or worse."""
    self._states[trial.name] = state = trials.read_state(trial)
    elapsed = time.time() - self._given[trial.name][0]
    work, seen = self._seen(trial)
    self._given.pop(trial.name)
    if event.kind == "done":
      self._finished.append((work, seen._replace(evaluation=seen.waited)))
      loss = math.nan if state.eval_loss is None else state.eval_loss
      self._say(f"{trial.name}: done, eval loss {loss:.4f}, {_duration(elapsed)}", True)
      self._share(trial)
    elif self._signum is not None:
      self._say(f"{trial.name}: stopped near step {state.step}")
    elif event.kind == "claimed":
      self._failed[trial.name] = f"another process trains it: {event.text}"
      self._say(f"{trial.name}: not trained here: {event.text}")
    else:
      self._note_failure(trial, event)
    results.collect(self._root)

  def _share(self, original: Trial) -> None:
    """Gives the results of a trial to those that are the same run."""
    for trial in self._planned:
      if self._copies.get(trial.name) is original:
        with self._warnings(trial):
          trials.adopt(trial, original)
          self._say(f"{trial.name}: the same run as {original.name}")
        self._states[trial.name] = trials.read_state(trial)

  def _note_failure(self, trial: Trial, event: Event) -> None:
    text = event.text or "the worker was told to stop (SIGTERM)"
    with self._warnings(trial):
      (trial.workdir / "error.txt").write_text(text + "\n")
    if event.kind == "died":
      status.left_behind(trial.workdir, event.exit_class, text)
    attempt, summary = self._attempts[trial.name], text.splitlines()[0]
    if exits.is_retried(event.exit_class) and attempt < self._max_attempts:
      self._waiting.append(trial)
      self._say(
        f"{trial.name}: attempt {attempt} of {self._max_attempts} failed: {summary}"
      )
      return
    self._failed[trial.name] = text
    self._say(f"{trial.name}: FAILED: {summary}", True)

  @contextlib.contextmanager
  def _warnings(self, trial: Trial) -> Iterator[None]:
    """Says what could not be written: the disk of one trial may be full, or of all."""
    try:
      yield
    except OSError as error:
      self._say(f"{trial.name}: warning: {error}")

  def _check_devices(self, event: Event) -> None:
    self._num_devices = event.num_devices
    shared = any(worker.slot.gpus is None for worker in self._workers)
    if event.platform != "cpu" and len(self._workers) > 1 and shared:
      raise ConfigError(
        f"--parallel must be 1 on {event.platform}: workers can share CPU cores and "
        f"GPUs that are known before they start; got {len(self._workers)}."
      )
    for trial in self._waiting:
      try:
        num_devices = event.num_devices if self._pack == 1 else 1
        validate(trial.config, num_devices, event.platform)
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

  def _work(self, trial: Trial, first_step: int = 0) -> float:
    """FLOPs of a trial since `first_step`; it may be done before its last step."""
    step = self._states[trial.name].step
    return trial.flops * max(0, step - first_step) / trial.num_steps

  def _left(self, trial: Trial, is_first: bool) -> Work:
    """Returns what a trial has to do."""
    data, limits = trial.resolved.data, trial.resolved.eval
    prompts = limits.line_prompts + limits.function_prompts + limits.middle_prompts
    tokens = limits.num_rows * data.seq_len + prompts * limits.max_new_tokens
    # A forward pass is a third of what training costs.
    left = trial.flops - self._work(trial)
    return Work(trial.cost, left, tokens * trial.cost / 3, is_first)

  def _seen(self, trial: Trial) -> tuple[Work, Seen]:
    """Returns what a trial that was given out has to do, and what it took so far."""
    began, first_step, num_given, is_first = self._given[trial.name]
    now, work = time.time(), self._left(trial, is_first)
    startup = _time_of(trial.workdir / "startup.json")
    if startup < began:
      return work, Seen(waited=(now - began) / num_given)
    logged = max(startup, _time_of(trial.workdir / "metrics.jsonl"))
    flops = self._work(trial, first_step)
    training = logged - startup if flops else 0.0
    return work, Seen(
      *(x / num_given for x in (startup - began, training)), flops, None,
      (now - logged) / num_given,
    )

  def _progress(self) -> tuple[float, str]:
    """Returns the share of FLOPs done and a line that says so."""
    for worker in self._workers:
      for trial in worker.trials:
        self._states[trial.name] = trials.read_state(trial)
    at_work = [[self._seen(t) for t in worker.trials] for worker in self._workers]
    pace = Pace([*self._finished, *(x for pairs in at_work for x in pairs)])
    left = makespan(
      [sum(pace.left(*pair) for pair in pairs) for pairs in at_work],
      [pace.left(self._left(t, t.shape not in self._begun)) for t in self._waiting],
    )
    trained = [trial for trial in self._planned if trial.name not in self._copies]
    done = {t for t in trained if self._states[t.name].kind == "done"}
    share = sum(t.flops if t in done else self._work(t) for t in trained)
    share /= sum(trial.flops for trial in trained)
    finished = sum(self._states[t.name].kind == "done" for t in self._planned)
    text = f"{finished}/{len(self._planned)} trials, {share:.0%} of the FLOPs"
    if self._workers and not math.isnan(left):
      text += f", about {_duration(left)} left"
    return share, text

  def _show(self) -> None:
    """Shows the overall progress: always on a terminal, else now and then."""
    if self._signum is not None:
      return
    if self._bar is None:
      if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
        self._say(self._progress()[1])
      return
    self._bar.n, text = self._progress()
    self._bar.set_description_str(text)

  def _say(self, text: str, progress: bool = False) -> None:
    """Prints one line above the bar, with the overall progress where there is none."""
    if progress and self._bar is None:
      text += f" [{self._progress()[1]}]"
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
    self._last_line = time.monotonic()

  def _summary(self) -> int:
    """Says how the sweep ended; returns the exit code."""
    if self._signum is not None:
      name = signal.Signals(self._signum).name
      print(f"{name}: the sweep has stopped; the same command continues it.")
      return 128 + self._signum
    for name, original in self._copies.items():
      if self._states[name].kind != "done":
        self._failed[name] = f"the same run as {original.name}"
    if self._failed:
      print(f"{len(self._failed)} of {len(self._planned)} trial(s) failed:")
      for name, text in self._failed.items():
        print(f"  {name}: {text.splitlines()[0]}")
      print(
        f"{self._root}/<trial>/error.txt has more; the same command tries them again "
        "(with --again also what was bad input or diverged)."
      )
      return 1
    print(f"all {len(self._planned)} trial(s) are done in {self._root}.")
    return 0


class Local:
  """Worker processes on this machine; see `Engine`.

  Args:
    root, compilation_cache, max_attempts, again, pack: see `Sweep`.
    parallel: trials that are trained at once.
  """

  needs_folders = False
  outcome = "trained"

  def __init__(
    self,
    root: Path = Path(),
    compilation_cache: str = "",
    parallel: int = 1,
    max_attempts: int = 1,
    again: bool = False,
    pack: int | None = 1,
  ):
    self._root = root
    self._compilation_cache = compilation_cache
    self._parallel = parallel
    self._max_attempts = max_attempts
    self._again = again
    self._pack = pack

  def check(self, planned: list[Trial]) -> None:
    workers.slots(self._parallel)
    if self._pack != 1:
      trials.check_devices(planned, 1, "--pack: each trial has one of its own")

  def preview(self, planned: list[Trial]) -> str:
    """Returns the packs in which trials would be trained, if any are to be."""
    self.check(planned)
    if self._pack == 1:
      return ""
    choice = trials.choose(planned, self._again)
    most = self._pack or MOST_PACKED
    lines = preview_packs(choice.todo, choice.states, most, self._parallel)
    if self._pack is None:
      lines.insert(0, f"packs of at most {most}, if as many fit the memory:")
    return "\n".join(lines)

  def submit(self, planned: list[Trial]) -> int:
    sweep = Sweep(
      planned, self._root, self._compilation_cache, self._max_attempts, self._again,
      self._pack,
    )
    try:
      return sweep.run(workers.slots(self._parallel))
    except WorkerError as error:
      return cli.fail(str(error), exits.FAILED)

  def jobs(self, records: dict[str, Record]) -> dict[str, Job]:
    """Knows nothing that the run folders do not: a worker holds its own."""
    return {}

  def cancel(self, records: dict[str, Record]) -> str:
    """Stops the sweeps that train these trials, with all that they train."""
    busy = [r for r in records.values() if cli.is_in_use(Path(r["workdir"]))]
    pids = {r["pid"] for r in busy if r["host"] == socket.gethostname()}
    for pid in pids:
      os.kill(pid, signal.SIGTERM)
    text = f"local: told {len(pids)} sweep(s) to save and stop"
    elsewhere = {r["host"] for r in busy} - {socket.gethostname()}
    if elsewhere:
      text += f"; stop those on {', '.join(sorted(elsewhere))} there"
    return text


def _time_of(path: Path) -> float:
  """Returns when a file was written, 0 if it is not there."""
  return path.stat().st_mtime if path.exists() else 0.0


def _duration(seconds: float) -> str:
  if seconds < 100:
    return f"{seconds:.0f} s"
  if seconds < 6000:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h"
