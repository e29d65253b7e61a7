"""How much should the extra losses weigh?

  python -m launch.sweep --config=experiments/loss_weight.py --workdir=runs/loss_weight

Constant lambda for two sequential modules. With weight 0 the modules are not trained,
and the trunk learns from the next token alone: the baseline. Weights that change during
training are in schedules.py.
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


def sweep_seed() -> Iterator[dict]:
  for seed in range(3):
    yield {"seed": seed}
