"""Packs: runs of equal `program_config`, trained side by side in one program."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mtp_jax import run_folder
from mtp_jax.batch import Batch
from mtp_jax.config import Config, ConfigError, difference
from mtp_jax.data.pipeline import TrainLoader
from mtp_jax.interrupt import Interrupt
from mtp_jax.pack_program import Pack
from mtp_jax.program import program_config
from mtp_jax.run import Run, admit, check_folder
from mtp_jax.run_log import Clock, Observer, RunLog
from mtp_jax.stopwatch import Stopwatch
from mtp_jax.train_state import TrainState, hyperparameters


@dataclasses.dataclass(eq=False)
class _Member:
  """One run of a pack, at place `index`. `error` ends the run alone."""

  index: int
  log: RunLog
  loader: TrainLoader
  state: TrainState  # At the start, on the host.
  error: Exception | None = None

  @property
  def is_active(self) -> bool:
    return self.error is None and self.log.has_steps_left

  def attempt(self, part: Callable[..., Any], *args: Any) -> Any:
    """Calls a part of the run, unless the run failed; notes what the call raises."""
    if self.error is None:
      try:
        return part(*args)
      except Exception as error:
        self.error = error

  def state_in(self, pack: Pack) -> TrainState:
    """Returns the state on the run's own mesh."""
    return jax.device_put(pack.state(self.index), self.log.run.programs.shardings)

  def diagnose(self, pack: Pack, feed: "_Feed") -> None:
    if self.log.diagnostics_are_due:
      self.log.diagnose(self.state_in(pack), feed.batch(self))

  def measure(self, pack: Pack, interrupt: Interrupt) -> None:
    """Writes the records that are due after a step."""
    log = self.log
    if log.validation_is_due:
      report = pack.report(self.index)
      if not log.validate(self.state_in(pack), report, interrupt):
        return
    if log.log_is_due:
      log.log(pack.report(self.index))

  def save(self, pack: Pack, feed: "_Feed", signum: int | None) -> None:
    if self.log.save_is_due(signum):
      self.log.save(self.state_in(pack), feed.state(self), signum)

  def finish(self, pack: Pack, interrupt: Interrupt) -> dict[str, Any] | Exception:
    """Returns the evaluation of a trained run, or the error that ended the run."""
    result = self.attempt(lambda: self.log.finish(self.state_in(pack), interrupt))
    return self.error or result


class _Feed:
  """The batches of the members.

  If all members read the same rows in the same order, they share one batch. The first
  member reads it, even after the run of that member has ended. Otherwise (some members
  continue from another step, for example) each member reads its own batch.
  """

  def __init__(
    self, pack: Pack, members: Sequence[_Member], active: Sequence[_Member]
  ):
    read = [member.loader.get_state() for member in active]
    shares = all(x == read[0] for x in read)
    self._pack, self._members = pack, members
    self._reader = {m: active[0] if shares else m for m in active}
    self._rows: dict[_Member, Batch] = {}
    self._states: dict[_Member, dict[str, Any]] = {}

  def mark(self) -> None:
    """Notes where the readers are."""
    readers = dict.fromkeys(self._reader.values())
    self._states = {reader: reader.loader.get_state() for reader in readers}

  def read(self) -> Any:
    """Returns the next batch of the active members on the devices."""
    readers = dict.fromkeys(r for m, r in self._reader.items() if m.is_active)
    self._rows |= {m: m.log.run.split(next(m.loader)) for m in readers}
    rows = list(self._rows.values())
    if len(set(self._reader.values())) > 1:
      # The rows of a member without steps left do not count.
      rows = [self._rows.get(m, rows[0]) for m in self._members]
    return self._pack.put(rows)

  def batch(self, member: _Member) -> Batch:
    """Returns what the next step of a member is taken on, on its own mesh."""
    return member.log.run.put(self._rows[self._reader[member]])

  def state(self, member: _Member) -> dict[str, Any]:
    """Returns the state of the data iterator where `mark` noted it."""
    return self._states[self._reader[member]]


