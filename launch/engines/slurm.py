"""The engine of Slurm: submitit writes and submits, the queue trains.

Trials of one shape become one job array. Every task of the array is a job of
`nodes * tasks` processes of `launch.train`, which find each other through Slurm's
variables. What is known of a trial lies in its run folder; the queue is only asked who
waits and who runs, with or without accounting.

A job that is preempted, or about to reach its time limit, gets SIGTERM in its step. It
saves, writes the file of MTP_JAX_YIELD and leaves with 0, and the batch shell requeues
the job. The shell decides because only it can tell a warning from an end: scancel, and
Slurm where it requeues by itself, signal the shell too, and then nothing is requeued
here, so that what was cancelled stays cancelled.

submitit's own way, a signal handler in rank 0, cannot make several processes stop at
one step, so it is left waiting for USR2, which nobody sends.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from launch import engines, trials
from launch.engines import Job, Record, slurm_job
from launch.engines.options import option
from launch.exits import YIELD, YIELDED
from launch.huge_pages import HUGE_PAGES
from launch.trials import Trial
from mtp_jax.config import ConfigError

_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
_FOLDER = "slurm"
# Slurm's own default. Indices must stay below it.
_MAX_ARRAY_SIZE = 1001
# What lies in memory, or in a container, is of this host alone.
_OF_ONE_HOST = ("tmpfs", "ramfs", "overlayfs", "aufs", "squashfs")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_GPUS = re.compile(r"(?:[\w.+-]*[A-Za-z][\w.+-]*:)?(\d+)")  # 4, or a100:4
# Options of sbatch that --slurm.sbatch may not set, and what sets each of them. sbatch
# takes the last of two values without a word, and some options replace others.
_OWNED = {
  "account": "--slurm.account",
  "constraint": "--slurm.constraint",
  "cpus-per-gpu": "--slurm.cpus",
  "cpus-per-task": "--slurm.cpus",
  "exclude": "--slurm.exclude",
  "gpus": "--slurm.gpus",
  "gpus-per-node": "--slurm.gpus",
  "gpus-per-socket": "--slurm.gpus",
  "gpus-per-task": "--slurm.gpus",
  "mem": "--slurm.memory",
  "mem-per-cpu": "--slurm.memory",
  "mem-per-gpu": "--slurm.memory",
  "nodes": "--slurm.nodes",
  "ntasks": "--slurm.nodes and --slurm.tasks",
  "ntasks-per-core": "--slurm.tasks",
  "ntasks-per-gpu": "--slurm.tasks",
  "ntasks-per-node": "--slurm.tasks",
  "ntasks-per-socket": "--slurm.tasks",
  "partition": "--slurm.partition",
  "qos": "--slurm.qos",
  "signal": "--slurm.grace",
  "time": "--slurm.time",
  "tres-per-task": "--slurm.gpus and --slurm.cpus",
} | dict.fromkeys(
  (
    "array", "chdir", "dependency", "error", "job-name", "no-requeue", "open-mode",
    "output", "parsable", "quiet", "requeue", "test-only", "wait", "wrap",
  ),
  "the sweep itself",
)
_SHORT = {
  "A": "account", "C": "constraint", "D": "chdir", "G": "gpus", "J": "job-name",
  "N": "nodes", "Q": "quiet", "W": "wait", "a": "array", "c": "cpus-per-task",
  "d": "dependency", "e": "error", "n": "ntasks", "o": "output", "p": "partition",
  "q": "qos", "t": "time", "x": "exclude",
}
# As sbatch reads options from the environment, where not SBATCH_ and the name.
_VARIABLES = {
  "array": "SBATCH_ARRAY_INX", "mem": "SBATCH_MEM_PER_NODE", "time": "SBATCH_TIMELIMIT"
}
_STATES = {
  "queued": (
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD",
    "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED",
  ),
  "running": ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"),
  "cancelled": ("CANCELLED", "REVOKED"),
  # All others: COMPLETED, FAILED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, PREEMPTED, ...
}


@dataclasses.dataclass(frozen=True)
class Options:
  """The `--slurm.*` flags."""

  partition: str | None = option(None, "partition of the jobs; the cluster's default")
  account: str | None = option(None, "account that pays")
  qos: str | None = option(None, "quality of service")
  constraint: str | None = option(None, "features that nodes must have, as for sbatch")
  exclude: str | None = option(None, "nodes that are not to be used")
  time: str = option(
    "4:00:00",
    "limit of a job: minutes, H:MM:SS or D-HH:MM:SS; longer trials go on in a new turn",
  )
  nodes: int = option(1, "nodes of a trial")
  gpus: int | str = option(
    "0",
    "GPUs of each node, of one type perhaps (a100:4); 0 trains on CPU cores, a device "
    "a process",
  )
  tasks: int = option(1, "processes on each node, which share its GPUs evenly")
  cpus: int = option(0, "CPU cores of each process; 0 leaves it to the cluster")
  memory: str | None = option(None, "memory of each node (64G)")
  grace: int = option(
    180, "seconds before the time limit at which a trial is told to save"
  )
  setup: str | None = option(
    None, "shell commands before training ('module load cuda; source env/bin/activate')"
  )
  sbatch: str | None = option(
    None, "more options of sbatch, KEY=VALUE separated by blanks (reservation=x)"
  )

  @property
  def num_devices(self) -> int:
    return self.nodes * (self.num_gpus or self.tasks)

  @property
  def num_gpus(self) -> int:
    """Of `gpus`, the number."""
    found = _GPUS.fullmatch(str(self.gpus))
    if not found:
      raise ConfigError(
        f"--slurm.gpus must be NUMBER or TYPE:NUMBER (a100:4), got {self.gpus!r}."
      )
    return int(found[1])

  @property
  def minutes(self) -> int:
    """Of `time`, rounded up; Slurm's formats."""
    found = _TIME.fullmatch(self.time)
    if not found:
      raise ConfigError(
        f"--slurm.time must be minutes, H:MM:SS or D-HH:MM:SS, got {self.time!r}."
      )
    days, *parts = found.groups()
    given = [int(part) for part in parts if part is not None]
    if days is not None:
      hours, minutes, seconds = [*given, 0, 0][:3]
    elif len(given) == 3:
      hours, minutes, seconds = given
    else:
      hours, minutes, seconds = 0, *[*given, 0][:2]
    total = int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)
    if not total:
      raise ConfigError(f"--slurm.time must be more than 0, got {self.time!r}.")
    return total

  def check(self) -> None:
    """Raises ConfigError if a flag cannot be meant."""
    lowest = {"nodes": 1, "tasks": 1, "cpus": 0, "grace": 1}
    for name, least in lowest.items():
      if getattr(self, name) < least:
        raise ConfigError(
          f"--slurm.{name} must be at least {least}, got {getattr(self, name)}."
        )
    if self.num_gpus % self.tasks:
      raise ConfigError(
        f"--slurm.gpus must be a multiple of --slurm.tasks ({self.tasks}), got "
        f"{self.gpus}."
      )
    if self.minutes * 60 <= self.grace:
      raise ConfigError(
        f"--slurm.time must be longer than --slurm.grace ({self.grace} s), got "
        f"{self.time!r}."
      )
    self.more()

  def more(self) -> dict[str, Any]:
    """Returns `sbatch` by key; a key alone is a switch.

    Raises:
      ConfigError: not KEY=VALUE, a key twice, or one that a flag or the sweep sets.
    """
    found: dict[str, Any] = {}
    try:
      words = shlex.split(self.sbatch or "")
    except ValueError as error:
      raise ConfigError(
        f"--slurm.sbatch must be KEY=VALUE ..., got {self.sbatch!r} ({error})."
      ) from error
    for word in words:
      key, equals, value = word.lstrip("-").partition("=")
      if word.startswith("-") and not word.startswith("--"):
        key = key[:1]  # `-t60`
      elif len(key) > 1:
        key = key.replace("_", "-")
      if owner := _owner(key, value):
        raise ConfigError(
          f"--slurm.sbatch must not set {_SHORT.get(key, key)}, which {owner} sets, "
          f"got {word!r}."
        )
      if not re.fullmatch(r"[a-z][a-z0-9-]+", key):
        raise ConfigError(
          f"--slurm.sbatch must be KEY=VALUE ... of long options, got {word!r}."
        )
      if key in found:
        raise ConfigError(f"--slurm.sbatch must set {key} once, got {self.sbatch!r}.")
      found[key] = value if equals else True
    return found


