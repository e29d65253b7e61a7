"""How far a command is: a bar for one phase of work after the other, by tqdm."""

import sys

from tqdm import tqdm

_SECONDS_ELSEWHERE = 5.0  # Between lines where there is no terminal.


class PhaseBar:
  """Shows one phase of work after the other; call it often. `unit` is what it counts.
  """

  def __init__(self, unit: str):
    self._unit = unit
    self._bar: tqdm | None = None

  def __call__(self, phase: str, done: int, total: int) -> None:
    """Shows that `done` of `total` are done; the first call of a phase starts it."""
    if self._bar is None or self._bar.desc != phase:
      self.close()
      seconds = 0.1 if sys.stderr.isatty() else _SECONDS_ELSEWHERE
      self._bar = tqdm(
        desc=phase, total=total, initial=done, unit=self._unit, unit_scale=True,
        mininterval=seconds, delay=seconds,
      )
    self._bar.update(done - self._bar.n)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
      self._bar = None
