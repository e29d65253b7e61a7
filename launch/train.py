r"""Trains one language model and evaluates it.

  python -m launch.train --config=experiments/smoke.py --workdir=runs/smoke
  python -m launch.train --config=experiments/base.py --workdir=runs/sequential \
      --config.mtp.kind=sequential --config.mtp.depth=2 --config.train.num_steps=2000

The run folder gets config.json, metrics.jsonl, TensorBoard events, checkpoints and, at
the end, eval.json and DONE: launch/README.md describes every file and field. Ctrl-C (or
SIGTERM) saves a checkpoint; the same command again goes on from the newest one. A run
may be continued on another number of devices (--config.mesh.*).

Every value of a config, with its meaning, is in experiments/base.py and
mtp_jax/config.py. Bad values are refused before any work, with exit code 2.
"""

import sys
from pathlib import Path

import jax

from launch import cli
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import validate
from mtp_jax.train import Diverged, Interrupted, fit

cli.define_config()
_WORKDIR = cli.define_workdir("folder of this run; continued if it holds it already")
_COMPILATION_CACHE = cli.define_compilation_cache()


def main() -> int:
  config = cli.load_config()
  validate(config)
  cli.check_files(config.data, config.tokenizer)
  validate(config, jax.device_count())
  cli.use_compilation_cache(_COMPILATION_CACHE.value)
  workdir = Path(_WORKDIR.value)
  try:
    with cli.exclusive(workdir):
      fit(config, workdir)
  except Interrupted as stop:
    print(f"{stop}; the same command continues it.", file=sys.stderr)
    return 128 + stop.signum
  except (Diverged, CheckpointError) as error:
    return cli.fail(str(error), 1)
  return 0


if __name__ == "__main__":
  cli.run(main)