def _owner(key: str, value: str) -> str | None:
  """Returns what sets an option of sbatch, None if it is free.

  sbatch also takes the beginning of a name for the whole (`--part`).
  """
  name = _SHORT.get(key, key)
  if len(name) > 1 and "gres".startswith(name):
    # Free but for GPUs; newer versions put `gres` before each.
    names_gpus = re.search(r"(?:^|,)(?:gres[:/])?gpu(?:[:=,]|$)", value)
    return _OWNED["gpus"] if names_gpus else None
  if name in _OWNED:
    return _OWNED[name]
  whole = [x for x in _OWNED if len(name) > 1 and x.startswith(name)]
  return _OWNED[whole[0]] if whole else None


@dataclasses.dataclass(frozen=True)
class Array:
  """Trials that are submitted together.

  parallel: how many of them may run at once.
  after: place in the list of the array that has to end before; None: at once.
  """

  trials: list[Trial]
  parallel: int
  after: int | None = None


def arrays(
  planned: list[Trial], max_size: int, max_parallel: int | None
) -> list[Array]:
  """Returns an array for every shape, or several where one would be too long.

  Together they run at most `max_parallel` trials at once. Each has its part of that; if
  there are more arrays than that, some begin when others have ended.
  """
  shapes: dict[Any, list[Trial]] = {}
  for trial in planned:
    shapes.setdefault(trial.shape, []).append(trial)
  groups = [
    group[i : i + max_size]
    for group in shapes.values()
    for i in range(0, len(group), max_size)
  ]
  groups.sort(key=lambda group: -sum(trial.flops for trial in group))
  if max_parallel is None:
    return [Array(group, len(group)) for group in groups]
  if len(groups) > max_parallel:
    return [
      Array(group, 1, i - max_parallel if i >= max_parallel else None)
      for i, group in enumerate(groups)
    ]
  parts = [1] * len(groups)
  for _ in range(max_parallel - len(groups)):
    # The next place goes where a place has the most trials to do.
    i = max(range(len(groups)), key=lambda i: len(groups[i]) / parts[i])
    parts[i] += 1
  return [
    Array(group, min(part, len(group)))
    for group, part in zip(groups, parts, strict=True)
  ]


