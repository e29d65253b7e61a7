r"""Trains all trials of an experiment, here or on a cluster, and continues them.

  mtp-jax sweep depth_sweep --dry_run
  mtp-jax sweep gains_with_scale:cpu --parallel=2 --only='kind=sequential,seed=0'
  mtp-jax sweep depth_sweep --workdir=runs/depth --on=slurm \
      --slurm='partition=gpu gpus-per-node=8' --max_parallel=4
  mtp-jax sweep smoke --search=optuna --space='optimizer.learning_rate=1e-4:1e-2:log'

Every trial has a run folder of its own in --workdir, named by what varies
(docs/reference/sweep-folder.md). All configs are checked before the first trial starts.
Trials that are done are skipped, trials that are queued or running are left alone, and
interrupted trials continue from their newest checkpoint. A failed trial does not stop
the others; its reason is in --status and in its run folder. results.csv has a row for
each trial.

--on names the engine: `local` is this machine, where Ctrl-C (or SIGTERM) saves every
running trial; `slurm` submits a job array; `kubernetes` writes JobSets, and --submit
applies them; `print` prints the commands for any other scheduler. The same command
again continues, whatever happened, on another engine too; --status and --cancel need
no --on. --search trains the trials that Optuna asks for, on any engine.

--config.KEY=VALUE holds for every trial and wins over the sweep. On CPU cores, several
workers with fewer threads each get more done than one with all (--parallel). On a GPU
or TPU, small models get more done side by side in one program (--pack).
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from launch import cli, exits, jobs, results_csv, search, state_table, states, trials
from launch.engines import kubernetes, printed, slurm
from launch.engines.engine import Engine
from launch.engines.local import Local
from launch.engines.order import MOST_PACKED
from launch.states import Choice, Trial
from mtp_jax import run_folder, trackers
from mtp_jax.config import ConfigError

cli.define_config()
trials.define_workdir()
_COMPILATION_CACHE = cli.define_compilation_cache()
trials.define_flags()
_ON = flags.DEFINE_enum("on", "local", jobs.ENGINES, "which engine trains")
_TRACK = cli.define_track()
_PARALLEL = flags.DEFINE_integer(
  "parallel",
  1,
  "local: trials that are trained at once, each on its share of the CPU cores and GPUs",
)
_PACK = flags.DEFINE_string(
  "pack",
  "1",
  "local: most trials of one program that are trained side by side in one program, "
  f"spread over the devices that there are; auto: as many as fit, up to "
  f"{MOST_PACKED}",
)
_MAX_PARALLEL = flags.DEFINE_integer(
  "max_parallel", None, "slurm: trials that run at once", lower_bound=1
)
_MAX_ATTEMPTS = flags.DEFINE_integer(
  "max_attempts",
  3,
  "how often a trial is started that ends for no fault of its own: a machine that "
  "failed, a process that was killed. Preemption does not count; bad input and "
  "divergence are not tried again.",
  lower_bound=1,
)
_AGAIN = flags.DEFINE_bool(
  "again", False, "try also those again that ended in bad input or diverged"
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "list the trials, their parameters and FLOPs, and what --on would hand over: sbatch "
  "scripts, manifests, commands; start nothing",
)
_STATUS = flags.DEFINE_bool("status", False, "list the state of every trial")
state_table.define_flags()
search.define_flags()
_CANCEL = flags.DEFINE_bool(
  "cancel", False, "end the jobs of the trials; they save what they can and stay ended"
)
_SUBMIT = flags.DEFINE_bool(
  "submit", False, "kubernetes: apply the manifests through kubectl"
)
_SLURM = flags.DEFINE_multi_string(
  "slurm", [],
  "options of sbatch, KEY=VALUE separated by blanks ('partition=gpu nodes=2 "
  "gpus-per-node=8 cpus-per-task=16 time=12:00:00 exclusive'); may be given again. "
  "nodes, gpus-per-node (8 or a100:8; 0 trains on CPU cores) and ntasks-per-node "
  "(processes of a node) say which devices a trial has",
)
_SLURM_SETUP = flags.DEFINE_string(
  "slurm_setup", None,
  "shell commands before training ('module load cuda; source env/bin/activate')",
)
_SLURM_GRACE = flags.DEFINE_integer(
  "slurm_grace", 180, "seconds before the time limit at which a trial saves",
  lower_bound=1, upper_bound=65535,
)
_KUBERNETES = flags.DEFINE_multi_string(
  "kubernetes", [],
  "values of the template's keys, KEY=VALUE separated by blanks "
  "('image=REGISTRY/mtp_jax:1 hosts=2 devices=8 claim=runs folder=/runs/depth'); may "
  "be given again. folder is the sweep folder as the pods see it, by default --workdir",
)
_KUBERNETES_TEMPLATE = flags.DEFINE_string(
  "kubernetes_template", str(kubernetes.TEMPLATE), "file of the manifests of a trial; "
  "copy this one or jobset_tpu.yaml beside it and edit the copy",
)
_PROCESSES = flags.DEFINE_integer(
  "print.processes", 1, "processes of a trial", lower_bound=1, upper_bound=2**20
)
_DEVICES = flags.DEFINE_integer(
  "print.devices", 0,
  "accelerators of a process, to check the mesh by; 0 checks nothing",
  lower_bound=0, upper_bound=2**20,
)
_COORDINATOR = flags.DEFINE_string(
  "print.coordinator", None, "HOST:PORT of process 0 as the others reach it; may hold "
  "shell variables",
)
# Flags of one engine. Where another engine is asked to train they are refused.
_OWNERS = {
  "parallel": "local", "pack": "local", "max_parallel": "slurm", "slurm": "slurm",
  "slurm_setup": "slurm", "slurm_grace": "slurm", "submit": "kubernetes",
  "kubernetes": "kubernetes", "kubernetes_template": "kubernetes",
  "print.processes": "print", "print.devices": "print", "print.coordinator": "print",
}


def main() -> int:
  # This process counts parameters; others have the accelerators.
  jax.config.update("jax_platforms", "cpu")
  root = cli.workdir()
  found = search.from_flags(root) if flags.FLAGS.search else None
  planned = found.planned() if found else trials.from_flags(root)[1]
  engine = _engine(root)
  if found and not (_DRY_RUN.value or _CANCEL.value or _STATUS.value):
    return _search(found, engine, root)
  if _DRY_RUN.value:
    print(preview(planned, engine))
    return 0
  if _CANCEL.value:
    print("\n".join(jobs.cancel(planned)) or "no trial was given to an engine")
    return 0
  if not _STATUS.value:
    code = _start(planned, engine, root)
    if code or not flags.FLAGS.watch or _ON.value == "local":
      return code
  return state_table.show(planned, root)


def _search(found: search.Search, engine: Engine, root: Path) -> int:
  """Trains the trials of a search until it has --trials; returns the exit code."""
  at_once = flags.FLAGS.at_once
  if at_once is None:
    at_once = _PARALLEL.value * (_pack() or 1) if _ON.value == "local" else 8
  while True:
    mine, ended = found.next(flags.FLAGS.trials, at_once)
    if not mine:
      print(found.summary())
      return 0
    # Equal trials that have ended give their results.
    code = _start([*ended, *mine], engine, root)
    if code > exits.FAILED:  # A trial that failed is no good one, all else is an end.
      return code
    kinds = {state.kind for state in jobs.read_states(mine).values()}
    if _ON.value == "local" and not kinds & {"done", "failed"}:
      return code  # No worker starts, or others hold the folders.
    if _ON.value != "local":
      if not flags.FLAGS.watch:
        print("The same command again tells how they did, and asks for more.")
        return code
      state_table.watch(mine, root, flags.FLAGS.watch_seconds)


def _engine(root: Path) -> Engine:
  """Returns the engine that the flags name.

  Raises:
    ConfigError: a flag of another engine is set.
  """
  on, cache, attempts = _ON.value, _COMPILATION_CACHE.value, _MAX_ATTEMPTS.value
  absolute = root.absolute()
  for name, owner in _OWNERS.items():
    if flags.FLAGS[name].present and owner != on:
      raise ConfigError(f"--{name} is for --on={owner}, got --on={on}.")
  match on:
    case "slurm":
      options = slurm.parse(_SLURM.value, _SLURM_SETUP.value, _SLURM_GRACE.value)
      return slurm.Slurm(absolute, options, cache, _MAX_PARALLEL.value, attempts)
    case "kubernetes":
      options = kubernetes.parse(_KUBERNETES.value, Path(_KUBERNETES_TEMPLATE.value))
      track = trackers.parse(_TRACK.value)
      return kubernetes.Kubernetes(absolute, options, attempts, _SUBMIT.value, track)
    case "print":
      options = printed.Options(_PROCESSES.value, _DEVICES.value, _COORDINATOR.value)
      return printed.Printed(absolute, options, cache)
  return Local(root, cache, _PARALLEL.value, attempts, _pack())


def _pack() -> int | None:
  """Returns --pack as a number, None for `auto`."""
  text = _PACK.value
  if text == "auto":
    return None
  if not text.isdecimal() or int(text) < 1:
    raise ConfigError(f"--pack must be a number from 1 up or auto, got {text!r}.")
  return int(text)


def _start(planned: list[Trial], engine: Engine, root: Path) -> int:
  """Gives the engine what is to be trained; returns the exit code."""
  track = trackers.parse(_TRACK.value)
  if _ON.value == "local":
    trackers.check(track)
  trials.check_folders(planned, files_are_here=_ON.value != "kubernetes")
  jobs.share(planned, jobs.read_states(planned))
  choice = jobs.choose(planned, _AGAIN.value)
  if _ON.value == "local":
    engine.check(planned)
    for trial in choice.todo if track else ():
      trial.workdir.mkdir(parents=True, exist_ok=True)
      trackers.want(trial.workdir, track)
    code = engine.submit(choice)
    jobs.share(planned, jobs.read_states(planned))
    results_csv.collect(root)
    return code
  engine.check(choice.todo)
  with _alone(root):
    # Once more: another sweep may have been here in the meantime.
    choice = jobs.choose(planned, _AGAIN.value)
    trials.check_active(choice.active)
    if engine.needs_folders:
      for trial in choice.todo:
        trials.prepare(trial)
        if track:
          trackers.want(trial.workdir, track)
    code = engine.submit(choice) if choice.todo else 0
  results_csv.collect(root)
  _tell(engine.outcome, planned, choice)
  return code


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
  """Keeps others from submitting the same trials meanwhile."""
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(run_folder.exclusive(root))
    except ConfigError as error:
      raise ConfigError(f"another sweep is being started in {root}.") from error
    yield


def _tell(outcome: str, planned: list[Trial], choice: Choice) -> None:
  """Prints what became of every trial; on stderr, for `print` has its own output."""
  done = sum(state.kind == "done" for state in choice.states.values())
  lines = [f"{len(choice.todo)} of {len(planned)} trial(s) {outcome}, {done} done"]
  for trial in choice.active:
    lines.append(f"  {trial.name}: {choice.states[trial.name].kind}, left alone")
  for name, original in choice.copies.items():
    lines.append(f"  {name}: the same run as {original.name}, gets its results")
  for trial in choice.given_up:
    state = choice.states[trial.name]
    lines.append(
      f"  {trial.name}: not tried again without --again ({state.exit_class}): "
      f"{state.reason}"
    )
  print("\n".join(lines), file=sys.stderr, flush=True)


def preview(planned: list[Trial], engine: Engine) -> str:
  """Returns the table of trials, as comments before what the engine would hand over."""
  copies = states.copies(planned)
  trained = [trial for trial in planned if trial.name not in copies]
  table, handed_over = dry_run_table(planned), engine.preview(trained)
  if not handed_over:
    return table
  return "\n".join(f"# {line}" for line in table.splitlines()) + f"\n{handed_over}"


def dry_run_table(planned: list[Trial]) -> str:
  """Returns one row per trial, and their sum."""
  rows = [
    (
      trial.name,
      f"{trial.counts.total:,}",
      f"{trial.counts.deployed:,}",
      f"{trial.cost:.3g}",
      f"{trial.num_steps:,}",
      f"{trial.num_tokens:,}",
      f"{trial.flops:.3g}",
    )
    for trial in planned
  ]
  header = (
    "trial", "parameters", "deployed", "FLOPs/token", "steps", "tokens", "FLOPs"
  )
  copies = states.copies(planned)
  total = sum(trial.flops for trial in planned if trial.name not in copies)
  same = "".join(f"\n{name}: the same run as {x.name}" for name, x in copies.items())
  programs = len({trial.program for trial in planned})
  return (
    f"{cli.table(header, rows)}\n{len(planned)} trial(s) of {programs} program(s), "
    f"{total:.3g} FLOPs{same}"
  )


if __name__ == "__main__":
  cli.run(main, owners=_OWNERS)
