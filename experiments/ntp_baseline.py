"""What does plain next-token prediction reach, and how far apart do seeds land?

  python -m launch.sweep --config=experiments/ntp_baseline.py --workdir=runs/ntp

The spread is the scale for every other experiment: a gain smaller than the difference
between two seeds is no evidence.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "ntp_baseline"
  config.mtp.update(kind="none", depth=0)
  return config


def sweep_seed() -> Iterator[dict]:
  for seed in range(5):
    yield {"seed": seed}
