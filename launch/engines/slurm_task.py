"""The start of a task of a Slurm job: submitit calls `start` in every task of the step.

Imports nothing of JAX: it takes seconds, and the task becomes another program.
"""

import os
import signal
import sys
from pathlib import Path


def start(workdir: str, command: list[str]) -> None:
  """Becomes the training command, which prints to `log.txt` of the run folder."""
  folder, rank = Path(workdir), os.environ["SLURM_PROCID"]
  if not (folder / "config.json").is_file():
    host = os.environ.get("SLURMD_NODENAME", "this host")
    print(
      f"error: --workdir must be a folder that all hosts see: {host} does not see "
      f"{folder}/config.json.",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)
  log = folder / ("log.txt" if rank == "0" else f"log.{rank}.txt")
  descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
  sys.stdout.flush()
  sys.stderr.flush()
  os.dup2(descriptor, 1)
  os.dup2(descriptor, 2)
  # Until training has a handler a warning would end it, and look like a fault. scancel
  # and time limits end the job in any case.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  os.execv(command[0], command)