def fit_pack(
  configs: Sequence[Config],
  workdirs: Sequence[Path],
  *,
  size: int | None = None,
  observers: Sequence[Observer] | None = None,
) -> list[dict[str, Any] | Exception]:
  """Trains runs of one program side by side in one program, each as `train.fit` would.

  Every run has its own folder. A run ends in its evaluation, after all are trained, or
  in an error that does not disturb the others. The folder of a run that is done stays
  as it is. Each device has a share of the runs; work for a single run is on the first
  device.

  Args:
    configs: of equal `program_config`, each for a mesh of one device.
    workdirs: their run folders.
    size: number of runs that the program is compiled for, by default `len(configs)`.
      The same program serves smaller packs.
    observers: one for each run.

  Returns:
    For each run what `fit` returns or raises. After SIGTERM or SIGINT the result of an
    unfinished run is `Interrupted`.

  Raises:
    ConfigError: the runs cannot be trained together, or one of them cannot be trained.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      f"a pack is trained by one process, got {jax.process_count()}."
    )
  workdirs = [Path(workdir) for workdir in workdirs]
  resolved = [admit(*run, 1) for run in zip(configs, workdirs, strict=True)]
  first, *others = map(program_config, resolved)
  for other in others:
    if keys := difference(first, other):
      raise ConfigError(
        "runs of a pack must have one program, but these keys differ: "
        f"{', '.join(sorted(keys))}."
      )
  observers = observers or [Observer() for _ in configs]
  startup, clock, devices = Stopwatch(), Clock(), jax.devices()
  outcomes: list[Any] = [None] * len(configs)
  members: list[_Member] = []
  with contextlib.ExitStack() as stack:
    interrupt = stack.enter_context(Interrupt())

    def open_run(place: int) -> None:
      config, workdir, observer = configs[place], workdirs[place], observers[place]
      if result := run_folder.finished(workdir, config):
        outcomes[place] = result
        return
      observer.begins(resolved[place].train.num_steps)
      observer.pauses("starting")
      check_folder(config, workdir)
      run = stack.enter_context(Run(resolved[place], workdir, devices=devices[:1]))
      loader = stack.enter_context(contextlib.closing(run.loader()))
      startup.ends("data")
      with jax.set_mesh(run.mesh):
        start = run.start(loader)
        run.claim(config, start.origin, len(configs))
        log = stack.enter_context(RunLog(run, start, observer, clock))
        log.make_up(start.state, loader.get_state(), interrupt)
      # The device has one of the states at a time.
      member = _Member(len(members), log, loader, jax.device_get(start.state))
      members.append(member)
      outcomes[place] = member
      startup.ends("state")

    for place in range(len(configs)):
      try:
        open_run(place)
      except Exception as error:
        outcomes[place] = error
    if not members:
      return outcomes
    hypers = [hyperparameters(m.log.run.config) for m in members]
    states = [m.state for m in members]
    pack = Pack(first, states, hypers, size or len(configs), devices)
    with jax.set_mesh(members[0].log.run.mesh):
      _train(pack, members, startup, clock, interrupt)
    return [
      x.finish(pack, interrupt) if isinstance(x, _Member) else x for x in outcomes
    ]


def _train(
  pack: Pack,
  members: Sequence[_Member],
  startup: Stopwatch,
  clock: Clock,
  interrupt: Interrupt,
) -> None:
  """Takes the steps that are left; see `train.fit` for the order of things."""
  active = [member for member in members if member.is_active]
  if not active:
    interrupt.catch()
    return
  for member in active:
    member.log.observer.pauses("compiling")
  feed = _Feed(pack, members, active)
  batch = feed.read()
  pack.compile(batch)
  startup.ends("compile")
  interrupt.catch()
  clock.start()
  previous = None
  while active:
    for member in active:
      member.attempt(member.diagnose, pack, feed)
    if previous is None:
      startup.ends("diagnostics")
    starts = {m.index: m.log.starts_interval for m in active if m.is_active}
    current = pack.step(batch, starts)
    feed.mark()
    # The device works on this step while the host prepares the next batch.
    if any(m.log.step + 1 < m.log.num_steps for m in active):
      batch = feed.read()
    if previous is None:
      jax.block_until_ready(current)
      startup.ends("first step")
      for member in active:
        member.attempt(member.log.began, startup)
    jax.block_until_ready(previous)
    previous = current
    for member in active:
      member.log.stepped()
      member.attempt(member.measure, pack, interrupt)
    # One answer for all: the runs are saved at the same step.
    signum = interrupt.received()
    for member in active:
      member.attempt(member.save, pack, feed, signum)
    active = [member for member in active if member.is_active]
  clock.stop()
