"""A trace of some steps of a run, which jax.profiler writes and XProf opens."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Trace:
  """Traces the steps from `first` to `last`; a context manager.

  Step s is the one after which records have `step` s. Of several processes, process 0
  traces.

  Args:
    folder: for the trace.
    steps: (first, last); None traces nothing.
  """

  def __init__(self, folder: Path, steps: tuple[int, int] | None):
    self._folder, self._is_on = folder, False
    self._first, self._last = steps or (0, 0)

  def of(self, step: Callable[..., Any], done: int) -> Callable[..., Any]:
    """Returns the function of a step, traced; `done` steps were taken before."""
    if done >= self._first:
      self.skip(f"the run continues after step {done}")
      return step
    numbers = itertools.count(done + 1)

    def traced(*args: Any) -> Any:
      number = next(numbers)
      if number == self._first and jax.process_index() == 0:
        jax.block_until_ready(args)  # Nothing of the steps before is in the trace.
        jax.profiler.start_trace(self._folder)
        self._is_on = True
      with jax.profiler.StepTraceAnnotation("train_step", step_num=number):
        result = step(*args)
      if number == self._last:
        jax.block_until_ready(result)
        self._stop()
      return result

    return traced

  def skip(self, reason: str) -> None:
    """Warns that there will be no trace, if one is wanted."""
    if self._first:
      steps = f"steps {self._first} to {self._last}"
      warnings.warn(f"no trace of {steps} is written: {reason}.", stacklevel=2)

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def _stop(self) -> None:
    if self._is_on:
      self._is_on = False
      jax.profiler.stop_trace()
