"""The interface of an engine, which starts `launch.train` in run folders.

And what engines share: options in words, and the commands of a scheduler.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from launch.states import Choice, Job, Record, Trial
from mtp_jax.config import ConfigError


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


def words(flag: str, values: Sequence[str]) -> Iterator[str]:
  """Yields the words of a flag that may be given several times.

  Raises:
    ConfigError: a quote that does not end.
  """
  for text in values:
    try:
      yield from shlex.split(text)
    except ValueError as error:
      message = f"--{flag} must be KEY=VALUE ..., got {text!r} ({error})."
      raise ConfigError(message) from error


def run(*command: str) -> str:
  """Returns what a command of a scheduler prints.

  Raises:
    ConfigError: it fails.
  """
  try:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
  except FileNotFoundError as error:
    raise ConfigError(f"{command[0]} is not on the PATH of this host.") from error
  except subprocess.CalledProcessError as error:
    raise ConfigError(f"{command[0]} failed: {summary(error.stderr)}") from error
  print(result.stderr, end="", file=sys.stderr)
  return result.stdout


def summary(text: str) -> str:
  """Returns the errors in the output of a command, in one line."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  errors = [line for line in lines if "error" in line.lower()]
  return "; ".join(errors[:3] or lines[:3]) or "without a word"
