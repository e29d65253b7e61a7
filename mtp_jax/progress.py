"""`Progress` of a command or a training run: a bar on a terminal, lines elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
  """Shows one phase of work after the other; call it often.

  unit: what is counted; "B", bytes, are shown in millions.
  enabled: False shows nothing.
  seconds: between two lines where there is no terminal.
  """

  def __init__(self, unit: str, enabled: bool = True, seconds: float = 5.0):
    self._unit, self._enabled, self._seconds = unit, enabled, seconds
    self._bar: tqdm | None = None
    self._phase = ""
    self._began = self._begun_at = self._last_line = 0.0

  def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
    """Shows that `done` of `total` are done; the first call of a phase starts a clock.

    `total` is 0 where it is not known. A note stands beside the bar; without a terminal
    it has a line of its own.
    """
    if not self._enabled:
      return
    now = time.monotonic()
    if phase != self._phase:
      self.close()
      self._phase, self._began, self._begun_at = phase, now, done
      self._last_line = now
      if sys.stderr.isatty():
        self._bar = tqdm(
          desc=phase, total=total or None, initial=done, unit=self._unit,
          unit_scale=self._unit == "B", dynamic_ncols=True,
        )
    if self._bar is not None:
      self._bar.total = total or None
      self._bar.update(done - self._bar.n)
      if note:
        self._bar.set_postfix_str(note)
      return
    # Nothing can be estimated from the call that starts the clock.
    is_first = done <= self._begun_at
    if note or (now - self._last_line >= self._seconds and not is_first):
      self._last_line = now
      scale, unit = (1e6, "MB") if self._unit == "B" else (1, self._unit)
      of = f" of {total / scale:,.0f}" if total else ""
      parts = [f"{phase}: {done / scale:,.0f}{of} {unit}"]
      parts += [note] if note else []
      if not is_first and total:
        left = (now - self._began) / (done - self._begun_at) * (total - done)
        parts.append(f"{left:,.0f} s left")
      print(", ".join(parts), flush=True)

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._enabled:
      tqdm.write(text)
      sys.stdout.flush()

  def close(self) -> None:
    """Ends the phase and its bar."""
    self._phase = ""
    if self._bar is not None:
      self._bar.close()
      self._bar = None
