"""The start of a task of a Slurm job: submitit calls `start` in every task of the step.

Imports nothing of JAX: it takes seconds, and the task becomes another program.
"""

import os
import signal
import sys
from pathlib import Path


def start(workdir: str, command: list[str], *, config: str, log: str) -> None:
  """Becomes the training command, which prints to a log in the run folder.

  Args:
    workdir: the run folder, with the file named `config`.
    command: of training.
    config, log: names of files; `run_folder` has them, and would import NumPy.
  """
  folder, rank = Path(workdir), os.environ["SLURM_PROCID"]
  if not (folder / config).is_file():
    host = os.environ.get("SLURMD_NODENAME", "this host")
    print(
      f"error: --workdir must be a folder that all hosts see: {host} does not see "
      f"{folder / config}.",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)
  file = folder / log
  if rank != "0":
    file = file.with_suffix(f".{rank}{file.suffix}")
  descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
  sys.stdout.flush()
  sys.stderr.flush()
  os.dup2(descriptor, 1)
  os.dup2(descriptor, 2)
  # Until training has a handler a warning would end it, and look like a fault. scancel
  # and time limits end the job in any case.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  os.execv(command[0], command)
