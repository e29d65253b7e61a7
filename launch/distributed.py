"""The processes that train one model together: how they start, hold a folder and end.

Every process runs the same command and reads its number from the environment: a Slurm
step and Open MPI set variables, a TPU pod has metadata; elsewhere
`--distributed=HOST:PORT,NUM_PROCESSES,PROCESS_ID`, or MTP_JAX_COORDINATOR (HOST:PORT of
process 0), MTP_JAX_NUM_PROCESSES and MTP_JAX_PROCESS_ID. With none of these a process
is alone, and `jax.distributed` is not started.

What fails in one process must end all of them: JAX gives up those that send no
heartbeat, and ends the others from C++, where nothing can be caught. So whatever is to
be known of such an end is written before (`launch.status`).
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from mtp_jax import run_folder
from mtp_jax.config import ConfigError

# Flags that are defined here belong to the command that asked for them, in its --help.
flags.disclaim_key_flags()

# Of JAX, which has no environment variables for the other two.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = (
  "MTP_JAX_COORDINATOR", "MTP_JAX_NUM_PROCESSES", "MTP_JAX_PROCESS_ID"
)
_SLURM_STEP = (
  "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"
)
_DEVICE_IDS = "JAX_LOCAL_DEVICE_IDS"
_FIRST_PORT, _NUM_PORTS = 61440, 4096  # Above those that Linux gives to clients.
_SHUTDOWN_SECONDS = 60
_MOST_SECONDS = 7 * 86400
_LOOK_SECONDS = 5.0
# Process 0 serves the others. When it goes they are cut off, amid their last words too.
_LAST_WORDS_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Group:
  """The processes of a job, as a member process sees them.

  coordinator: HOST:PORT that process 0 listens on.
  device_ids: which of the visible accelerators are this process's; None is all of them.
  method: how JAX is to find what is None here.
  """

  coordinator: str | None
  num_processes: int | None
  process_id: int | None
  device_ids: tuple[int, ...] | None = None
  method: str | None = "deactivate"


def define_flags() -> dict[str, flags.FlagHolder[Any]]:
  """Defines and returns what a command needs that several processes may run together.
  """
  holders = (
    flags.DEFINE_string(
      "distributed", "auto",
      "which processes train together. auto: those of a Slurm step, Open MPI or a TPU "
      f"pod, or as {COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID} tell; "
      "else one alone. off: one alone. HOST:PORT,NUM_PROCESSES,PROCESS_ID: so "
      "many, process 0 at that address.",
    ),
    flags.DEFINE_list(
      "local_device_ids",
      None,
      "which of the visible accelerators this process takes, as numbers from 0; by "
      "default its share of them",
    ),
    flags.DEFINE_integer(
      "start_seconds", 300, "how long processes wait for each other to start",
      lower_bound=1, upper_bound=_MOST_SECONDS,
    ),
    flags.DEFINE_integer(
      "heartbeat_seconds",
      10,
      "a process from which nothing is heard for so long is given up, and all with it",
      lower_bound=1, upper_bound=_MOST_SECONDS,
    ),
    flags.DEFINE_integer(
      "stall_seconds",
      600,
      "several processes end if no step ends for so long, and for ten times the "
      "slowest step so far, outside of compilation and evaluation; 0: never",
      lower_bound=0, upper_bound=_MOST_SECONDS,
    ),
  )
  return {holder.name: holder for holder in holders}


def find_group(
  how: str, device_ids: list[str] | None, environ: Mapping[str, str] = os.environ
) -> Group | None:
  """Returns the group this process belongs to; None where it is alone.

  Args:
    how, device_ids: `--distributed` and `--local_device_ids`.
    environ: the environment.

  Raises:
    ConfigError: names the flag or variable, the rule and the value.
  """
  given = _device_ids(device_ids)
  if given is not None:  # Then GPUs are not shared here.
    environ = {**environ, _DEVICE_IDS: ""}
  if how == "auto":
    group = _detect(environ)
  elif how == "off":
    group = None
  else:
    parts = how.split(",")
    if len(parts) != 3:
      raise ConfigError(
        "--distributed must be auto, off or HOST:PORT,NUM_PROCESSES,PROCESS_ID, got "
        f"{how!r}."
      )
    group = _explicit(*parts, ("--distributed",) * 3)
  if given is None:
    return group
  if group is None:
    raise ConfigError(
      "--local_device_ids is for several processes, and this one is alone; use "
      "CUDA_VISIBLE_DEVICES."
    )
  return dataclasses.replace(group, device_ids=given)


def _detect(environ: Mapping[str, str]) -> Group | None:
  """Returns the group that variables of an engine, a scheduler or a TPU pod name."""
  names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
  if found := [name for name in names if name in environ]:
    if missing := sorted(set(names) - set(found)):
      raise ConfigError(
        f"{', '.join(missing)} must be set where {', '.join(found)} is."
      )
    return _explicit(*(environ[name] for name in names), names)
  if all(name in environ for name in _SLURM_STEP):
    return _slurm(environ) if environ["SLURM_NTASKS"] != "1" else None
  if "OMPI_MCA_orte_hnp_uri" in environ:
    if environ["OMPI_COMM_WORLD_SIZE"] == "1":
      return None
    here = (
      int(environ[f"OMPI_COMM_WORLD_LOCAL_{name}"]) for name in ("SIZE", "RANK")
    )
    return Group(None, None, None, _own_gpus(environ, *here), "ompi")
  if _is_in_tpu_pod(environ):
    return Group(None, None, None, method=None)
  return None


def _device_ids(texts: list[str] | None) -> tuple[int, ...] | None:
  if texts is None:
    return None
  if not texts or not all(text.isdecimal() for text in texts):
    raise ConfigError(
      f"--local_device_ids must be numbers from 0, got {','.join(texts)!r}."
    )
  return tuple(map(int, texts))


def _explicit(
  coordinator: str, num_processes: str, process_id: str, names: tuple[str, ...]
) -> Group | None:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ConfigError(f"{names[0]} must have HOST:PORT, got {coordinator!r}.")
  if not num_processes.isdecimal() or int(num_processes) < 1:
    raise ConfigError(
      f"{names[1]} must have a number of processes from 1, got {num_processes!r}."
    )
  if not process_id.isdecimal() or int(process_id) >= int(num_processes):
    raise ConfigError(
      f"{names[2]} must have a number of this process from 0 to "
      f"{int(num_processes) - 1}, got {process_id!r}."
    )
  if num_processes == "1":
    return None
  return Group(coordinator, int(num_processes), int(process_id))


def _slurm(environ: Mapping[str, str]) -> Group:
  # The first of `n1`, `n1,n2`, `n[1-4,7]`, `n[01,05]-ib`.
  node = re.match(
    r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", environ["SLURM_STEP_NODELIST"]
  )
  # Two steps of a job at once must not meet.
  step = int(environ.get("SLURM_STEP_ID", "0")) % 2**31
  number = int(environ["SLURM_JOB_ID"]) + 1009 * step
  port = environ.get("JAX_COORDINATOR_PORT", _FIRST_PORT + number % _NUM_PORTS)
  address = f"{''.join(part or '' for part in node.groups())}:{port}"
  # `2(x3),1`: the tasks of this node, by how many nodes have so many.
  tasks = []
  for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
    number, repeat = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
    tasks += [int(number)] * int(repeat or 1)
  # `2`, or `a100:2`.
  per_task = re.search(r"(\d+)$", environ.get("SLURM_GPUS_PER_TASK", ""))
  device_ids = _own_gpus(
    environ, tasks[int(environ["SLURM_NODEID"])], int(environ["SLURM_LOCALID"]),
    int(per_task[1]) if per_task else None,
  )
  return Group(
    environ.get("JAX_COORDINATOR_ADDRESS", address), int(environ["SLURM_NTASKS"]),
    int(environ["SLURM_PROCID"]), device_ids,
  )


def _own_gpus(
  environ: Mapping[str, str], num_here: int, index_here: int, each: int | None = None
) -> tuple[int, ...] | None:
  """Returns a process's share of the GPUs; None without GPUs, or if it is set."""
  visible = environ.get("CUDA_VISIBLE_DEVICES")
  if visible is None:
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
  else:
    count = len([x for x in visible.split(",") if x and x not in ("-1", "NoDevFiles")])
  if not count or _DEVICE_IDS in environ:
    return None
  return share_of_devices(count, num_here, index_here, each)


