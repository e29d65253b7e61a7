r"""Trains one language model and evaluates it.

  mtp-jax train smoke
  mtp-jax train base --workdir=runs/seq2 mtp.kind=sequential mtp.depth=2
  mtp-jax train --workdir=runs/smoke

The run folder gets config.json, metrics.jsonl, TensorBoard events, checkpoints and, at
the end, eval.json and DONE; docs/reference has every file and field. Ctrl-C (or
SIGTERM) saves a checkpoint. The same command again continues from the newest one, and
so does --workdir alone, with the config that the folder holds (the config of
`mtp-jax import`, perhaps). A run may be continued on another number of devices
(--config.mesh.*) and of processes.

Several processes train one model if each runs this command, with the same flags and a
folder that all see. In a Slurm step, under Open MPI and in a TPU pod they find each
other; elsewhere --distributed=HOST:PORT,NUM_PROCESSES,PROCESS_ID names them:

  mtp-jax train smoke --distributed=localhost:9876,2,0 &
  mtp-jax train smoke --distributed=localhost:9876,2,1

Bad values are refused before any work, with exit code 2;
the other exit codes are in docs/reference/exit-codes.md.
"""

import contextlib
import functools
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from launch import cli, distributed, exits
from launch.status import Status, exit_class_of, last_words, refused
from mtp_jax import accounting, executables, run_folder, trackers
from mtp_jax.config import Config, ConfigError
from mtp_jax.config_rules import validate
from mtp_jax.data.sources import DataError
from mtp_jax.interrupt import Interrupted
from mtp_jax.run import Diverged
from mtp_jax.stopwatch import Stopwatch, process_age
from mtp_jax.train import fit

cli.define_config(required=False)
cli.define_workdir(
  "folder of this run, continued if it holds it already; by default runs/NAME or "
  "runs/NAME_PRESET of the experiment",
  required=False,
)
_COMPILATION_CACHE = cli.define_compilation_cache()
_PROFILE = flags.DEFINE_string(
  "profile", None,
  "FIRST:LAST, steps of which a trace is written into the run folder (profile/), as "
  "XProf and TensorBoard read it: 10:15",
)
_TRACK = cli.define_track()
_GROUP = distributed.define_flags()

_CONTINUES = "the same command continues it."


class End(NamedTuple):
  """How training ended.

  code, exit_class: see `exits`.
  message: for the user; '' if there is nothing to say.
  together: all processes end so, and this one can wait for them.
  """

  code: int
  exit_class: str
  message: str = ""
  together: bool = False


