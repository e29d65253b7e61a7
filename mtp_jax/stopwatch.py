"""`Stopwatch`: seconds of every phase between a command and its first training step."""

import os
import time
from pathlib import Path
from typing import Any


class Stopwatch:
  """Times consecutive phases, such as imports, data and compilation.

  Seconds of a phase that occurs several times, as in a pack of runs, are added up.
  """

  def __init__(self, age: float = 0.0):
    """Args: `age`: seconds of the first phase that have passed already."""
    self._since = time.monotonic() - age
    self._seconds: dict[str, float] = {}

  def ends(self, phase: str) -> None:
    """Ends `phase`: adds the seconds since the previous phase ended to it."""
    now = time.monotonic()
    self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
    self._since = now

  def record(self, step: int) -> dict[str, Any]:
    """Returns the content of startup.json; training starts from `step`."""
    return {"step": step, "total": self._total, "seconds": dict(self._seconds)}

  def describe(self) -> str:
    """Returns one line with the seconds of all phases so far."""
    phases = ", ".join(f"{name} {x:.1f}" for name, x in self._seconds.items())
    return f"first step after {self._total:.1f} s: {phases}"

  @property
  def _total(self) -> float:
    return sum(self._seconds.values())


def process_age() -> float:
  """Returns the seconds since this process was started.

  On Linux from /proc (`man 5 proc_pid_stat`, starttime), to 10 ms. Elsewhere the
  seconds since this module was imported: commands import it first, so only the start of
  the interpreter, some hundredths of a second, is missing.
  """
  try:
    # Split after the last bracket: the program name may contain spaces and brackets.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
  except (OSError, AttributeError):
    return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()