def _check_environment(script: str) -> None:
  """Refuses variables that win over what a script sets: sbatch does not say so."""
  in_script = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
  owners = {_OWNED[name] for name in in_script if name in _OWNED}
  for name, owner in _OWNED.items():
    variable = _VARIABLES.get(name, f"SBATCH_{name.upper().replace('-', '_')}")
    if owner in owners and variable in os.environ:
      raise ConfigError(
        f"{variable} must not be set in the environment: sbatch takes it instead of "
        f"what {owner} sets, got {os.environ[variable]!r}."
      )


class _Executor(SlurmExecutor):
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


class Slurm:
  """Job arrays; see `Engine`.

  Args:
    root: the sweep folder, which all nodes see.
    options: of the jobs.
    compilation_cache: folder of compiled programs; empty for none.
    max_parallel: trials that run at once; None for as many as the queue lets run.
    max_attempts: how often a job may end for no fault of its trial.
  """

  needs_folders = True
  outcome = "given to slurm"

  def __init__(
    self,
    root: Path = Path(),
    options: Options | None = None,
    compilation_cache: str = "",
    max_parallel: int | None = None,
    max_attempts: int = 1,
  ):
    self._root = Path(root).absolute()
    self._options = options or Options()
    self._compilation_cache = compilation_cache
    self._max_parallel = max_parallel
    self._max_attempts = max_attempts

  def check(self, planned: list[Trial]) -> None:
    options = self._options
    options.check()
    trials.check_devices(
      planned,
      options.num_devices,
      f"--slurm.nodes={options.nodes} times --slurm.gpus={options.gpus}"
      if options.num_gpus
      else f"--slurm.nodes={options.nodes} times --slurm.tasks={options.tasks}",
    )
    if missing := [name for name in _COMMANDS if shutil.which(name) is None]:
      raise ConfigError(
        f"--on=slurm needs {', '.join(_COMMANDS)} on the PATH of this host; there is "
        f"no {', '.join(missing)}."
      )
    self._check_shared()
    if planned:
      self._check_script(planned)

  def preview(self, planned: list[Trial]) -> str:
    self._options.check()
    texts = []
    for array in arrays(planned, _MAX_ARRAY_SIZE - 1, self._max_parallel):
      names = "\n".join(f"#   {trial.name}" for trial in array.trials)
      executor = self._executor(array, None if array.after is None else "JOB")
      script = executor.script(len(array.trials))
      texts.append(f"# Trials of this script:\n{names}\n{script}")
    return "\n\n".join(texts)

  def submit(self, planned: list[Trial]) -> int:
    ids: list[str] = []
    for array in arrays(planned, self._max_array_size(), self._max_parallel):
      after = None if array.after is None else ids[array.after]
      executor = self._executor(array, after)
      workdirs = [str(trial.workdir.absolute()) for trial in array.trials]
      try:
        jobs = executor.map_array(
          slurm_job.start, workdirs, [self._command(workdir) for workdir in workdirs]
        )
      except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refused: {_summary(str(error))}") from error
      for trial, job in zip(array.trials, jobs, strict=True):
        engines.write_record(trial.workdir, "slurm", id=job.job_id)
      ids.append(jobs[0].job_id.partition("_")[0])
      print(
        f"job {ids[-1]}: {len(array.trials)} trial(s) of one shape, at most "
        f"{array.parallel} at once" + (f", after job {after}" if after else ""),
        flush=True,
      )
    return 0

  def jobs(self, records: dict[str, Record]) -> dict[str, Job]:
    found = query([record["id"] for record in records.values()])
    jobs = {}
    for name, record in records.items():
      job = found.get(record["id"], Job("unknown", record["id"]))
      # The queue forgets; what was cancelled here was noted.
      if job.state == "unknown" and "cancelled" in record:
        job = dataclasses.replace(job, state="cancelled")
      jobs[name] = job
    return jobs

  def cancel(self, records: dict[str, Record]) -> str:
    jobs = self.jobs(records)
    busy = [name for name, job in jobs.items() if job.state in ("queued", "running")]
    if busy:
      _run(["scancel", *(records[name]["id"] for name in busy)])
    for name in busy:
      record = dict(records[name])
      workdir, facts = Path(record.pop("workdir")), record | {"cancelled": True}
      engines.write_record(workdir, facts.pop("engine"), **facts)
    return f"slurm: cancelled {len(busy)} trial(s)"

  def _command(self, workdir: str) -> list[str]:
    return [
      sys.executable, "-u", "-m", "launch.train", f"--workdir={workdir}",
      f"--compilation_cache={self._compilation_cache}",
    ]

  def _executor(self, array: Array, after: str | None) -> _Executor:
    options, folder = self._options, self._root / _FOLDER
    executor = _Executor(folder)
    executor.update_parameters(
      job_name=self._root.name,
      partition=options.partition,
      account=options.account,
      qos=options.qos,
      constraint=options.constraint,
      exclude=options.exclude,
      time=options.minutes,
      nodes=options.nodes,
      ntasks_per_node=options.tasks,
      gpus_per_node=options.gpus if options.num_gpus else None,
      cpus_per_task=options.cpus or None,
      mem=options.memory,
      wckey=None,  # Clusters that do not use them refuse jobs that have one.
      dependency=f"afterany:{after}" if after else None,
      array_parallelism=array.parallel,
      srun_args=["--kill-on-bad-exit=1"],
      setup=self._setup(),
      teardown=self._teardown(),
      additional_parameters={
        "requeue": True, "signal": f"TERM@{options.grace}", **options.more()
      },
    )
    return executor

  def _setup(self) -> list[str]:
    marker = f"{shlex.quote(str(self._root / _FOLDER))}/yield.$JOB"
    name, value = HUGE_PAGES
    lines = [
      "# Not SLURM_JOB_ID: one task of an array has that of the whole array.",
      "JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
      "JOB=${JOB:-$SLURM_JOB_ID}",
      f"export {YIELD}={marker}.${{SLURM_RESTART_COUNT:-0}}",
      "export SUBMITIT_PREEMPT_SIGNAL=USR2",
      f"export {name}=${{{name}-{value}}}",
    ]
    if self._options.setup:
      lines.append(self._options.setup)
    # The shell answers a signal when the step has ended.
    return [*lines, "BEGAN=$(date +%s)", "STOP=0", "trap 'STOP=1' TERM"]

  def _teardown(self) -> list[str]:
    conclude = shlex.join([sys.executable, "-m", "launch.engines.slurm_job"])
    folder = shlex.quote(str(self._root / _FOLDER))
    return [
      "CODE=$?",
      "# A signal to this shell means scancel, or that Slurm requeues by itself.",
      'if [ "$STOP" = 1 ]; then exit "$CODE"; fi',
      f'if [ -e "${YIELD}" ]; then',
      f'  rm -f "${YIELD}"',
      f"  AGAIN=1 CODE={YIELDED}",
      f'elif {conclude} {folder} "$CODE" "$BEGAN" {self._max_attempts}; then',
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

  def _check_shared(self) -> None:
    """Refuses a sweep folder that other hosts can hardly see.

    Whether they do, only they know, and a job that asked would wait in the queue. So:
    where the cluster is this host alone, anything goes. Else the file system must not
    be one that lives in memory or in a container. A local disk may be exported to the
    nodes; every task looks for its run folder before it trains, and says so if there
    is none.
    """
    nodes = _run(["scontrol", "show", "node", "-o"])
    hosts = set(re.findall(r"\bNodeHostName=(\S+)", nodes))
    if hosts <= {socket.gethostname(), socket.gethostname().partition(".")[0]}:
      return
    path = next(path for path in (self._root, *self._root.parents) if path.exists())
    kind = _run(["stat", "--file-system", "--format=%T", str(path)]).strip()
    if kind in _OF_ONE_HOST:
      raise ConfigError(
        f"--workdir must be in a folder that all hosts see, got {str(self._root)!r}: a "
        f"file system of this host alone ({kind}), and the cluster has other hosts "
        f"({', '.join(sorted(hosts)[:3])}{', ...' if len(hosts) > 3 else ''})."
      )

  def _check_script(self, planned: list[Trial]) -> None:
    """Lets sbatch judge partition, account and size without submitting."""
    array = arrays(planned, self._max_array_size(), None)[0]
    text = self._executor(array, None).script(len(array.trials))
    _check_environment(text)
    result = subprocess.run(
      ["sbatch", "--test-only"], input=text, capture_output=True, text=True
    )
    if result.returncode:
      raise ConfigError(f"sbatch refused: {_summary(result.stderr)}")

  def _max_array_size(self) -> int:
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]))
    return max((int(found[1]) if found else _MAX_ARRAY_SIZE) - 1, 1)