def share_of_devices(
  num_visible: int, num_here: int, index_here: int, per_process: int | None = None
) -> tuple[int, ...]:
  """Returns which of the GPUs that it sees a process takes.

  Left to itself JAX takes the one numbered like the process, whatever is visible.

  Args:
    num_visible: GPUs that the process sees: its own, or all of the node.
    num_here, index_here: the processes of the node, and which of them this is.
    per_process: GPUs of each process, if the scheduler names their number.

  Raises:
    ConfigError: they cannot be shared evenly.
  """
  if num_here == 1 or num_visible in (1, per_process):
    return tuple(range(num_visible))
  each = per_process or num_visible // num_here
  if each * num_here > num_visible or (not per_process and num_visible % num_here):
    raise ConfigError(
      f"--local_device_ids is needed: {num_here} processes of this node see "
      f"{num_visible} GPUs, which cannot be shared evenly."
    )
  return tuple(range(index_here * each, (index_here + 1) * each))


def _is_in_tpu_pod(environ: Mapping[str, str]) -> bool:
  """Whether there are TPUs here, of several hosts perhaps: JAX asks the metadata."""
  if environ.get("JAX_PLATFORMS", "tpu").partition(",")[0] not in ("", "tpu"):
    return False
  hosts = environ.get("TPU_WORKER_HOSTNAMES")
  if hosts is not None and "," not in hosts and "MEGASCALE_NUM_SLICES" not in environ:
    return False
  devices = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*"))
  return hosts is not None or bool(devices and importlib.util.find_spec("libtpu"))


