"""Do bytes pay less for predicting more tokens than larger tokens do?

  python -m launch.sweep --config=experiments/bytes_or_bpe.py:cpu \
      --workdir=runs/bytes_or_bpe --parallel=2

Claim: the finer the token, the larger the n that helps: on bytes n = 8 is best
(Gloeckle et al. 2024, arXiv 2404.19737, table 1: MBPP pass@1 of 19.3 with n = 1 and
32.3 with n = 8 at 7B, 314B bytes), while on tokens n = 4 is best and n = 8 gains
little. Score, the penalty: `bits_per_byte` of eval.json with n minus `bits_per_byte`
with n = 1 and the same seed. Bits per byte can be compared across tokenizers.

n = 1, 4 and 8 as parallel heads at weight 1 each, in equal steps on about equal text:
in `cpu` a row of 192 bytes, or of 80 tokens of BPE with 2.43 bytes each. So n tokens
reach more than twice as far as n bytes. The length of tokens of the larger BPE of `gpu`
was not measured; rows hold equal text if it is 4 bytes.

Presets: `cpu`: width 64, 4 layers, 400 steps of 4 rows; three seeds. `gpu`: width 384,
6 layers, 5,000 steps of 64 rows of 2,048 bytes against BPE of 4,096; `cluster`: width
768, 14 layers, 12,000 steps; three seeds. Neither was run.

Expected, before the run of `cpu`: at n = 4 and at n = 8 bytes have a smaller penalty
than BPE.

`cpu` took 5 minutes on two cores, beside tests; found: experiments/README.md.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import gains_with_scale
from experiments.gains_with_scale import PARALLEL
from experiments.text_setup import model, text_config

_SIZES = {
  "cpu": gains_with_scale.CPU[2],
  "gpu": gains_with_scale.GPU[2],
  "cluster": gains_with_scale.GPU[4],
}
_TOKENS = {  # Vocabulary and seq_len of about as much text.
  "cpu": {"bytes": (264, 192), "bpe": (1024, 80)},
  "gpu": {"bytes": (264, 2048), "bpe": (4096, 512)},
  "cluster": {"bytes": (264, 2048), "bpe": (4096, 512)},
}
_SEEDS = 3
_DEPTHS = (0, 3, 7)


def get_config(preset: str = "cpu") -> ConfigDict:
  config = text_config("bytes_or_bpe", preset)
  if preset == "cpu":
    config.eval.max_new_tokens = 24
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  shared = model(preset, _SIZES[preset])
  if preset == "cpu":
    shared["train.num_steps"] = 400
  for seed in range(_SEEDS):
    for kind, (vocab_size, seq_len) in _TOKENS[preset].items():
      for depth in _DEPTHS:
        yield shared | PARALLEL | {
          "name": f"tokenizer={kind},n={1 + depth},seed={seed}",
          "tokenizer.kind": kind,
          "tokenizer.vocab_size": vocab_size,
          "data.seq_len": seq_len,
          "mtp.kind": "parallel" if depth else "none",
          "mtp.depth": depth,
          "seed": seed,
        }
