"""Does multi-token prediction gain less when text is repeated?

  python -m launch.sweep --config=experiments/data_repetition.py:cpu \
      --workdir=runs/data_repetition --parallel=2

Claim: over four epochs of the same code the gains of n = 4 shrink but stay (Gloeckle et
al. 2024, arXiv 2404.19737, table 1, 7B: MBPP pass@1 33.8 against 30.0 after 0.8 epochs
of 200B tokens, 43.1 against 40.7 after four of 1T). Score: the gain, `main_loss` of
eval.json of next-token prediction (NTP) minus `main_loss` with n = 2 or 4 and the same
seed.

Every trial trains on the same number of tokens. The share of the text that is held out
for `test` sets how often the rest is repeated; the loss is on the validation split,
which is the same for all trials. n = 2 and 4 are parallel heads at weight 1 each.

Presets: `cpu`: the middle model of gains_with_scale:cpu, 1,000 steps of 512 bytes, of
all the text, of 1/100 and of 1/500 of it; three seeds. `gpu`: the model of width 384
of gains_with_scale:gpu, of all, 1/4 and 1/16; `cluster`: of width 768; three seeds.
Neither was run.

Expected, before the run of `cpu`: at this size the gain is negative; with most
repetition it is smaller still, for n = 2 and for n = 4.

`cpu` took 7 minutes on one core, beside other programs; found: experiments/README.md.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import gains_with_scale
from experiments.gains_with_scale import PARALLEL
from experiments.text_setup import model, text_config

_SIZES = {
  "cpu": gains_with_scale.CPU[1],
  "gpu": gains_with_scale.GPU[2],
  "cluster": gains_with_scale.GPU[4],
}
_SHARES = {"cpu": (1, 100, 500), "gpu": (1, 4, 16), "cluster": (1, 4, 16)}
_SEEDS = 3
_DEPTHS = (0, 1, 3)
_VALIDATION = 0.05


def get_config(preset: str = "cpu") -> ConfigDict:
  config = text_config("data_repetition", preset)
  config.data.validation_fraction = _VALIDATION
  config.eval.split = "validation"
  if preset == "cpu":
    config.eval.update(line_prompts=0, function_prompts=0)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  shared = model(preset, _SIZES[preset])
  for seed in range(_SEEDS):
    for share in _SHARES[preset]:
      for depth in _DEPTHS:
        yield shared | PARALLEL | {
          "name": f"one_in={share},n={1 + depth},seed={seed}",
          "data.test_fraction": (1 - _VALIDATION) * (1 - 1 / share),
          "mtp.kind": "parallel" if depth else "none",
          "mtp.depth": depth,
          "seed": seed,
        }
