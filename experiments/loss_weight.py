"""How much should the extra losses weigh, and should their weight fall over training?

  python -m launch.sweep --config=experiments/loss_weight.py --workdir=runs/loss_weight

Constant lambda is compared with DeepSeek-V3's step from 0.3 to 0.1 (two thirds through
its training), with a fall to 0, and with two curricula that switch depths on or off one
by one (Aynetdinov and Akbik 2025, arXiv 2505.22757). Weight 0 trains the modules' own
parameters by nothing and the trunk by the next token alone: the baseline.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "loss_weight"
  config.mtp.update(kind="sequential", depth=2)
  return config


def sweep_weight() -> Iterator[dict]:
  for weight in (0.0, 0.1, 0.3, 1.0):
    yield {"mtp.weight": weight}
  for schedule in ("piecewise", "linear", "anneal"):
    yield {"mtp.weight": 0.3, "mtp.schedule": schedule}
  for curriculum in ("forward", "reverse"):
    yield {"mtp.weight": 0.3, "mtp.curriculum": curriculum}


def sweep_seed() -> Iterator[dict]:
  for seed in range(3):
    yield {"seed": seed}
