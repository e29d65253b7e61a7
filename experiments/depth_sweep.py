"""How many extra tokens should sequential modules predict?

  python -m launch.sweep --config=experiments/depth_sweep.py --workdir=runs/depth_sweep

Modules are added to the same trunk, and the mean weighting keeps their total weight at
lambda, so that only the number of tokens that the trunk predicts varies. Depth 0 is
plain next-token prediction.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "depth_sweep"
  config.mtp.kind = "sequential"
  return config


def sweep_depth() -> Iterator[dict]:
  for depth in (0, 1, 2, 3, 4):
    yield {"mtp.depth": depth}


def sweep_seed() -> Iterator[dict]:
  for seed in range(3):
    yield {"seed": seed}
