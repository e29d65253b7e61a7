"""Lists the state of every trial of a sweep.

  mtp-jax status gains_with_scale:cpu
  mtp-jax status depth_sweep --workdir=runs/depth --watch
  mtp-jax status depth_sweep --only='kind=sequential,seed=*'

Whichever engine trains: a row for each trial of the experiment, or of the search in the
folder, has its state, steps, losses, speed, run folder and host, and why it failed or
waits. Trials that equal a finished trial get its results, and results.csv of the sweep
folder is written anew. Nothing is started or ended: `mtp-jax sweep` does that.
"""

import jax

from launch import cli, search, state_table, trials

cli.define_config()
trials.define_workdir()
trials.define_flags()
state_table.define_flags()


def main() -> int:
  jax.config.update("jax_platforms", "cpu")  # Parameters are counted, nothing is run.
  root = cli.workdir()
  planned = search.in_folder(root) or trials.from_flags(root)[1]
  return state_table.show(planned, root)


if __name__ == "__main__":
  cli.run(main)
