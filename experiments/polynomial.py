"""Does a model that predicts more tokens at once compute better with polynomials?

  python -m launch.sweep --config=experiments/polynomial.py:cpu \
      --workdir=runs/polynomial --parallel=2

Claim: on arithmetic in F_7[X]/(X^5) predicting more tokens is better than next-token
prediction (NTP) at every number of operations, in domain (up to 5) and out of it, and
helps more than a model three times as large (Gloeckle et al. 2024, arXiv 2404.19737,
section 4.2 and appendix K; figures without numbers; notation ours, see
mtp_jax/data/tasks/polynomial.py). Score: `task_accuracy` and `task_accuracy_groups` of
eval.json, all five coefficients, greedy.

Presets: `cpu`: one or two operations, up to 3 held out, 4 layers of width 64, endless
expressions, 400 steps of 64; NTP and parallel n = 2, 4; three seeds. `gpu`: up to 5
operations, up to 7 held out, 10 layers of width 512, 10,000 steps of 2,048; `cluster`:
100,000 steps. Neither was run. Every extra predictor has weight 1; parallel heads
deploy as many layers as NTP.

Expected, before the run of `cpu`: n = 2 is better than NTP in domain on each seed; out
of domain all fail.

`cpu` took 9 minutes on one core, beside other programs; found: experiments/README.md.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.task_setup import numbers_of_tokens, task_config

_DEPTHS = {"cpu": (0, 1, 3), "gpu": (0, 1, 3), "cluster": (0, 1, 3)}
_SEEDS = {"cpu": 3, "gpu": 2, "cluster": 2}


def get_config(preset: str = "cpu") -> ConfigDict:
  config = task_config("polynomial", preset)
  config.tokenizer.vocab_size = 24
  if preset == "cpu":
    config.task.polynomial.update(max_operators=2, held_out_operators=3)
    config.data.update(seq_len=37, batch_size=64)
    config.train.update(num_steps=400, log_every=100, eval_every=100)
  else:
    config.trunk.update(
      num_layers=10, embed_dim=512, mlp_dim=1408, num_heads=8, num_kv_heads=8
    )
    config.data.update(seq_len=69, batch_size=2048)
    config.optimizer.update(base_width=512, learning_rate=5e-4, warmup_fraction=0.02)
    num_steps = 10_000 if preset == "gpu" else 100_000
    config.train.update(num_steps=num_steps, log_every=100, eval_every=1000)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  yield from numbers_of_tokens(_DEPTHS[preset], _SEEDS[preset])
