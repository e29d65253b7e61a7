"""How far a command is: a bar on a terminal, elsewhere a line every few seconds."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
  """Shows one phase of work after the other; call it often.

  unit: what is counted; "B", bytes, are shown in millions.
  """

  def __init__(self, unit: str):
    self._unit = unit
    self._bar: tqdm | None = None
    self._phase = ""
    self._began = self._begun_at = self._last_line = 0.0

  def __call__(self, phase: str, done: int, total: int) -> None:
    """Shows that `done` of `total` are done; the first call of a phase starts it.

    `total` is 0 where it is not known.
    """
    now = time.monotonic()
    if phase != self._phase:
      self.close()
      self._phase, self._began, self._begun_at = phase, now, done
      self._last_line = now
      if sys.stderr.isatty():
        self._bar = tqdm(
          desc=phase, total=total or None, initial=done, unit=self._unit,
          unit_scale=True,
        )
    if self._bar is not None:
      self._bar.update(done - self._bar.n)
    elif now - self._last_line >= _SECONDS_BETWEEN_LINES and done > self._begun_at:
      self._last_line = now
      left = (now - self._began) / (done - self._begun_at) * (total - done)
      scale, unit = (1e6, "MB") if self._unit == "B" else (1, self._unit)
      of = f" of {total / scale:,.0f}" if total else ""
      rest = f", {left:,.0f} s left" if total else ""
      print(f"{phase}: {done / scale:,.0f}{of} {unit}{rest}", flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
      self._bar = None
