"""The engine of Slurm: submitit writes and submits the script, the queue trains.

The trials of a sweep become one job array. Every task of the array is a job of
`nodes * ntasks-per-node` processes of `launch.train`, which find each other through
Slurm's variables. The run folders hold what is known of a trial; the queue is only
asked which jobs wait and which run, with or without accounting.

A job that is preempted, or about to reach its time limit, gets SIGTERM in its step. It
saves, writes the file of MTP_JAX_YIELD and leaves with 0, and the batch shell requeues
the job. The shell decides because only the shell can tell a warning from an end:
scancel, and Slurm where it requeues by itself, signal the shell too, and then nothing
is requeued here, so that what was cancelled stays cancelled.

submitit's own way, a signal handler in rank 0, cannot make several processes stop at
one step, so submitit waits for USR2, which is never sent.
"""

import dataclasses
import functools
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm as submitit_slurm

from launch import states, trials
from launch.engines import slurm_task
from launch.engines.engine import run, summary, words
from launch.engines.slurm_queue import query
from launch.exits import YIELD, YIELDED
from launch.huge_pages import HUGE_PAGES
from launch.states import Choice, Job, Record, Trial
from mtp_jax import run_folder
from mtp_jax.config import ConfigError

_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
_FOLDER = "slurm"
# Slurm's own default. Indices must stay below it.
_MAX_ARRAY_SIZE = 1001
_GPUS = re.compile(r"(?:[\w.+-]*[A-Za-z][\w.+-]*:)?(\d+)")  # 4, or a100:4
_TIME = re.compile(r"(?:(\d+)-(?=\d))?(\d+)(?::(\d+))?(?::(\d+))?")
_DEFAULTS = {
  "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "0", "time": "4:00:00"
}
# Options of sbatch that --slurm may not set, and what sets them. sbatch takes the last
# of two values and reports nothing, and some options replace others.
_OWNED = {
  **dict.fromkeys(
    ("gpus", "gpus-per-socket", "gpus-per-task", "tres-per-task"), "gpus-per-node"
  ),
  **dict.fromkeys(
    ("ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"),
    "nodes and ntasks-per-node",
  ),
  "signal": "--slurm_grace",
  **dict.fromkeys(
    (
      "array", "chdir", "dependency", "error", "job-name", "no-requeue", "open-mode",
      "output", "parsable", "quiet", "requeue", "test-only", "wait", "wrap",
    ),
    "the sweep itself",
  ),
}
# The options that submitit writes where they are set. Beginnings of all names count as
# the names to sbatch.
_WRITTEN = {
  name.replace("_", "-")
  for name in inspect.signature(submitit_slurm._make_sbatch_string).parameters
}
_NAMES = sorted({*_DEFAULTS, *_OWNED, *_WRITTEN})
# As sbatch reads options from the environment, where not SBATCH_ and the name.
_VARIABLES = {
  "array": "SBATCH_ARRAY_INX", "mem": "SBATCH_MEM_PER_NODE", "time": "SBATCH_TIMELIMIT"
}


@dataclasses.dataclass(frozen=True)
class Options:
  """What the jobs ask for; made by `parse`.

  sbatch: options of sbatch by their long names; True for a switch.
  setup:  shell commands before training.
  grace:  seconds before the time limit at which a trial saves.
  """

  sbatch: dict[str, str | bool]
  setup: str | None = None
  grace: int = 180

  @property
  def num_gpus(self) -> int:
    """GPUs of each node."""
    return int(_GPUS.fullmatch(self.sbatch["gpus-per-node"])[1])

  @property
  def num_devices(self) -> int:
    each = self.num_gpus or int(self.sbatch["ntasks-per-node"])
    return int(self.sbatch["nodes"]) * each


