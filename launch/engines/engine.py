"""The interface of an engine, which starts `launch.train` in run folders."""

from typing import Protocol

from launch.states import Choice, Job, Record, Trial


class Engine(Protocol):
  """Gives machines to trials.

  needs_folders: training begins elsewhere, so run folders are prepared first.
  outcome: what `submit` has done with trials, in words.
  """

  needs_folders: bool
  outcome: str

  def check(self, todo: list[Trial]) -> None:
    """Raises ConfigError if the trials could not be started. Starts nothing."""

  def preview(self, todo: list[Trial]) -> str:
    """Returns what `submit` would hand over: scripts, manifests, commands; or ''."""

  def submit(self, choice: Choice) -> int:
    """Starts `choice.todo`, or waits until they are trained; returns the exit code.

    Raises:
      ConfigError: the scheduler refuses them.
    """

  @staticmethod
  def jobs(records: dict[str, Record]) -> dict[str, Job]:
    """Returns the jobs of trials by name, from their records."""

  @staticmethod
  def cancel(records: dict[str, Record]) -> str:
    """Ends the jobs of these trials, saved if they can; returns what was done."""
