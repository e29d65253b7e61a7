"""How a training job ends: exit codes, and what they mean to whoever started it.

| code | class | started again? |
|---|---|---|
| 0 | done | no |
| 2 | config: bad input | no: it would end the same way |
| 3 | diverged | no |
| 75, or 0 with the file of MTP_JAX_YIELD | yielded: saved after SIGTERM | yes |
| 1, 130, 143, 134, 137, ... | infrastructure | yes, a few times |
"""

import os
import signal
from collections.abc import Iterator, Mapping

DONE = 0
FAILED = 1
BAD_INPUT = 2
DIVERGED = 3
YIELDED = 75  # EX_TEMPFAIL of sysexits.h: try again.

# Names a file. It is written, and the exit code is 0, where else it would be 75: with
# `srun --kill-on-bad-exit` the first process to leave with 75 would end the others.
YIELD = "MTP_JAX_YIELD"

_OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "out_of_memory")
# JAX adds the frames that it removed from an error as a cause without information.
_JAX_FRAMES = ("jax._src.traceback_util", "jax._src.source_info_util")
_LOWER = (
  "There is not enough memory: lower data.batch_size, raise train.accumulation_steps, "
  "set trunk.remat to 'full' or mesh.fsdp to more devices; for an evaluation lower "
  "eval.batch_size, for generated text the prompt or the number of new tokens."
)

_CLASSES = {DONE: "done", BAD_INPUT: "config", DIVERGED: "diverged", YIELDED: "yielded"}


def classify(code: int, yielded: bool) -> str:
  """Returns done, yielded, config, diverged or infrastructure.

  Args:
    code: of the job; negative for a signal, as in `subprocess`.
    yielded: the job has written its `YIELD` file.
  """
  return "yielded" if yielded else _CLASSES.get(code, "infrastructure")


def code_of(exit_class: str) -> int:
  """Returns the exit code of a class."""
  codes = {name: code for code, name in _CLASSES.items()}
  return codes.get(exit_class, FAILED)


def is_retried(exit_class: str) -> bool:
  """Returns whether the same command may do better when it is started again."""
  return exit_class in ("yielded", "infrastructure")


def job_id(environ: Mapping[str, str] = os.environ) -> str | None:
  """Returns what the scheduler calls this job, None where there is no scheduler.

  Slurm is recognised. Others may say so in MTP_JAX_JOB_ID.
  """
  if given := environ.get("MTP_JAX_JOB_ID"):
    return given
  if array := environ.get("SLURM_ARRAY_JOB_ID"):
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}"
  return environ.get("SLURM_JOB_ID")


def after_signal(signum: int, num_processes: int, process_id: int) -> int:
  """Returns the exit code of a process that has saved after a signal.

  SIGTERM means to a job that it has to yield; a lone process on a workstation tells its
  shell which signal it was. Process 0 writes the file of `YIELD`.
  """
  marker = os.environ.get(YIELD)
  is_job = num_processes > 1 or marker or job_id()
  if signum != signal.SIGTERM or not is_job:
    return 128 + signum
  if not marker:
    return YIELDED
  if process_id == 0:
    try:
      with open(marker, "w"):
        pass
    except OSError:  # A full disk: the code has to say it.
      return YIELDED
  return DONE


def describe(error: BaseException) -> str:
  """Returns type and message of an error, and of its causes, in one line.

  Notes are left out: JAX adds one about its frames to every error. Where memory ran
  out, a sentence names the keys to lower.
  """
  chain = list(_chain(error))
  text = ", caused by ".join(map(_type_and_message, chain))
  is_memory = any(
    isinstance(x, MemoryError) or any(w in str(x).lower() for w in _OUT_OF_MEMORY)
    for x in chain
  )
  return f"{text.rstrip('.')}. {_LOWER}" if is_memory else text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error, the first member of a group, and what caused them."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if type(error).__module__ not in _JAX_FRAMES:
      yield error
    members = getattr(error, "exceptions", ())
    error = members[0] if members else error.__cause__


def _type_and_message(error: BaseException) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  # A line that ends in a colon announces the next line.
  text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
