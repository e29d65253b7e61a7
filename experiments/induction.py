"""Does predicting two tokens at once teach small models induction?

  python -m launch.sweep --config=experiments/induction.py:cpu \
      --workdir=runs/induction --parallel=2

Claim: on stories, models of up to 30M parameters that predict n = 2 tokens complete the
second half of a new name far more often than with n = 1; the difference is gone from
100M on: a gain that shrinks with size (Gloeckle et al. 2024, arXiv 2404.19737, section
4.1 and appendix J; figures without numbers). Their stories are not published; ours are
generated, and the halves of names are words (mtp_jax/data/tasks/induction.py). Score:
`task_accuracy` of eval.json, the second half of a name that the story gave before, at
the end of training; validation records of metrics.jsonl give the best step.

Presets: `cpu`: widths 16, 32 and 64, 4 layers, endless stories, 300 steps of 32; n = 1
and 2; three seeds. `gpu`: widths 128 to 512; `cluster`: and 768 (100M). Neither was
run. The extra predictor has weight 1; parallel heads deploy as many layers as NTP.

Expected, before the run of `cpu`: n = 2 is better than n = 1 at the smallest width, and
the difference is smaller at the largest.

`cpu` took 8 minutes on one core, beside other programs; found: experiments/README.md.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.task_setup import numbers_of_tokens, task_config

_SIZES = {  # (width, layers, heads)
  "cpu": ((16, 4, 1), (32, 4, 2), (64, 4, 4)),
  "gpu": ((128, 5, 2), (256, 4, 4), (384, 6, 6), (512, 10, 8)),
  "cluster": ((128, 5, 2), (256, 4, 4), (384, 6, 6), (512, 10, 8), (768, 14, 12)),
}
_DEPTHS = (0, 1)
_SEEDS = {"cpu": 3, "gpu": 2, "cluster": 2}


def get_config(preset: str = "cpu") -> ConfigDict:
  config = task_config("induction", preset)
  if preset == "cpu":
    config.tokenizer.vocab_size = 160
    config.task.induction.num_sentences = 6
    config.data.update(seq_len=81, batch_size=32)
    config.train.update(num_steps=300, log_every=50, eval_every=50)
  else:
    config.tokenizer.vocab_size = 1056
    config.task.induction.update(num_sentences=40, num_halves=500, num_names=20_000)
    config.data.update(seq_len=523, batch_size=256)
    config.optimizer.update(base_width=128, learning_rate=1e-3, warmup_fraction=0.02)
    config.train.update(num_steps=5_000, log_every=100, eval_every=250)
    config.eval.update(num_rows=1024, batch_size=128, task_examples=2_000)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  for width, layers, heads in _SIZES[preset]:
    for trial in numbers_of_tokens(_DEPTHS, _SEEDS[preset]):
      yield trial | {
        "name": f"embed_dim={width},{trial['name']}",
        "trunk.embed_dim": width,
        # Three matrices of this width hold as many numbers as the usual two of 4 d.
        "trunk.mlp_dim": -(-8 * width // 96) * 32,
        "trunk.num_layers": layers,
        "trunk.num_heads": heads,
        "trunk.num_kv_heads": heads,
      }