def parse(given: Sequence[str], setup: str | None = None, grace: int = 180) -> Options:
  """Returns the options of --slurm, which are options of sbatch: `nodes=2 exclusive`.

  Args:
    given: values of --slurm, with one option or several in each.
    setup, grace: see `Options`.

  Raises:
    ConfigError: not KEY=VALUE, a key twice, a key that the sweep sets, or a value that
      the engine cannot count devices by.
  """
  found: dict[str, str | bool] = {}
  for word in words("slurm", given):
    key, equals, value = word.removeprefix("--").partition("=")
    name = key.replace("_", "-")
    is_value = value.isprintable() and bool(value) == bool(equals)
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name) or not is_value:
      raise ConfigError(
        f"--slurm must be long options of sbatch, KEY=VALUE or KEY, got {word!r}."
      )
    _check_name(name, value, word)
    if name in found:
      raise ConfigError(f"--slurm must set {name} once, got {word!r} again.")
    found[name] = value if equals else True
  options = _DEFAULTS | found
  _check_values(options, grace)
  return Options(options, setup, grace)


def _check_values(options: dict[str, str | bool], grace: int) -> None:
  """Refuses values that the engine cannot count devices or seconds by."""
  for name in ("nodes", "ntasks-per-node"):
    if not re.fullmatch(r"[1-9]\d*", str(options[name])):
      raise ConfigError(
        f"--slurm: {name} must be a number from 1 up, got {options[name]!r}."
      )
  tasks = options["ntasks-per-node"]
  gpus = _GPUS.fullmatch(str(options["gpus-per-node"]))
  if not gpus or int(gpus[1]) % int(tasks):
    raise ConfigError(
      "--slurm: gpus-per-node must be NUMBER or TYPE:NUMBER (a100:4), a multiple of "
      f"ntasks-per-node ({tasks}), got {options['gpus-per-node']!r}."
    )
  if _seconds(str(options["time"])) <= grace:
    raise ConfigError(
      "--slurm: time must be minutes, H:MM:SS or D-HH:MM:SS, longer than --slurm_grace "
      f"({grace} s), got {options['time']!r}."
    )


def _check_name(name: str, value: str, word: str) -> None:
  """Refuses an option that something else sets, also by the beginning of its name."""
  owner = _OWNED.get(name)
  # Generic resources are free but for GPUs; newer versions put `gres` before each.
  if name == "gres" and re.search(r"(?:^|,)(?:gres[:/])?gpu(?:[:=,]|$)", value):
    owner = "gpus-per-node"
  if owner:
    raise ConfigError(f"--slurm must not set {name}, which {owner} sets, got {word!r}.")
  whole = [known for known in _NAMES if known.startswith(name)]
  if whole and name not in whole:
    raise ConfigError(
      f"--slurm must have whole names of options, {' or '.join(whole)}, got {word!r}."
    )


def _seconds(limit: str) -> float:
  """Returns a time limit of Slurm in seconds, 0 for what is none."""
  if limit.upper() in ("UNLIMITED", "INFINITE"):
    return float("inf")
  if not (found := _TIME.fullmatch(limit)):
    return 0
  days, *parts = found.groups()
  numbers = [int(part) for part in parts if part is not None]
  if days is None and len(numbers) < 3:  # M, or M:SS.
    numbers = [0, *numbers]
  hours, minutes, seconds = [*numbers, 0, 0][:3]
  return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def check_environment(script: str) -> None:
  """Refuses variables that win over what a script sets: sbatch does not tell.

  Raises:
    ConfigError: names the variable.
  """
  in_script = re.findall(r"^#SBATCH --([a-z0-9-]+)", script, re.MULTILINE)
  for name in (*in_script, *_OWNED):
    variable = _VARIABLES.get(name, f"SBATCH_{name.upper().replace('-', '_')}")
    if variable in os.environ:
      raise ConfigError(
        f"{variable} must not be set in the environment: sbatch takes it instead of "
        f"what the script has, got {os.environ[variable]!r}."
      )


