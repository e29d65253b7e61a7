"""Does a model with sequential modules decode faster on a CPU, with its own drafts?

  python -m launch.train --config=experiments/self_speculation.py --workdir=runs/draft3
  python -m launch.generate --workdir=runs/draft3 --prompt="def "
  python -m launch.benchmark decode --runs runs/draft3

Hardware and time: a few minutes on two CPU cores. Width 256, 6 layers, D = 3, a step up
from the models of `gains_with_scale:cpu`, which are too small for drafts to pay. The
learning rate was not tuned: this says what drafts are worth, not what MTP is.
Expected before the first run: text identical to plain decoding, 1.3 to 1.8 times as
fast at batch 1. Found: identical, and not faster; see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "self_speculation"
  config.trunk.update(num_layers=6, embed_dim=256, mlp_dim=704)
  config.mtp.update(kind="sequential", depth=3)
  config.data.batch_size = 4
  config.optimizer.update(learning_rate=0.003, base_width=64)
  config.train.update(num_steps=600, log_every=50, diagnostics_every=0)
  config.checkpoint.every_steps = 300
  return config
