"""What do extra losses cost a small model's next-token likelihood, and does that fall?

  python -m launch.sweep --config=experiments/tax.py:cpu --workdir=runs/tax --parallel=2

Claim: extra losses raise the next-token loss of small models, and cost less the larger
the model is ("TOP", arXiv 2508.19228, table 2: sequential modules cost 0.30, 0.16, 0.07
nats of log perplexity on LAMBADA at 340M, 1.8B, 7B; DeepSeek-V3, arXiv 2412.19437,
table 4: nothing at 15.7B and 228.7B). Nothing is published as a ladder below 340M.

Design: bytes of the Python standard library, rows of 128, 8 rows a step, 9,766 steps:
10 MB. Widths 16, 32, 64, 128 with 4 layers (25k to 1.1M parameters). NTP; parallel
heads n = 2 and n = 4 at weight 1; one sequential module at weight 0.3. At width 64 the
cross of kind, D in {1, 3} and lambda in {0.1, 0.3, 1}. `passes`: the same number of
steps over text that comes 3, 7 and 20 times, at widths 16, 64, 128 for NTP and n = 2.
Score: `main_loss` of eval.json, nats per byte, paired by seed. Tax is method minus NTP.

Presets: `cpu_rates` chooses the learning rate of every width and method on seed 100,
which is then thrown away; `cpu` is the experiment, 5 seeds (3 at width 128); `gpu`
(1M to 30M, the same text) and `cluster` (to 300M, the installed packages) continue the
ladder, with width 128 in common. `reproduce` is what `make reproduce` trains: widths
16, 32 and 64, NTP and n = 4, 500 steps, three seeds; `second_seeds` is the same with
others.

Rules, before the runs. The tax *falls* with size if the slope of log10 tax on log10
parameters is below 0 (95 %, bootstrap of seeds within sizes); where a tax is not above
0 at every size, the slope of the tax itself. One module at weight 0.3 costs *nothing*
if its interval (90 %, two one-sided tests) lies within 0.01 nats. With lambda the tax
rises if the trend over {0.1, 0.3, 1} is above 0.

Expected, before the runs: a tax above 0 for n = 4 at every size, which falls; n = 2
less; one module at weight 0.3 nothing. On repeated text n = 2 costs less than on fresh
text, and gains at 20 passes at width 128 (pilot, one seed: +0.061 nats at the last step
after 7 passes of 0.2 MB).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.gains_with_scale import PARALLEL, SEQUENTIAL, Size, rung
from experiments.task_setup import REPRODUCE, check_preset
from experiments.text_setup import text_config

PRESETS = ("cpu", "cpu_rates", "gpu", "cluster", *REPRODUCE)
_NTP = {"mtp.kind": "none", "mtp.depth": 0}
ARMS = {
  "n=1": _NTP,
  "n=2": PARALLEL | {"mtp.depth": 1},
  "n=4": PARALLEL | {"mtp.depth": 3},
  "module": SEQUENTIAL | {"mtp.depth": 1},
}
SIZES = {
  "cpu": (
    Size(16, 4, 1, 6e-3, 9_766),
    Size(32, 4, 2, 3.5e-3, 9_766),
    Size(64, 4, 4, 4.5e-3, 9_766),
    Size(128, 4, 8, 4.5e-3, 9_766),
  ),
  "gpu": (
    Size(128, 4, 2, 4.5e-3, 9_766),
    Size(256, 4, 4, 3e-3, 9_766),
    Size(384, 6, 6, 3e-3, 9_766),
    Size(512, 10, 8, 3e-3, 9_766),
  ),
  "cluster": (
    Size(512, 10, 8, 3e-3, 8_000),
    Size(768, 14, 12, 3e-3, 12_000),
    Size(1024, 24, 16, 2e-3, 24_000),
  ),
}
PASSES = (3, 7, 20)
LAMBDAS = (0.1, 0.3, 1.0)
_FACTORS = (0.5, 1.0, 2.0)
_TUNING_SEED = 100
_VALIDATION = 0.05
# Bytes of the whole text, and bytes that a trial reads.
_TEXT, _READ = 31.5e6, 10e6
# What `cpu_rates` chose: the factor on the learning rate by width and arm.
_TUNED: dict[tuple[int, str], float] = {}


def get_config(preset: str = "cpu") -> ConfigDict:
  check_preset(preset, PRESETS)
  config = text_config("tax", preset if preset in ("gpu", "cluster") else "cpu")
  config.name = f"tax_{preset}"
  config.data.update(validation_fraction=_VALIDATION)
  if preset == "cluster":
    config.data.update(seq_len=1024, batch_size=64)
  else:
    config.data.update(source="stdlib", seq_len=128, batch_size=8)
  config.train.update(log_every=500, evals_per_doubling=1)
  config.eval.update(split="validation", line_prompts=0, function_prompts=0)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  if preset == "cpu_rates":
    yield from _rate_trials()
    return
  if preset in REPRODUCE:
    for seed in REPRODUCE[preset][:3]:
      for size in SIZES["cpu"][:3]:
        for arm in ("n=1", "n=4"):
          yield _trial("cpu", size._replace(num_steps=500), arm, seed)
    return
  sizes = SIZES[preset]
  for seed in range(5):
    for size in sizes:
      if preset != "cpu" or size.embed_dim < 128 or seed < 3:
        for arm in ARMS:
          yield _trial(preset, size, arm, seed)
    if preset == "cpu":
      if seed < 3:
        yield from _lambda_trials(sizes[2], seed)
        for size in (sizes[0], sizes[2], sizes[3]):
          for passes in PASSES:
            for arm in ("n=1", "n=2"):
              yield _trial(preset, size, arm, seed, passes=passes)


def _rate_trials() -> Iterator[dict]:
  """A fifth of the steps; the rates of widths between follow (`optimizer.py`)."""
  for size in (SIZES["cpu"][0], SIZES["cpu"][2]):
    for arm in ARMS:
      trial = _trial("cpu", size, arm, _TUNING_SEED)
      for factor in _FACTORS:
        yield trial | {
          "name": f"{trial['name']},rate=x{factor:g}",
          "optimizer.learning_rate": size.learning_rate * factor,
          "train.num_steps": size.num_steps // 5,
        }


def _lambda_trials(size: Size, seed: int) -> Iterator[dict]:
  for kind in (PARALLEL, SEQUENTIAL):
    for depth in (1, 3):
      for weight in LAMBDAS:
        arm = kind | {"mtp.depth": depth, "mtp.weight": weight}
        if arm not in ARMS.values():
          name = f"{kind['mtp.kind']},depth={depth},lambda={weight:g}"
          yield _trial("cpu", size, name, seed, arm)


def _trial(
  preset: str,
  size: Size,
  name: str,
  seed: int,
  arm: dict | None = None,
  passes: int = 1,
) -> dict:
  trial = rung("cpu" if preset == "cpu" else "gpu", size) | (arm or ARMS[name])
  trial["optimizer.learning_rate"] *= _TUNED.get((size.embed_dim, name), 1.0)
  if passes > 1:
    trial["data.test_fraction"] = 1 - _VALIDATION - _READ / passes / _TEXT
  return trial | {
    "name": f"width={size.embed_dim},passes={passes},{name},seed={seed}",
    "mtp.arm": "added",
    "seed": seed,
    "data.seed": seed,
  }