def query(ids: Iterable[str]) -> dict[str, Job]:
  """Returns the jobs that Slurm knows of, by id (`12`, or `12_3` in an array).

  squeue knows those that wait and run, and for some minutes those that have ended;
  scontrol why; sacct, where there is accounting, the older ones.
  """
  ids = set(ids)
  if not ids:
    return {}
  found = parse_squeue(
    _try(
      "squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r",
      f"--jobs={','.join(sorted(_bases(ids)))}",
    )
  )
  found = {id: job for id, job in found.items() if id in ids}
  if missing := ids - found.keys():
    older = parse_sacct(
      _try(
        "sacct", "--noheader", "--parsable2", "--allocations",
        "--format=JobID,State,NodeList,ExitCode",
        f"--jobs={','.join(sorted(_bases(missing)))}",
      )
    )
    found |= {id: job for id, job in older.items() if id in missing}
  ended = {id for id, job in found.items() if job.state == "ended"}
  for base in _bases(ended):
    details = parse_scontrol(_try("scontrol", "show", "job", "-o", base))
    found |= {id: job for id, job in details.items() if id in ended}
  return found


def parse_squeue(text: str) -> dict[str, Job]:
  """Reads lines of `ID|STATE|NODES|REASON`."""
  jobs = {}
  for line in text.splitlines():
    if line.count("|") == 3:
      id, state, nodes, reason = line.strip().split("|")
      jobs[id] = _job(id, state, nodes, "" if reason == "None" else reason)
  return jobs


