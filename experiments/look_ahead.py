"""From which size does predicting more tokens teach a model to look ahead?

  python -m launch.sweep --config=experiments/look_ahead.py:cpu \
      --workdir=runs/look_ahead --parallel=2

Claim: models trained on several tokens at once find the path of a star graph where
next-token prediction (NTP) stays at chance (Bachmann and Nagarajan 2024, arXiv
2403.06963; "TOP", arXiv 2508.19228, table 5, 14M parameters). Published at one size
each; this experiment has a ladder of sizes, and measures time instead of one score.

Design: G(2,3) of 8 labels, fresh graphs, a constant learning rate after warm-up, at
most 3,000 steps of 128. A run stops when the exact path is right for 0.95 of 512
held-out graphs at two validations in a row; validations are log-spaced, four for each
doubling of the step, so that a time is known to 19 %. Score: tokens to the first of the
two, censored at 3,000 steps. Width ladder: 4 layers of width 16 to 128, four heads of
attention. Depth ladder: width 64 with 1 to 8 layers, where "too small to look ahead" is
a matter of layers: every hop needs one. NTP, and parallel heads with n = 2 and 4 at
weight 1; `shortened` (the trunk loses a layer for every extra head, so that sizes are
equal) in the depth ladder. `fixed`: 4,000 graphs read again and again, at widths 16 and
64. With 12 labels, the first design, most seeds of the small widths solve the task
neither way within 4,000 steps (log).

Presets: `cpu_rates` chooses the learning rate of NTP and n = 2 at widths 16 to 64 on
seeds 100 and 101, which are then thrown away (width 128 has the factor of width 64,
n = 4 the factor of n = 2); `cpu` is the experiment, 10 seeds (5 at width 128); `gpu`
and `cluster` continue the widths to 384 and 768, with width 128 in common.

Rules, before the runs. Gain of a size: restricted mean of log tokens of NTP minus that
of n, paired by seed. It *grows* with size if the 95 % interval of its slope on log10
parameters (bootstrap of seeds within sizes) is above 0, *shrinks* if below, is *flat*
within +-0.25 (a factor of 1.3 per decade). A crossing is claimed only if smallest and
largest size have intervals on opposite sides of 0.

Expected, before the runs, from pilots of one or two seeds: at width 64 n = 2 solves the
task sooner (step 362); at width 16 neither method solves it within 3,000 steps for most
seeds; so the gain grows with width. No gain with one or two layers, and a loss for
`shortened` there; n = 4 is slower than n = 2.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.task_setup import check_preset, task_config, width_of

PRESETS = ("cpu", "cpu_rates", "gpu", "cluster")
WIDTHS = {
  "cpu": (16, 32, 64, 128),
  "gpu": (128, 256, 384),
  "cluster": (384, 512, 768),
}
LAYERS = (1, 2, 3, 6, 8)
DEPTHS = (0, 1, 3)
FIXED = 4_000
_SEEDS = {"cpu": 10, "gpu": 5, "cluster": 10}
_TUNING_SEEDS = (100, 101)
_RATE = 3e-3
# On the rate that follows the width; narrow models want less of it.
_FACTORS = {16: (0.25, 0.5, 1.0), 32: (0.25, 0.5, 1.0), 64: (0.5, 1.0, 2.0)}
# What `cpu_rates` chose: the factor on the learning rate by width and n.
# Width 128 has the factors of width 64.
_TUNED: dict[tuple[int, int], float] = {
  (16, 1): 0.25, (16, 2): 1.0,
  (32, 1): 0.25, (32, 2): 0.5,
  (64, 1): 0.5, (64, 2): 2.0,
  (128, 1): 0.5, (128, 2): 2.0,
}


def get_config(preset: str = "cpu") -> ConfigDict:
  check_preset(preset, PRESETS)
  is_cpu = preset.startswith("cpu")
  config = task_config("star_graph", "cpu" if is_cpu else preset)
  config.name = f"look_ahead_{preset}"
  config.tokenizer.vocab_size = 13
  config.task.star_graph.update(arms=2, length=3, num_labels=8)
  config.data.update(seq_len=20, batch_size=128, num_workers=0)
  config.optimizer.update(
    base_width=64, learning_rate=_RATE, schedule="cosine", final_fraction=1.0
  )
  config.train.update(
    num_steps=3_000, log_every=100, evals_per_doubling=4,
    stop_metric="task_accuracy", stop_value=0.95,
  )
  config.eval.update(num_rows=512, batch_size=512, task_examples=512)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  if preset == "cpu_rates":
    for seed in _TUNING_SEEDS:
      for width, factors in _FACTORS.items():
        for depth in DEPTHS[:2]:
          for factor in factors:
            trial = _trial("cpu", width, depth, seed)
            yield trial | {
              "name": f"{trial['name']},rate=x{factor:g}",
              "optimizer.learning_rate": _RATE * factor,
            }
    return
  for seed in range(_SEEDS[preset]):
    for width in WIDTHS[preset]:
      if preset != "cpu" or width < 128 or seed < 5:
        for depth in DEPTHS:
          yield _trial(preset, width, depth, seed)
    if preset == "cpu":
      for layers in LAYERS:
        yield _trial(preset, 64, 0, seed, layers=layers)
        # A head is a layer: the trunk keeps at least one.
        if layers > 1:
          yield _trial(preset, 64, 1, seed, layers=layers)
        if layers > 2:
          yield _trial(preset, 64, 1, seed, layers=layers, arm="shortened")
      for width in (16, 64):
        for depth in (0, 1):
          yield _trial(preset, width, depth, seed, num_train=FIXED)


def _trial(
  preset: str,
  width: int,
  depth: int,
  seed: int,
  layers: int = 4,
  arm: str = "added",
  num_train: int = 0,
) -> dict:
  name = f"width={width},layers={layers},train={num_train or 'endless'}"
  method = f"n={1 + depth}" + (f",arm={arm}" if arm != "added" else "")
  return width_of(width, head=width // 4 if preset == "cpu" else 64) | {
    "name": f"{name},{method},seed={seed}",
    "trunk.num_layers": layers,
    "task.num_train": num_train,
    "mtp.kind": "parallel" if depth else "none",
    "mtp.depth": depth,
    "mtp.arm": arm,
    "optimizer.learning_rate": _RATE * _TUNED.get((width, min(1 + depth, 2)), 1.0),
    "seed": seed,
    "data.seed": seed,
  }
