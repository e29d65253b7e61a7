"""Does everything run, from text to eval.json? A tiny model with sequential modules.

  python -m launch.train --config=experiments/smoke.py --workdir=runs/smoke

The figures mean nothing: the model is far too small and trained for far too short.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "smoke"
  config.trunk.update(num_layers=2, embed_dim=64, mlp_dim=176)
  config.mtp.update(kind="sequential", depth=2)
  config.data.seq_len = 128
  config.train.update(num_steps=40, log_every=10, eval_every=20, diagnostics_every=20)
  config.checkpoint.every_steps = 20
  config.eval.update(num_rows=64, line_prompts=16, function_prompts=8)
  return config