def parse_sacct(text: str) -> dict[str, Job]:
  """Reads lines of `ID|STATE|NODES|CODE:SIGNAL`; arrays that wait are left out."""
  jobs = {}
  for line in text.splitlines():
    if line.count("|") == 3:
      id, state, nodes, code = line.strip().split("|")
      jobs[id] = _job(id, state, nodes, _exit(code))
  return jobs


def parse_scontrol(text: str) -> dict[str, Job]:
  """Reads `scontrol show job -o`, a line a job."""
  jobs = {}
  for line in text.splitlines():
    facts = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
    if "JobState" not in facts:
      continue
    id = facts["JobId"]
    if "ArrayJobId" in facts:
      id = f"{facts['ArrayJobId']}_{facts.get('ArrayTaskId', '')}"
    nodes = facts.get("NodeList", "")
    reasons = [facts.get("Reason", "None"), _exit(facts.get("ExitCode", ""))]
    reason = ", ".join(r for r in reasons if r and r not in ("None", "NonZeroExitCode"))
    jobs[id] = _job(id, facts["JobState"], nodes, reason)
  return jobs


def _job(id: str, state: str, nodes: str, reason: str) -> Job:
  name = state.split()[0].rstrip("+")  # `CANCELLED by 1000`, `CANCELLED+`
  for kind, names in _STATES.items():
    if name in names:
      return Job(kind, id, _host(nodes), reason)
  if name == "COMPLETED":
    return Job("ended", id, _host(nodes))
  reason = ", ".join(filter(None, (f"Slurm says {name}", reason)))
  return Job("ended", id, _host(nodes), reason)


