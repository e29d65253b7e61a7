"""What happens between the steps of a run: records, checkpoints, and when each is due.

The lone run (`train`) and each run of a pack (`pack`) have one `RunLog`, so both write
the same files.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mtp_jax import evaluate, records, run_folder
from mtp_jax.batch import Batch
from mtp_jax.files import plain
from mtp_jax.interrupt import Interrupt, Interrupted
from mtp_jax.metrics import MetricsWriter
from mtp_jax.progress import Progress
from mtp_jax.records import Measures
from mtp_jax.run import Diverged, Run, Start
from mtp_jax.stopwatch import Stopwatch
from mtp_jax.train_state import TrainState

# What `RunLog.progress` is before the first step.
NO_PROGRESS = {"seconds": 0.0, "reached": None, "unmeasured": None}


class Observer:
  """Receives what `fit` does, in every process; does nothing by itself."""

  def begins(self, num_steps: int) -> None:
    """The run folder is held, and the run is not done yet."""

  def pauses(self, activity: str) -> None:
    """No step will end for a while: starting, compiling or evaluating."""

  def stepped(self, step: int) -> None:
    """The step before `step` has ended, and `step` is being computed."""

  def logged(self, record: dict[str, Any]) -> None:
    """A `train` record was written to metrics.jsonl."""


class Clock:
  """Seconds of training; the clock stands still while anything else is done."""

  def __init__(self):
    self._before, self._since = 0.0, None

  def read(self) -> float:
    running = 0.0 if self._since is None else time.monotonic() - self._since
    return self._before + running

  def start(self) -> None:
    self._since = time.monotonic()

  def stop(self) -> None:
    self._before, self._since = self.read(), None

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    self.stop()
    try:
      yield
    finally:
      self.start()


class RunLog:
  """Writes what is due between the steps of one run; a context manager.

  step: steps done so far.
  progress: what a checkpoint holds beside state and data. `seconds` of training;
    `reached`, as `stopped` in eval.json, is the first of the latest validations in a
    row at which `train.stop_metric` had its value, and its `last_step` is None until
    that ends training; `unmeasured` is None, or what the next start needs to make up
    for the records of this step, which a signal cut short.

  Args:
    run: its folder is claimed already.
    start: where it begins or continues.
    observer: receives what happens.
    clock: of the training; the runs of a pack share one.
    shows_progress: a bar or lines on the terminal.
  """

  def __init__(
    self,
    run: Run,
    start: Start,
    observer: Observer,
    clock: Clock,
    shows_progress: bool = False,
  ):
    self.run, self.observer = run, observer
    self.step = int(start.state.step)
    done = NO_PROGRESS | (start.progress or {})  # Older runs have no `unmeasured`.
    self._seconds, self._reached = done["seconds"], done["reached"]
    self._unmeasured = done["unmeasured"]
    self._clock, self._earlier_seconds = clock, self._seconds
    # Step and seconds of the newest train record: its interval begins here.
    self._logged = self.step, self._seconds
    # What the newest validation measured, by split, and the step.
    self._measured: tuple[int, dict[str, Measures]] = (0, {})
    repeats = self._unmeasured is not None
    self._writer = MetricsWriter(run.workdir, self.step, repeats)
    # Every record has its line in the log: no lines between them.
    is_shown = shows_progress and jax.process_index() == 0
    self._progress = Progress("steps", is_shown, seconds=math.inf)
    self._say(run.describe_data())
    if self.step:
      self._say(f"resumed at step {self.step}")

  def __enter__(self) -> "RunLog":
    self._writer.__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    self._progress.close()
    self._writer.__exit__(*error)

  @property
  def num_steps(self) -> int:
    return self.run.config.train.num_steps

  @property
  def has_steps_left(self) -> bool:
    return self.step < self.num_steps and not records.stopped(self.progress)

  @property
  def progress(self) -> dict[str, Any]:
    return {
      "seconds": self._seconds, "reached": self._reached,
      "unmeasured": self._unmeasured,
    }

  @property
  def starts_interval(self) -> bool:
    """Whether the next step is the first one of an interval of the log."""
    return self.step % self.run.config.train.log_every == 0

  @property
  def diagnostics_are_due(self) -> bool:
    """Whether gradients are compared before the next step; not before the first one,
    which would wait until another program is compiled.
    """
    every = self.run.config.train.diagnostics_every
    is_due = every and self.step and self.step % every == 0
    return bool(self.run.config.mtp.depth and is_due)

  @property
  def validation_is_due(self) -> bool:
    config = self.run.config.train
    every, per_doubling = config.eval_every, config.evals_per_doubling
    return bool(
      ((every or per_doubling) and not self.has_steps_left)
      or (every and self.step % every == 0)
      or (per_doubling and is_log_spaced(self.step, per_doubling))
    )

  @property
  def log_is_due(self) -> bool:
    return self.starts_interval or not self.has_steps_left

  def save_is_due(self, signum: int | None) -> bool:
    is_regular = self.step % self.run.config.checkpoint.every_steps == 0
    return bool(signum or is_regular or not self.has_steps_left)

  def start(self) -> None:
    """Starts the clock of training; compilation before it is not counted."""
    self._progress.close()
    self._show()
    self._clock.start()

  def pause(self) -> None:
    """Stops the clock of training."""
    self._clock.stop()

  def began(self, startup: Stopwatch) -> None:
    """Writes how long it took until the first step of this start had ended."""
    with self._clock.stopped():
      if jax.process_index() == 0:
        record = startup.record(self.step)
        run_folder.write(self.run.workdir, run_folder.STARTUP, record)
      self._say(startup.describe())

  def stepped(self) -> None:
    """Counts a step that has been started."""
    self.step += 1
    self._show()
    self.observer.stepped(self.step)

  def diagnose(self, state: TrainState, batch: Batch) -> None:
    """Writes how the gradients compare, before the step on `batch`."""
    # Two programs with collectives at once can wait for each other on CPU devices.
    jax.block_until_ready(state)
    with self._clock.stopped():
      self.observer.pauses("evaluating")
      record = records.diagnostics_record(self.run, state, batch, self.step)
      self._writer.write(record)

  def validate(
    self, state: TrainState, report: dict[str, Any], interrupt: Interrupt
  ) -> bool:
    """Measures held-out examples; returns False if a signal cut that short.

    Nothing is written then, and the progress holds what `make_up` needs. Success may
    end training.
    """
    jax.block_until_ready(state)
    with self._clock.stopped():
      self._look_at_clock()
      self.observer.pauses("evaluating")
      try:
        measured = {
          kind: records.measure(
            self.run, state.params, corpus, lambda: self.stop(interrupt)
          )
          for kind, corpus in self.run.validated.items()
        }
      except Interrupted:
        rates = {key: float(report[key]) for key in ("learning_rate", "lambda")}
        self._unmeasured = rates | {"logged": list(self._logged)}
        return False
      self._measured = self.step, {
        self.run.validated[kind].config.eval.split: x for kind, x in measured.items()
      }
      for kind, measures in measured.items():
        record = records.validation_record(
          self.run, kind, measures, self.step, self._seconds
        )
        self._writer.write(record)
        if kind == "validation":
          self._look_for_success(record)
    return True

  def _look_for_success(self, record: dict[str, Any]) -> None:
    """Ends training if a validation reaches what the one before it reached."""
    metric, wanted = (
      self.run.config.train.stop_metric, self.run.config.train.stop_value
    )
    if not metric:
      return
    value = record["loss"][0] if metric == "loss" else record[metric]
    is_accuracy = metric.startswith("task_")
    if not (value >= wanted if is_accuracy else value <= wanted):
      self._reached = None
    elif self._reached is None:
      named = {"metric": metric, "value": value, "last_step": None}
      self._reached = {key: record[key] for key in ("step", "tokens")} | named
    else:
      self._reached = self._reached | {"last_step": self.step}
      first = self._reached["step"]
      self._say(f"{metric} reached {wanted} at steps {first} and {self.step}")

  def log(self, report: dict[str, Any]) -> None:
    """Writes the record of the interval that ended.

    Raises:
      Diverged: too many steps in a row were not finite.
    """
    self._look_at_clock()
    (step, seconds), self._logged = self._logged, (self.step, self._seconds)
    rate = (self.step - step) * self.run.tokens_per_step / (self._seconds - seconds)
    record = records.train_record(self.run, self.step, self._seconds, rate, report)
    self._writer.write(record)
    self.observer.logged(record)
    self._show(f"loss {record['loss_total']:.4f}, {rate:,.0f} tokens/s")
    _stop_if_diverged(self.run, report, self.step)

  def save(
    self, state: TrainState, data: dict[str, Any], signum: int | None
  ) -> None:
    """Saves after a step; `data` is the state of the data iterator.

    Raises:
      Interrupted: `signum` asks for an end; all is saved.
    """
    jax.block_until_ready(state)
    with self._clock.stopped():
      self._look_at_clock()
      # Amid skipped updates nothing is saved unless it must: the newest checkpoint
      # stays one from which training can continue.
      if signum or not self.has_steps_left or not state.nonfinite_run:
        self.run.save(state, data, self.progress)
      if signum:
        self.run.checkpointer.wait()
        raise Interrupted(signum, self.step)

  def make_up(
    self, state: TrainState, data: dict[str, Any], interrupt: Interrupt
  ) -> None:
    """Writes the records of a step that a signal cut short in an earlier start.

    The checkpoint of the step is then replaced: its progress lacks the validation.

    Raises:
      Interrupted: another signal arrived; the checkpoint stays as it is.
    """
    if self._unmeasured is None:
      return
    missing, self._unmeasured = self._unmeasured, None
    self._logged = tuple(missing["logged"])
    report = jax.device_get(
      state.interval._asdict() | {"nonfinite_total": state.nonfinite_total}
    ) | {key: np.float32(missing[key]) for key in ("learning_rate", "lambda")}
    self._clock.start()
    if not self.validate(state, report, interrupt):
      self.stop(interrupt)
    if self.log_is_due:
      self.log(report)
    self._clock.stop()
    interrupt.catch()  # The old checkpoint is deleted before the new one is whole.
    self.run.save(state, data, self.progress, replaces=True)

  def stop(self, interrupt: Interrupt) -> None:
    """Raises `Interrupted` after a signal."""
    if signum := interrupt.received():
      raise Interrupted(signum, self.step)

  def finish(self, state: TrainState, interrupt: Interrupt) -> dict[str, Any]:
    """Evaluates the trained model; writes and returns eval.json.

    Raises:
      Interrupted: a signal asks for an end; nothing of the evaluation is kept.
    """
    run = self.run
    self.observer.pauses("evaluating")
    self.stop(interrupt)
    step, measured = self._measured
    known = measured.get(run.config.eval.split) if step == self.step else None
    result = records.final_evaluation(
      run, state, self.progress, lambda: self.stop(interrupt), known
    )
    run.checkpointer.wait()
    self.stop(interrupt)
    main, error = result["main_loss"].values()
    spread = f"+- {error:.4f} nats per token"
    if np.isnan(error):
      spread = f"nats per token ({evaluate.NO_ERROR})"
    self._say(f"done: main loss {main:.4f} {spread}")
    if jax.process_index() == 0:
      run_folder.finish(run.workdir, result)
    return plain(result)

  def _show(self, note: str = "") -> None:
    last = self.step if records.stopped(self.progress) else self.num_steps
    self._progress(self.run.config.name, self.step, last, note)

  def _say(self, text: str) -> None:
    self._progress.say(f"{self.run.config.name}: {text}")

  def _look_at_clock(self) -> None:
    self._seconds = self._earlier_seconds + self._clock.read()


def is_log_spaced(step: int, per_doubling: int) -> bool:
  """Returns whether `step` is round(2^(j / per_doubling)) for a whole j."""
  below = int(per_doubling * math.log2(step))
  near = (round(2 ** (j / per_doubling)) for j in (below, below + 1))
  return step in near


def _stop_if_diverged(run: Run, report: dict[str, Any], step: int) -> None:
  limit = run.config.train.max_nonfinite_steps
  if report["longest_nonfinite_run"] < limit:
    return
  run.checkpointer.wait()
  saved = run.checkpointer.steps()
  where = run.checkpointer.directory / str(saved[-1]) if saved else "none was saved yet"
  raise Diverged(
    f"loss or gradient was not finite for {int(report['longest_nonfinite_run'])} steps "
    f"in a row (train.max_nonfinite_steps = {limit}) before step {step}. Their updates "
    f"were skipped. Last good checkpoint: {where}. Lower optimizer.learning_rate "
    f"({run.config.optimizer.learning_rate}) or look at the data."
  )
