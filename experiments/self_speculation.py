"""Does a model with sequential modules decode faster on a CPU, with its own drafts?

  python -m launch.train --config=experiments/self_speculation.py --workdir=runs/drafts
  python -m launch.generate --workdir=runs/drafts --prompt="def "
  python -m launch.benchmark decode --runs=runs/drafts

Hardware and time: about 7 minutes on two CPU cores. Width 512, 8 layers, D = 3: the
models of `gains_with_scale:cpu` (width 64) and a first try at width 256 are too small
for drafts to pay on a CPU, see `experiments/README.md`. The learning rate was not
tuned: this experiment measures drafting, not the quality of MTP training.
Expected before the run: text identical to plain decoding, 1.2 to 1.6 times as fast at
batch 1. Found: identical, and 1.94 times as fast; see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "self_speculation"
  config.trunk.update(num_layers=8, embed_dim=512, mlp_dim=1408)
  config.mtp.update(kind="sequential", depth=3)
  config.data.batch_size = 4
  config.optimizer.update(learning_rate=0.003, base_width=64)
  config.train.update(num_steps=400, log_every=25, diagnostics_every=0)
  config.checkpoint.every_steps = 100
  return config