def _host(nodes: str) -> str:
  return "" if nodes.startswith(("(", "None")) else nodes


def _exit(code: str) -> str:
  """Reads `CODE:SIGNAL`."""
  number, _, signum = code.partition(":")
  if signum not in ("", "0"):
    return f"signal {signum}"
  return "" if number in ("", "0") else f"exit code {number}"


def _bases(ids: Iterable[str]) -> set[str]:
  """Returns the arrays: asked for one by one they would be many."""
  return {id.partition("_")[0] for id in ids}


def _run(command: list[str]) -> str:
  """Returns what a command prints.

  Raises:
    ConfigError: it fails.
  """
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
  except FileNotFoundError as error:
    raise ConfigError(f"{command[0]} is not on the PATH of this host.") from error
  except subprocess.CalledProcessError as error:
    raise ConfigError(f"{command[0]} failed: {_summary(error.stderr)}") from error


def _try(*command: str) -> str:
  """Returns what a command prints, '' if it fails: unknown jobs, no accounting."""
  with contextlib.suppress(ConfigError):
    return _run(list(command))
  return ""


def _summary(text: str) -> str:
  """Returns what sbatch says, without what it adds."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  errors = [line for line in lines if "error" in line.lower()]
  return "; ".join(errors[:3] or lines[:3]) or "without a word"
