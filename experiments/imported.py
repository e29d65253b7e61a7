"""Trains imported weights further, with a new sequential module.

  python -m launch.import_hf --from=DIR --workdir=runs/imported
  python -m launch.train --workdir=runs/imported

`launch.import_hf` reads the trunk's sizes from the folder and all other values from
here: D = 1, lambda 0.3, and a low learning rate without width scaling, because the
weights are trained already. `--config.train.freeze_trunk=True` trains the module alone.
The learning rate was not tuned.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "imported"
  config.mtp.update(kind="sequential", depth=1)
  # The factor of a width is 1 at that width; imported weights have their own widths.
  config.optimizer.update(learning_rate=3e-4, base_width=config.trunk.embed_dim)
  return config
