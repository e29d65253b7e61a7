"""States of Slurm jobs, from squeue and, where there is accounting, sacct."""

import contextlib
import re
from collections.abc import Iterable

from launch.engines.engine import run
from launch.states import Job
from mtp_jax.config import ConfigError

_STATES = {
  "queued": (
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD",
    "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED",
  ),
  "running": ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"),
  "cancelled": ("CANCELLED", "REVOKED"),
  # All others: COMPLETED, FAILED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, PREEMPTED, ...
}


def query(ids: Iterable[str]) -> dict[str, Job]:
  """Returns the jobs that Slurm lists, by id (`12`, or `12_3` in an array).

  squeue lists jobs that wait and run, and for some minutes jobs that have ended;
  sacct, where there is accounting, older jobs.
  """
  ids = set(ids)
  if not ids:
    return {}
  found = parse_jobs(
    _try(
      "squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r",
      f"--jobs={_bases(ids)}",
    )
  )
  if missing := ids - found.keys():
    older = parse_jobs(
      _try(
        "sacct", "--noheader", "--parsable2", "--allocations",
        "--format=JobID,State,NodeList,ExitCode", f"--jobs={_bases(missing)}",
      )
    )
    found = older | found
  return {id: job for id, job in found.items() if id in ids}


def parse_jobs(text: str) -> dict[str, Job]:
  """Reads lines of `ID|STATE|NODES|REASON`, of sacct `CODE:SIGNAL` as the reason."""
  jobs = {}
  for line in text.splitlines():
    if line.count("|") == 3:
      id, words, nodes, reason = line.strip().split("|")
      state = words.split()[0].rstrip("+")  # `CANCELLED by 1000`, `CANCELLED+`
      kind = next((kind for kind, names in _STATES.items() if state in names), "ended")
      if exit := re.fullmatch(r"(\d+):(\d+)", reason):
        code, signum = exit.groups()
        reason = f"exit code {code}" if code != "0" else ""
        reason = f"signal {signum}" if signum != "0" else reason
      parts = [reason if reason != "None" else ""]
      if kind == "ended":
        parts = [] if state == "COMPLETED" else [f"Slurm reports {state}", *parts]
      host = "" if nodes.startswith(("(", "None")) else nodes
      jobs[id] = Job(kind, id, host, ", ".join(filter(None, parts)))
  return jobs


def _bases(ids: Iterable[str]) -> str:
  """Returns the arrays: asked for one by one they would be many."""
  return ",".join(sorted({id.partition("_")[0] for id in ids}))


def _try(*command: str) -> str:
  """Returns what a command prints, '' if it fails: unknown jobs, no accounting."""
  with contextlib.suppress(ConfigError):
    return run(*command)
  return ""