def initialize(
  group: Group | None, start_seconds: int, heartbeat_seconds: int
) -> None:
  """Joins the other processes, if there are any; no backend may have been started.

  Args:
    group: from `find_group`.
    start_seconds, heartbeat_seconds: the flags.

  Raises:
    TimeoutError: process 0 was not found in time.
    RuntimeError: JAX could not start.
  """
  if group is None:
    return
  # SIGTERM is for `fit`, which agrees with the other processes by itself.
  jax.config.update("jax_enable_preemption_service", False)
  if group.coordinator is not None:
    _wait_for_first(group, start_seconds)
  jax.distributed.initialize(
    group.coordinator,
    group.num_processes,
    group.process_id,
    None if group.device_ids is None else list(group.device_ids),
    cluster_detection_method=group.method,
    initialization_timeout=start_seconds,
    heartbeat_timeout_seconds=heartbeat_seconds,
    shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
  )


def _wait_for_first(group: Group, seconds: float) -> None:
  """Waits until process 0 can be reached: JAX would end in C++ if it cannot."""
  host, _, port = group.coordinator.rpartition(":")
  host, deadline = host.strip("[]"), time.monotonic() + seconds
  while True:
    try:
      if group.process_id == 0:
        socket.getaddrinfo(host, port)
      else:
        socket.create_connection((host, int(port)), timeout=seconds).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise TimeoutError(
          f"process {group.process_id} of {group.num_processes} could not reach "
          f"process 0 at {group.coordinator} within {seconds:.0f} s ({error})."
        ) from error
      time.sleep(0.2)


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
  """Holds the run folder as `run_folder.exclusive` does, once for all processes.

  Raises:
    ConfigError: in all of them: another job holds it, or some do not see it.
  """
  if jax.process_count() == 1:
    with run_folder.exclusive(workdir):
      yield
    return
  with contextlib.ExitStack() as stack:
    problem = None
    if jax.process_index() == 0:
      try:
        stack.enter_context(run_folder.exclusive(workdir))
      except ConfigError as error:
        problem = str(error)
    token = secrets.randbits(31)
    is_free, token = multihost_utils.broadcast_one_to_all(
      np.array([problem is None, token], np.int32)
    )
    if not is_free:
      raise ConfigError(problem or f"{workdir} is in use by another process.")
    if jax.process_index() == 0:
      (workdir / run_folder.LOCK).write_text(str(token))
    sees_P = multihost_utils.process_allgather(_sees(workdir, str(token)))
    if not sees_P.all():
      blind = ", ".join(map(str, np.flatnonzero(~sees_P)))
      raise ConfigError(
        f"--workdir must be a folder that all processes share, got {str(workdir)!r}: "
        f"process(es) {blind} do not see what process 0 wrote there."
      )
    yield


def _sees(workdir: Path, token: str) -> np.ndarray:
  """Whether the lock holds the token; network file systems take a while to show it."""
  deadline = time.monotonic() + _LOOK_SECONDS
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      if (workdir / run_folder.LOCK).read_text() == token:
        return np.bool_(True)
    time.sleep(0.1)
  return np.bool_(False)


def leave(code: int, together: bool) -> int:
  """Parts from the other processes; returns the exit code, or ends the process.

  Args:
    code: the exit code.
    together: all processes are leaving, for the same reason. Otherwise this one must
      not wait for the others: it ends at once, and they with it.
  """
  if not jax.distributed.is_initialized():
    return code
  sys.stdout.flush()
  sys.stderr.flush()
  if together:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # The exit code is settled.
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # One died on its way out.
      jax.distributed.shutdown()
    return code
  if jax.process_index() == 0:
    time.sleep(_LAST_WORDS_SECONDS)
  os._exit(code)
