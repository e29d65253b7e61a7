"""Does a model that predicts more tokens at once reach more targets in Countdown?

  python -m launch.sweep --config=experiments/countdown.py:cpu \
      --workdir=runs/countdown --parallel=2

Claim: a true equation can still lead nowhere. Predicting the following equations at the
same time teaches the model to choose one that leads to the target, so that accuracy
rises with n (the task of Gandhi et al. 2024, arXiv 2404.03683, with pauses before the
answer, on which NextLat, arXiv 2511.05963, compares numbers of predicted tokens).
Score: `task_accuracy` of eval.json, every equation true and the target reached, greedy.

Presets: `cpu`: three numbers up to 20, four pauses, 4 layers of width 64, endless
problems, 400 steps of 64; NTP and parallel n = 2, 5; three seeds. `gpu` and `cluster`:
four numbers up to 100, eight pauses, 500,000 problems, 8 layers of width 384, n = 2, 5,
9; three and five seeds. Neither was run. Every extra predictor has weight 1; parallel
heads deploy as many layers as NTP.

Expected, before the run of `cpu`: n = 5 reaches more targets than NTP on each seed.

`cpu` took 12 minutes on one core, beside other programs; found: experiments/README.md.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.task_setup import numbers_of_tokens, task_config

_DEPTHS = {"cpu": (0, 1, 4), "gpu": (0, 1, 4, 8), "cluster": (0, 1, 4, 8)}
_SEEDS = {"cpu": 3, "gpu": 3, "cluster": 5}


def get_config(preset: str = "cpu") -> ConfigDict:
  config = task_config("countdown", preset)
  config.tokenizer.vocab_size = 24
  if preset == "cpu":
    config.task.countdown.update(num_inputs=3, largest=20, num_pauses=4)
    config.data.update(seq_len=35, batch_size=64)
    config.train.update(num_steps=400, log_every=100, eval_every=100)
  else:
    config.trunk.update(
      num_layers=8, embed_dim=384, mlp_dim=1024, num_heads=6, num_kv_heads=6
    )
    config.task.num_train = 500_000
    config.data.update(seq_len=65, batch_size=1024)
    config.optimizer.update(base_width=384, learning_rate=1e-3)
    config.train.update(num_steps=20_000, log_every=100, eval_every=1000)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  yield from numbers_of_tokens(_DEPTHS[preset], _SEEDS[preset])
