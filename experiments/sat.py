"""Does a model that predicts more tokens at once solve 3-SAT more often?

  python -m launch.sweep --config=experiments/sat.py:cpu --workdir=runs/sat --parallel=2

Claim: writing a satisfying assignment variable by variable needs all clauses at the
first variable, and parallel heads train for that; the share of formulas that is solved
rises with n (Huang et al. 2026, who train 5.3M parameters on 50,000 formulas; their
clauses and format are not published; ours are in mtp_jax/data/tasks/sat.py).
Score: `task_accuracy` in eval.json, the share of formulas with all clauses satisfied,
decoded greedily.

Presets: `cpu`: 5 variables, 15 clauses, 4 layers of width 64, endless formulas, 400
steps of 32; NTP and parallel n = 3, 5; three seeds. `gpu` and `cluster`: 7
variables, 30 clauses, 50,000 formulas, 8 layers of width 256, up to n = 7; three and
five seeds. Neither was run. Every extra predictor has weight 1; parallel heads deploy
as many layers as NTP.

Expected, before the run of `cpu`: n = 5 solves more formulas than NTP on each seed.

`cpu` took 12 minutes on one core, beside other programs; found: experiments/README.md.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.task_setup import numbers_of_tokens, task_config

_DEPTHS = {"cpu": (0, 2, 4), "gpu": (0, 1, 2, 4, 6), "cluster": (0, 1, 2, 4, 6)}
_SEEDS = {"cpu": 3, "gpu": 3, "cluster": 5}


def get_config(preset: str = "cpu") -> ConfigDict:
  config = task_config("sat", preset)
  config.tokenizer.vocab_size = 24
  if preset == "cpu":
    config.task.sat.update(num_variables=5, num_clauses=15)
    config.data.update(seq_len=67, batch_size=32)
    config.train.update(num_steps=400, log_every=100, eval_every=100)
  else:
    config.trunk.update(
      num_layers=8, embed_dim=256, mlp_dim=704, num_heads=8, num_kv_heads=8
    )
    config.task.num_train = 50_000
    config.data.update(seq_len=129, batch_size=1024)
    config.optimizer.update(base_width=256, learning_rate=1e-3)
    config.train.update(num_steps=15_000, log_every=100, eval_every=1000)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  yield from numbers_of_tokens(_DEPTHS[preset], _SEEDS[preset])
