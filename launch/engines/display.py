"""`Display` of a sweep on this machine: in place on a terminal, lines elsewhere."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_SECONDS_BETWEEN_LINES = 60.0


class Display:
  """Shows how far a sweep is; a context manager.

  On a terminal a bar and the trials at work stay in their place, below the lines that
  are news: failures and warnings. Elsewhere every line is printed, and how far the
  sweep is now and then.
  """

  def __init__(self, title: str):
    self._title = title
    self._console = Console(highlight=False)
    self._live: Live | None = None
    self._last_line = time.monotonic()

  def __enter__(self) -> "Display":
    if self._console.is_terminal:
      # What has ended has a line of its own: nothing of the bar stays.
      self._live = Live(console=self._console, auto_refresh=False, transient=True)
      self._live.start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None

  @property
  def is_live(self) -> bool:
    return self._live is not None

  def show(self, share: float, text: str, at_work: Iterable[str]) -> None:
    """Shows the share that is done, and what is at work: at once, or now and then."""
    if self._live is None:
      if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
        self.say(text)
      return
    line = Table.grid(padding=(0, 1))
    line.add_row(self._title, ProgressBar(1.0, share, width=24), text)
    cut = {"no_wrap": True, "overflow": "ellipsis"}
    shown = Group(line, *(Text(f"  {x}", "dim", **cut) for x in at_work))
    self._live.update(shown, refresh=True)

  def say(self, text: str, is_news: bool = True) -> None:
    """Prints a line; on a terminal only if it is news."""
    if self._live is None:
      print(text, flush=True)
    elif is_news:
      self._console.print(Text(text), soft_wrap=True)
    self._last_line = time.monotonic()


def seconds_left(
  elapsed: float, done: float, left: Sequence[float], num_workers: int
) -> float:
  """Returns the seconds until all work is done, evaluation and compilation included.

  The trial with the most work left keeps one worker to the end, however little the
  other workers have to do.

  Args:
    elapsed: seconds in which the workers have done `done`.
    done: work, in any unit.
    left: work left of each trial.
    num_workers: workers that did it.
  """
  return elapsed / done * max(sum(left), num_workers * max(left, default=0.0))


def duration(seconds: float) -> str:
  """Returns a time in words, as exact as an estimate is."""
  if seconds < 100:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
