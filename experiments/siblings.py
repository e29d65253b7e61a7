"""Does the gain of predicting more tokens grow with the model, or with repetition?

  python -m launch.sweep --config=experiments/siblings.py:cpu \
      --workdir=runs/siblings --parallel=2

Claim: gains grow with scale (Gloeckle et al. 2024, arXiv 2404.19737, figure 3, code,
0.3B to 13B parameters). Two causes fit: the size of the model alone, or its capacity
over the amount of data. This experiment varies both. The task is sibling discovery
(Nagarajan et al. 2025, arXiv 2504.15266): name two children of one parent, then the
parent. The next-token model (NTP) can learn the pairs of its training set by heart;
a head that predicts two tokens ahead reads the parent from the first child.

Design: 5 parents of 100 children (49,500 triples); training sets of 1,000, 3,000,
10,000 triples and fresh triples without end; 900 steps of 64 examples in every trial,
which is 58, 19, 6 and 1 passes. Widths 8 to 128 with 4 layers. NTP, and two parallel
heads (n = 2) at weight 1 and 0.3. A pair has the same seed, hence the same training
set, order and trunk initialisation. Validation and test prompts are measured every 50
steps: the best step is the one with the lowest loss on the validation prompts, and is
read on the test prompts.

Scores, in this order: held-out next-token loss at the best step (`loss`, nats per
token; a perfect model has 2.701), share of new and coherent answers at the best step
(`task_new`), share of coherent answers (`task_accuracy`); then all of them at the last
step. Gain is NTP minus n = 2 for the loss and n = 2 minus NTP for the shares.

Presets: `cpu_rates` chooses the learning rate and the weight decay of every width,
method and training set on seeds 100 and 101, which are then thrown away; `cpu` is the
experiment, 10 seeds (5 at width 128 and at weight 0.3); `gpu` and `cluster` continue
the ladder of widths to 768 and 1,536, with width 128 (1M) in common. `reproduce` is the
part of `cpu` that `make reproduce` trains: widths 8, 32 and 64, 1,000 triples, seeds 0
to 4; `second_seeds` is the same with seeds 5 to 9.

Rules, before the runs. For each training set: the slope of the gain on log10 of NTP's
parameters, 95 % interval by bootstrap of the seeds within sizes. *Grows* if the
interval is above 0, *shrinks* if below, *flat* if it lies within 0.005 nats (2 points)
per decade. Interaction: ordinary least squares of the gain on log10 parameters, log10
of the set's size and their product over the three finite sets; "capacity over data" if
the coefficients of log10 parameters and of minus log10 of the set's size are both above
0. A cell's gain counts as nil within 0.01 nats.

Expected, before the runs, from pilots with seeds that are thrown away (one or two
seeds, one rate): with the fixed sets the gain in loss grows with size (10,000 triples:
about 0, 0.016, 0.037 nats at 9k, 85k, 1.1M parameters); with endless triples it shrinks
(0.008, 0.004, 0.001). At weight 0.3 the same signs, smaller. New and coherent answers:
n = 2 above NTP in every cell with a fixed set.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.task_setup import REPRODUCE, check_preset, task_config, width_of

PRESETS = ("cpu", "cpu_rates", "gpu", "cluster", *REPRODUCE)
WIDTHS = {
  "cpu": (8, 16, 32, 64, 128),
  "gpu": (128, 256, 384, 512, 768),
  "cluster": (768, 1024, 1536),
}
ENDLESS = 0
TRAINING_SETS = (1_000, 3_000, 10_000, ENDLESS)
WEIGHTS = (1.0, 0.3)
_SEEDS = {"cpu": 10, "gpu": 5, "cluster": 5}
_TUNING_SEEDS = (100, 101)
_RATE = 3e-3
_FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_DECAYS = (0.1, 1.0, 3.0, 10.0)


class Tuned(NamedTuple):
  """What `cpu_rates` chose: factor on the learning rate, and weight decay.

  The defaults are for the widths of `gpu` and `cluster`, which have not been tuned.
  """

  factor: float = 1.0
  weight_decay: float = 0.1


# A table for each number of triples, with keys (width, n). Width 32 with 3,000 triples
# and widths 16 and 128 with 1,000 were not tuned and use the settings of a neighbour.
# Width 128 with 3,000 was tuned on one seed, over weight decays 1 and 3 at factor 8.
_TUNED_3000 = {
  (8, 1): Tuned(4.0, 1.0),
  (8, 2): Tuned(4.0, 0.1),
  (16, 1): Tuned(8.0, 1.0),
  (16, 2): Tuned(8.0, 1.0),
  (32, 1): Tuned(8.0, 1.0),
  (32, 2): Tuned(8.0, 1.0),
  (64, 1): Tuned(4.0, 3.0),
  (64, 2): Tuned(8.0, 1.0),
  (128, 1): Tuned(8.0, 3.0),
  (128, 2): Tuned(8.0, 3.0),
}
_TUNED_1000 = {
  (8, 1): Tuned(2.0, 3.0),
  (8, 2): Tuned(8.0, 1.0),
  (16, 1): Tuned(2.0, 3.0),
  (16, 2): Tuned(8.0, 1.0),
  (32, 1): Tuned(8.0, 3.0),
  (32, 2): Tuned(4.0, 3.0),
  (64, 1): Tuned(8.0, 3.0),
  (64, 2): Tuned(4.0, 3.0),
  (128, 1): Tuned(8.0, 3.0),
  (128, 2): Tuned(4.0, 3.0),
}
# Widths 16 and 128 use the settings of a neighbour.
_TUNED_10000 = {
  (8, 1): Tuned(4.0, 0.1),
  (8, 2): Tuned(4.0, 0.1),
  (16, 1): Tuned(4.0, 0.1),
  (16, 2): Tuned(4.0, 0.1),
  (32, 1): Tuned(8.0, 0.1),
  (32, 2): Tuned(4.0, 0.1),
  (64, 1): Tuned(8.0, 0.1),
  (64, 2): Tuned(8.0, 0.1),
  (128, 1): Tuned(8.0, 0.1),
  (128, 2): Tuned(8.0, 0.1),
}
_TUNED = {1_000: _TUNED_1000, 3_000: _TUNED_3000, 10_000: _TUNED_10000}
# With endless triples the factor 4 is best, or within 0.003 nats of the best, at widths
# 8, 16 and 64.
_TUNED_ENDLESS = Tuned(4.0, 0.1)


def get_config(preset: str = "cpu") -> ConfigDict:
  check_preset(preset, PRESETS)
  config = task_config("siblings", preset if preset in ("gpu", "cluster") else "cpu")
  config.name = f"siblings_{preset}"
  config.task.siblings.update(num_parents=5, num_children=100, prefix_length=8)
  # Symbols, and what every tokenizer has beside them.
  config.tokenizer.vocab_size = 544
  config.data.update(seq_len=14, batch_size=64, num_workers=0)
  config.optimizer.update(base_width=64, learning_rate=_RATE)
  config.train.update(num_steps=900, log_every=100, eval_every=50, eval_test=True)
  config.eval.update(
    split="test", num_rows=1024, batch_size=512, task_examples=1024
  )
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  if preset == "cpu_rates":
    yield from _rate_trials()
    return
  if preset in REPRODUCE:
    for seed, width, weight in itertools.product(
      REPRODUCE[preset], (8, 32, 64), (0.0, 1.0)
    ):
      yield trial("cpu", width, 1_000, weight, seed)
    return
  for seed in range(_SEEDS[preset]):
    for width in WIDTHS[preset]:
      if seed < 5 or width < 128:
        for num_train in TRAINING_SETS:
          for weight in (0.0, *WEIGHTS) if seed < 5 else (0.0, 1.0):
            yield trial(preset, width, num_train, weight, seed)


def _rate_trials() -> Iterator[dict]:
  cells = itertools.product(
    _TUNING_SEEDS, WIDTHS["cpu"], TRAINING_SETS, (0.0, 1.0)
  )
  for seed, width, num_train, weight in cells:
    own = trial("cpu", width, num_train, weight, seed)
    for factor in _FACTORS:
      for decay in _DECAYS if num_train else _DECAYS[:1]:
        yield own | {
          "name": f"{own['name']},rate=x{factor:g},decay={decay:g}",
          "optimizer.learning_rate": _RATE * factor,
          "optimizer.weight_decay": decay,
        }


def trial(preset: str, width: int, num_train: int, weight: float, seed: int) -> dict:
  """Returns the overrides of NTP (weight 0) or of n = 2, with their tuned settings."""
  depth = int(weight > 0)
  if num_train:
    tuned = _TUNED[num_train].get((width, 1 + depth), Tuned())
  else:
    tuned = _TUNED_ENDLESS
  method = f"n={1 + depth}" + (f",weight={weight:g}" if depth else "")
  return width_of(width, head=16 if preset == "cpu" else 64) | {
    "name": f"width={width},train={num_train or 'endless'},{method},seed={seed}",
    "task.num_train": num_train,
    "mtp.kind": "parallel" if depth else "none",
    "mtp.depth": depth,
    "mtp.weight": weight or 1.0,
    "optimizer.learning_rate": _RATE * tuned.factor,
    "optimizer.weight_decay": tuned.weight_decay,
    "seed": seed,
    "data.seed": seed,
  }