class _Executor(submitit_slurm.SlurmExecutor):
  """submitit's, which also writes scripts where there is no Slurm."""

  @classmethod
  def affinity(cls) -> int:
    return 2

  def script(self, size: int) -> str:
    """Returns what would be submitted for so many trials."""
    self.parameters["map_count"] = size if size > 1 else None
    text = self._make_submission_file_text(self._submitit_command_str, "")
    del self.parameters["map_count"]
    return text


@dataclasses.dataclass(frozen=True)
class Slurm:
  """A job array, or several where one would be too long; see `Engine`.

  root: absolute path of the sweep folder, which all nodes see.
  options: of the jobs.
  compilation_cache: folder of compiled programs; empty for none.
  max_parallel: trials that run at once; None for as many as the queue lets run.
  max_attempts: how often a job may end for no fault of its trial.
  """

  needs_folders: ClassVar = True
  outcome: ClassVar = "given to slurm"

  root: Path
  options: Options
  compilation_cache: str = ""
  max_parallel: int | None = None
  max_attempts: int = 1

  def check(self, todo: list[Trial]) -> None:
    options = self.options.sbatch
    each = "gpus-per-node" if self.options.num_gpus else "ntasks-per-node"
    trials.check_devices(
      todo, self.options.num_devices,
      f"--slurm: nodes={options['nodes']} times {each}={options[each]}",
    )
    if missing := [name for name in _COMMANDS if shutil.which(name) is None]:
      raise ConfigError(
        f"--on=slurm needs {', '.join(_COMMANDS)} on the PATH of this host; there is "
        f"no {', '.join(missing)}."
      )
    if todo:
      self._check_script(self._arrays(todo, self._max_array_size())[0])

  def preview(self, todo: list[Trial]) -> str:
    texts = []
    for i, array in enumerate(self._arrays(todo, _MAX_ARRAY_SIZE - 1)):
      names = "\n".join(f"#   {trial.name}" for trial in array)
      script = self._executor(len(array), "JOB" if i else None).script(len(array))
      texts.append(f"# Trials of this script:\n{names}\n{script}")
    return "\n\n".join(texts)

  def submit(self, choice: Choice) -> int:
    start = functools.partial(
      slurm_task.start, config=run_folder.CONFIG, log=run_folder.LOG
    )
    before = None
    for array in self._arrays(choice.todo, self._max_array_size()):
      workdirs = [str(trial.workdir.absolute()) for trial in array]
      try:
        jobs = self._executor(len(array), before).map_array(
          start, workdirs, [self._command(workdir) for workdir in workdirs]
        )
      except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refused: {summary(str(error))}") from error
      for trial, job in zip(array, jobs, strict=True):
        states.write_record(trial.workdir, "slurm", id=job.job_id)
      before = jobs[0].job_id.partition("_")[0]
      print(f"job {before}: {len(array)} trial(s)", flush=True)
    return 0

  @staticmethod
  def jobs(records: dict[str, Record]) -> dict[str, Job]:
    found = query([record["id"] for record in records.values()])
    jobs = {}
    for name, record in records.items():
      job = found.get(record["id"], Job("unknown", record["id"]))
      # The queue forgets; what was cancelled here was noted.
      if job.state == "unknown" and "cancelled" in record:
        job = dataclasses.replace(job, state="cancelled")
      jobs[name] = job
    return jobs

  @staticmethod
  def cancel(records: dict[str, Record]) -> str:
    jobs = Slurm.jobs(records)
    busy = [name for name, job in jobs.items() if job.state in ("queued", "running")]
    if busy:
      run("scancel", *(records[name]["id"] for name in busy))
    for name in busy:
      record = dict(records[name])
      workdir, facts = Path(record.pop("workdir")), record | {"cancelled": True}
      states.write_record(workdir, facts.pop("engine"), **facts)
    return f"slurm: cancelled {len(busy)} trial(s)"

  def _arrays(self, todo: list[Trial], max_size: int) -> list[list[Trial]]:
    """Returns the trials, those with the most work first, cut where there are many."""
    longest = sorted(todo, key=lambda trial: -trial.flops)
    return [longest[i : i + max_size] for i in range(0, len(longest), max_size)]

  def _command(self, workdir: str) -> list[str]:
    return [
      sys.executable, "-u", "-m", "launch.train", f"--workdir={workdir}",
      f"--compilation_cache={self.compilation_cache}",
    ]

  def _executor(self, size: int, before: str | None) -> _Executor:
    """Returns what submits an array of so many trials, after the array before.

    Where --max_parallel bounds the trials at once, arrays run one after the other.
    """
    sbatch = {
      name.replace("-", "_") if name in _WRITTEN else name: value
      for name, value in self.options.sbatch.items()
      if not (name == "gpus-per-node" and not self.options.num_gpus)
    }
    waits = before is not None and self.max_parallel is not None
    executor = _Executor(self.root / _FOLDER)
    executor.update_parameters(
      job_name=self.root.name,
      wckey=None,  # Clusters that do not use them refuse jobs that have one.
      dependency=f"afterany:{before}" if waits else None,
      array_parallelism=min(size, self.max_parallel or size),
      srun_args=["--kill-on-bad-exit=1"],
      setup=self._setup(),
      teardown=self._teardown(),
      additional_parameters={
        "requeue": True, "signal": f"TERM@{self.options.grace}", **sbatch
      },
    )
    return executor

  def _setup(self) -> list[str]:
    marker = f"{shlex.quote(str(self.root / _FOLDER))}/yield.$JOB"
    name, value = HUGE_PAGES
    lines = [
      "# Not SLURM_JOB_ID: a task of an array has the id of the whole array.",
      "JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
      "JOB=${JOB:-$SLURM_JOB_ID}",
      f"export {YIELD}={marker}.${{SLURM_RESTART_COUNT:-0}}",
      "export SUBMITIT_PREEMPT_SIGNAL=USR2",
      f"export {name}=${{{name}-{value}}}",
    ]
    lines += [self.options.setup] if self.options.setup else []
    # The shell answers a signal when the step has ended.
    return [*lines, "BEGAN=$(date +%s)", "STOP=0", "trap 'STOP=1' TERM"]

  def _teardown(self) -> list[str]:
    conclude = shlex.join([sys.executable, "-m", "launch.engines.slurm_end"])
    folder = shlex.quote(str(self.root / _FOLDER))
    return [
      "CODE=$?",
      "# A signal to this shell means scancel, or that Slurm requeues by itself.",
      'if [ "$STOP" = 1 ]; then exit "$CODE"; fi',
      f'if [ -e "${YIELD}" ]; then',
      f'  rm -f "${YIELD}"',
      f"  AGAIN=1 CODE={YIELDED}",
      f'elif {conclude} {folder} "$CODE" "$BEGAN" {self.max_attempts}; then',
      "  AGAIN=1",
      "else",
      "  AGAIN=0",
      "fi",
      'STATE=$(squeue --noheader --jobs="$JOB" --format=%T)',
      'if [ "$AGAIN$STOP$STATE" = 10RUNNING ]; then',
      '  scontrol requeue "$JOB"',
      "fi",
      'exit "$CODE"',
    ]

  def _check_script(self, array: list[Trial]) -> None:
    """Lets sbatch judge partition, account and size without submitting."""
    text = self._executor(len(array), None).script(len(array))
    check_environment(text)
    result = subprocess.run(
      ["sbatch", "--test-only"], input=text, capture_output=True, text=True
    )
    if result.returncode:
      raise ConfigError(f"sbatch refused: {summary(result.stderr)}")

  def _max_array_size(self) -> int:
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", run("scontrol", "show", "config"))
    return max((int(found[1]) if found else _MAX_ARRAY_SIZE) - 1, 1)
