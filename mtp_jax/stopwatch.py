"""What passes between a command and its first step of training."""

import os
import time
from pathlib import Path
from typing import Any


class Stopwatch:
  """A stopwatch of one phase after the other, from a start to the first step.

  A phase that comes again, as in a pack of runs, has the sum of its seconds.
  """

  def __init__(self, age: float = 0.0):
    """Args: `age` is what has passed of the first phase already, in seconds."""
    self._since = time.monotonic() - age
    self._seconds: dict[str, float] = {}

  def ends(self, phase: str) -> None:
    """Counts what has passed since the last phase ended as seconds of this one."""
    now = time.monotonic()
    self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
    self._since = now

  def record(self, step: int) -> dict[str, Any]:
    """Returns what goes into startup.json; `step` is what training went on from."""
    return {"step": step, "total": self._total, "seconds": dict(self._seconds)}

  def describe(self) -> str:
    """Returns one line on all phases so far."""
    phases = ", ".join(f"{name} {x:.1f}" for name, x in self._seconds.items())
    return f"first step after {self._total:.1f} s: {phases}"

  @property
  def _total(self) -> float:
    return sum(self._seconds.values())


def process_age() -> float:
  """Returns the seconds since this process was started.

  By the kernel of Linux (`man 5 proc_pid_stat`, starttime), to 10 ms. Where there is no
  such file, since this module was imported, which a command does first: the start of
  the interpreter, some hundredths of a second, is missing then.
  """
  try:
    # The name of the program is in brackets, and may hold both spaces and brackets.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
  except (OSError, AttributeError):
    return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()
