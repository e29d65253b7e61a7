"""The states of a sweep as a table, once or kept up to date."""

import contextlib
import signal
import time
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch import cli, exits, jobs, results_csv
from launch.states import State, Trial

# Flags that are defined here belong to the command that asked for them, in its --help.
flags.disclaim_key_flags()

_MAX_REASON = 100


def define_flags() -> None:
  """Defines `--watch` and `--watch_seconds`; see `show`."""
  flags.DEFINE_bool(
    "watch", False, "keep the list of states up to date until no trial waits or runs",
    allow_override=True,
  )
  flags.DEFINE_float(
    "watch_seconds", 10.0, "how often --watch looks", lower_bound=0.1,
    upper_bound=86400.0, allow_override=True,
  )


def show(planned: list[Trial], root: Path) -> int:
  """Shows the states, with --watch until they stay; returns the exit code."""
  if flags.FLAGS.watch:
    try:
      return watch(planned, root, flags.FLAGS.watch_seconds)
    except KeyboardInterrupt:  # The trials do not notice.
      return 128 + signal.SIGINT
  found = jobs.share(planned, jobs.read_states(planned))
  print(table(planned, found))
  if root.is_dir():
    results_csv.collect(root)
  return 0


def watch(planned: list[Trial], root: Path, seconds: float) -> int:
  """Shows the states until no trial waits or runs; returns the exit code.

  In a terminal the table stays in its place; elsewhere it is printed when a state has
  changed.
  """
  console, kinds = Console(), None
  with contextlib.ExitStack() as stack:
    live = None
    if console.is_terminal:
      live = stack.enter_context(Live(console=console, auto_refresh=False))
    while True:
      states = jobs.share(planned, jobs.read_states(planned))
      if root.is_dir():
        results_csv.collect(root)
      before, kinds = kinds, [state.kind for state in states.values()]
      text = table(planned, states)
      if live is not None:
        live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
      elif kinds != before:
        print(text, flush=True)
      if not {"queued", "running"}.intersection(kinds):
        return exits.DONE if set(kinds) == {"done"} else exits.FAILED
      time.sleep(seconds)


def table(planned: list[Trial], states: dict[str, State]) -> str:
  """Returns the state of every trial, and how many are in each; reasons come last."""
  number = lambda x: "" if x is None else f"{x:.4f}"  # noqa: E731
  rows, reasons = [], []
  for trial in planned:
    state = states[trial.name]
    speed = state.tokens_per_second
    rows.append((
      trial.name,
      state.kind,
      f"{state.step:,}/{trial.num_steps:,}",
      number(state.train_loss),
      number(state.eval_loss),
      "" if speed is None else f"{speed:,.0f}",
      f"{state.seconds:.0f}",
      trial.workdir.name,
      state.host or "",
    ))
    reasons.append((state.reason or "")[:_MAX_REASON])
  header = (
    "trial", "state", "step", "train loss", "eval loss", "tokens/s", "seconds",
    "folder", "host",
  )
  head, *lines = cli.table(header, rows).splitlines()
  if any(reasons):
    width = max(map(len, (head, *lines)))
    head = f"{head.ljust(width)}  reason"
    lines = [
      f"{line.ljust(width)}  {reason}".rstrip()
      for line, reason in zip(lines, reasons, strict=True)
    ]
  kinds = [states[trial.name].kind for trial in planned]
  counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
  return "\n".join([head, *lines, f"{len(planned)} trial(s): {counts}"])