def main() -> int:
  startup = Stopwatch(process_age())
  startup.ends("imports")
  if flags.FLAGS.config is None and flags.FLAGS.workdir is None:
    raise ConfigError(
      "--config is required: an experiment (smoke, or a file); or --workdir alone, of "
      "a run to resume."
    )
  workdir = cli.workdir()
  if flags.FLAGS.workdir is None:
    print(f"run folder: {workdir}", file=sys.stderr, flush=True)
  try:
    config = _config(workdir)
    profile, track = _profile(config), trackers.parse(_TRACK.value)
    trackers.check(track)
    group = distributed.find_group(
      _GROUP["distributed"].value, _GROUP["local_device_ids"].value
    )
  except (ConfigError, DataError) as error:
    refused(workdir, str(error))
    raise
  cli.use_compilation_cache(_COMPILATION_CACHE.value)
  for signum in (signal.SIGTERM, signal.SIGINT):
    # `fit` has handlers of its own.
    signal.signal(signum, functools.partial(_end_at_once, group))
  try:
    distributed.initialize(
      group, _GROUP["start_seconds"].value, _GROUP["heartbeat_seconds"].value
    )
  except (RuntimeError, TimeoutError) as error:
    return cli.fail(str(error), exits.FAILED)
  how = {"profile": profile, "track": track}
  end = train(config, workdir, startup, _GROUP["stall_seconds"].value, **how)
  code = distributed.leave(end.code, end.together)
  if executables.is_compiling():
    # All is saved. Who stops a run does not wait for programs that nothing will call.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def train(
  config: Config, workdir: Path, startup: Stopwatch, stall_seconds: int = 0, **how: Any
) -> End:
  """Trains, in all processes that were joined, and leaves a status in the run folder.

  Prints on stderr why it ended early. Raises nothing.

  Args:
    config: see `fit`.
    workdir: the run folder.
    startup, how: see `fit`.
    stall_seconds: see `Status`.
  """
  with Status(workdir, stall_seconds) as status:
    try:
      fit(
        config, workdir, observer=status, startup=startup,
        holding=distributed.exclusive, **how,
      )
      end = End(exits.DONE, "done", together=True)
    except BaseException as error:
      end = _end(error)
    if status.has_begun:
      status.ended(end.exit_class, end.message)
    elif end.exit_class == "config" and jax.process_index() == 0:
      refused(workdir, end.message)
    if end.message and (jax.process_index() == 0 or not end.together):
      is_error = end.exit_class != "yielded"
      who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
      prefix = "error: " if is_error else ""
      with contextlib.suppress(OSError):  # The log may be on a disk that is full.
        print(f"{who}{prefix}{end.message}", file=sys.stderr, flush=True)
  return end


def _end(error: BaseException) -> End:
  """Returns what an exception of `fit` means."""
  rank = jax.process_count(), jax.process_index()
  match error:
    case Interrupted():
      code = exits.after_signal(error.signum, *rank)
      return End(code, "yielded", f"{error}; {_CONTINUES}", together=True)
  if exit_class := exit_class_of(error):
    together = isinstance(error, Diverged)
    return End(exits.code_of(exit_class), exit_class, str(error), together)
  with contextlib.suppress(OSError):
    traceback.print_exception(error)
  summary = exits.describe(error)
  if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
    summary = (
      f"{summary} Another process may have ended: see what it printed. "
      "The run continues from its newest checkpoint when all are started again."
    )
  return End(exits.FAILED, "infrastructure", summary)


def _config(workdir: Path) -> Config:
  given = ()
  if flags.FLAGS.config is not None:
    config, given = cli.load_config(), cli.config_overrides()
  elif run_folder.is_run(workdir):
    config = cli.load_run_config(workdir)
  else:
    raise ConfigError(
      f"--config is required: {str(workdir)!r} holds no run to continue."
    )
  validate(config, given=given)
  config = cli.of_run(config, workdir)
  if run_folder.finished(workdir, config) is None:
    cli.check_files(config.data, config.tokenizer)
  return config


def _profile(config: Config) -> tuple[int, int] | None:
  """Returns the first and the last step of --profile."""
  if (text := _PROFILE.value) is None:
    return None
  num_steps = accounting.resolve(config).train.num_steps
  found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
  first, last = map(int, found.groups()) if found else (0, 0)
  if not 1 <= first <= last <= num_steps:
    raise ConfigError(
      "--profile must be FIRST:LAST, two steps from 1 to train.num_steps "
      f"({num_steps}) in their order, got {text!r}."
    )
  return first, last


def _end_at_once(group: distributed.Group | None, signum: int, _: Any) -> None:
  """Ends the process on a signal before training begins, or on a second one.

  Raises nothing: an exception may be lost, see `mtp_jax.interrupt`.
  """
  reason = f"{signal.Signals(signum).name}, nothing new was saved"
  last_words("yielded", reason)
  os.write(2, f"{reason}; {_CONTINUES}\n".encode())
  rank = 1, 0
  if jax.distributed.is_initialized():  # JAX itself may be amid its start.
    rank = group.num_processes or 2, group.process_id or 0
  os._exit(exits.after_signal(signum, *rank))


if __name__ == "__main__":
  cli.run(main)
