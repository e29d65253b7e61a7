"""The engine for any other scheduler: prints a command for each trial and process."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path
from typing import ClassVar

from launch import trials
from launch.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from launch.states import Choice, Job, Record, Trial
from mtp_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Options:
  """The `--print.*` flags.

  processes: of a trial. devices: accelerators of a process, to check the mesh by; 0
  checks nothing. coordinator: HOST:PORT of process 0, as the others reach it.
  """

  processes: int = 1
  devices: int = 0
  coordinator: str | None = None


@dataclasses.dataclass(frozen=True)
class Printed:
  """Starts nothing; see `Engine`.

  The run folders are prepared, so that a command is short and the same whatever the
  trial: `launch.train --workdir=RUN`.

  root: absolute path of the sweep folder.
  options: of the commands.
  compilation_cache: folder of compiled programs; empty for none.
  """

  needs_folders: ClassVar = True
  outcome: ClassVar = "printed"

  root: Path
  options: Options
  compilation_cache: str = ""

  def check(self, todo: list[Trial]) -> None:
    options = self.options
    if options.processes > 1:
      if not re.fullmatch(r"\S+:\S+", options.coordinator or ""):
        raise ConfigError(
          "--print.coordinator must be HOST:PORT where --print.processes is more than "
          f"1, got {options.coordinator!r}."
        )
    if options.devices:
      trials.check_devices(
        todo,
        options.processes * options.devices,
        f"--print.processes={options.processes} times "
        f"--print.devices={options.devices}",
      )

  def preview(self, todo: list[Trial]) -> str:
    self.check(todo)
    return "\n".join(line for trial in todo for line in self._lines(trial))

  def submit(self, choice: Choice) -> int:
    print(self.preview(choice.todo))
    return 0

  @staticmethod
  def jobs(records: dict[str, Record]) -> dict[str, Job]:
    return {}

  @staticmethod
  def cancel(records: dict[str, Record]) -> str:
    return "print: these jobs are not known here"

  def _lines(self, trial: Trial) -> list[str]:
    workdir = self.root / trial.workdir.name
    command = shlex.join([
      sys.executable, "-m", "launch.train", f"--workdir={workdir}",
      f"--compilation_cache={self.compilation_cache}",
    ])
    number = self.options.processes
    if number == 1:
      return [command]
    # Not quoted: a scheduler may fill in the host.
    group = f"{COORDINATOR}={self.options.coordinator} {NUM_PROCESSES}={number}"
    return [f"{group} {PROCESS_ID}={i} {command}" for i in range(number)]
