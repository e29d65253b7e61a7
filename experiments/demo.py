"""The model of `mtp-jax demo`: Python source as BPE, three sequential modules.

  mtp-jax train demo
  python -m launch.demo --ship=runs/demo

The second command writes the checkpoint that the package ships, `mtp_jax/demo`, anew.
Hardware and time: see `mtp_jax/demo/made.json`. A text to look at, no measurement.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "demo"
  config.mtp.update(kind="sequential", depth=3)
  # A word of several letters is one token: a short training reaches further.
  config.tokenizer.update(kind="bpe", vocab_size=1024)
  config.data.update(seq_len=192, batch_size=8)
  # Chosen for few steps; not compared with AdamW here.
  config.optimizer.update(kind="muon", learning_rate=5e-3)
  config.train.update(num_steps=1400, log_every=50, diagnostics_every=0)
  config.checkpoint.update(every_steps=100, keep=1)
  config.eval.update(num_rows=64, line_prompts=0, function_prompts=0)
  return config
