"""The end of a step of a Slurm job: the batch shell runs this module as a command.

Exit code 0 asks the shell to requeue the job. A step that yielded is requeued without
this command, because that must not take long. `launch.engines.slurm` writes the script.
"""

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, JobPaths

from launch import exits, results_csv, status
from mtp_jax import run_folder

AGAIN = 0  # Exit code of the command: requeue.
_TAIL_BYTES = 1 << 16
_ERROR = re.compile(r"(?i:error|fatal)\b|[\w.]*(?:Error|Exception)\b")


def main() -> int:
  folder, code, began, max_attempts = sys.argv[1:]
  paths = JobPaths(folder, job_id=exits.job_id())
  workdir = Path(DelayedSubmission.load(paths.submitted_pickle).args[0])
  again = conclude(
    workdir, int(code), float(began), int(max_attempts), [paths.stderr, paths.stdout]
  )
  results_csv.collect(workdir.parent)
  return AGAIN if again else 1


def conclude(
  workdir: Path, code: int, began: float, max_attempts: int, logs: list[Path]
) -> bool:
  """Notes how a step ended; returns whether it is worth another attempt.

  Args:
    workdir: the run folder.
    code: what `srun` returned.
    began: when this attempt began, seconds of the epoch.
    max_attempts: of one job, how often it may end for no fault of the trial.
    logs: where the tasks wrote before training did.
  """
  said = status.read(workdir)
  ended_now = said.get("state") == "ended" and said["time"] >= began
  # srun may report how the other processes were ended, not why.
  if ended_now and said["exit_class"] not in ("done", "yielded"):
    exit_class, reason = said["exit_class"], said["reason"]
  elif code == exits.DONE:
    return False
  else:
    exit_class = exits.classify(code, yielded=False)
    logs = [*run_folder.logs(workdir), *logs]
    reason = _explain(code, [path for path in logs if _is_new(path, began)])
    status.left_behind(workdir, exit_class, reason)
  attempts = workdir / run_folder.ATTEMPTS
  attempt: dict[str, Any] = {
    "time": time.time(),
    "job_id": exits.job_id(),
    "code": code,
    "exit_class": exit_class,
    "reason": reason,
  }
  with attempts.open("a") as file:
    file.write(json.dumps(attempt) + "\n")
  if not exits.is_retried(exit_class):
    return False
  made = [json.loads(line) for line in attempts.read_text().splitlines()]
  of_this_job = [x for x in made if x["job_id"] == attempt["job_id"]]
  return sum(exits.is_retried(x["exit_class"]) for x in of_this_job) < max_attempts


def _is_new(path: Path, began: float) -> bool:
  return path.exists() and path.stat().st_mtime >= began - 1


def _explain(code: int, logs: list[Path]) -> str:
  """Returns one line: how it ended, and what its logs say of errors."""
  text = f"ended with exit code {code}"
  if 128 < code < 128 + signal.NSIG:
    hint = ", out of memory perhaps" if code == 128 + signal.SIGKILL else ""
    text += f" ({signal.Signals(code - 128).name}{hint})"
  for path in logs:
    if line := last_error(path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")):
      return f"{text}: {line}"
  return text


def last_error(text: str) -> str | None:
  """Returns the last line of a log that names an error, None if none does."""
  for line in reversed(text.splitlines()):
    if _ERROR.match(line.strip()):
      return line.strip()
  return None


if __name__ == "__main__":
  sys.exit(main())
