r"""Trains all trials of an experiment, several at a time, and continues what it finds.

  python -m launch.sweep --config=experiments/depth_sweep.py --dry_run
  python -m launch.sweep --config=experiments/depth_sweep.py --workdir=runs/depth
  python -m launch.sweep --config=experiments/gains_with_scale.py:cpu \
      --workdir=runs/ladder --parallel=2 --only='kind=sequential,seed=0'
  python -m launch.sweep --config=experiments/depth_sweep.py --workdir=runs/depth \
      --status

Every trial has a run folder of its own in --workdir, named by what varies
(launch/README.md). Trials that are done are skipped, interrupted ones go on from their
newest checkpoint, and a failed one does not stop the others: its reason is in error.txt
and at the end, with exit code 1. All configs are checked before the first trial starts.
Ctrl-C (or SIGTERM) saves every running trial; the same command again continues.

--config.KEY=VALUE holds for every trial and wins over the sweep. On CPU cores, several
workers with fewer threads each get more done than one with all (--parallel).
"""

from pathlib import Path

import jax
from absl import flags

from launch import cli, trials, workers
from launch.schedule import Sweep
from launch.trials import Trial
from launch.workers import WorkerError
from mtp_jax.config import ConfigError

cli.define_config()
_WORKDIR = cli.define_workdir(
  "folder of the sweep, in which each trial has its run folder", required=False
)
_COMPILATION_CACHE = cli.define_compilation_cache()
_SWEEP = flags.DEFINE_list(
  "sweep", None, "which sweep_<name> of the experiment to cross; by default all"
)
_ONLY = flags.DEFINE_string(
  "only",
  None,
  "train only the trials whose name has these parts, each a shell pattern, separated "
  "by commas: kind=sequential,seed=*",
)
_PARALLEL = flags.DEFINE_integer(
  "parallel", 1, "trials that are trained at once, each on its share of the CPU cores"
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "list the trials, their parameters and FLOPs; train nothing"
)
_STATUS = flags.DEFINE_bool("status", False, "list the state of every trial")


def main() -> int:
  # This process counts parameters; the workers have the accelerators.
  jax.config.update("jax_platforms", "cpu")
  if _WORKDIR.value is None and not _DRY_RUN.value:
    raise ConfigError("--workdir is required, but for --dry_run.")
  file, preset = cli.config_file()
  experiment = trials.load_experiment(file)
  planned = trials.select(
    trials.plan(
      cli.load_config(),
      cli.config_overrides(),
      trials.points(experiment, preset, _SWEEP.value),
      Path(_WORKDIR.value or "."),
    ),
    _ONLY.value,
  )
  if _DRY_RUN.value:
    print(dry_run_table(planned))
    return 0
  if _STATUS.value:
    print(status_table(planned))
    return 0
  trials.check_folders(planned)
  shares = workers.shares(_PARALLEL.value)
  sweep = Sweep(planned, Path(_WORKDIR.value), _COMPILATION_CACHE.value)
  try:
    return sweep.run(shares)
  except WorkerError as error:
    return cli.fail(str(error), 1)


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
  total = sum(trial.flops for trial in planned)
  shapes = len({trial.shape for trial in planned})
  return (
    f"{cli.table(header, rows)}\n{len(planned)} trial(s) of {shapes} shape(s), "
    f"{total:.3g} FLOPs"
  )


def status_table(planned: list[Trial]) -> str:
  """Returns the state of every trial, and how many are in each."""
  states = [trials.read_state(trial) for trial in planned]
  number = lambda x: "" if x is None else f"{x:.4f}"  # noqa: E731
  rows = [
    (
      trial.name,
      state.kind,
      f"{state.step:,}/{trial.num_steps:,}",
      number(state.train_loss),
      number(state.eval_loss),
      f"{state.seconds:.0f}",
    )
    for trial, state in zip(planned, states, strict=True)
  ]
  header = ("trial", "state", "step", "train loss", "eval loss", "seconds")
  kinds = [state.kind for state in states]
  counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
  return f"{cli.table(header, rows)}\n{len(planned)} trial(s): {counts}"


if __name__ == "__main__":
  cli.run(main)
