"""Can the extra losses fade or come in turn, and keep their drafts?

  python -m launch.sweep --config=experiments/schedules.py:cpu \
      --workdir=runs/schedules --parallel=2

Claims: switching depths off one by one (reverse curriculum) or letting their weight
fall to 0 takes away much of what they cost the next-token loss; only a constant weight
or switching depths on one by one (forward) keeps drafts that are accepted (Aynetdinov
and Akbik 2025, arXiv 2505.22757, on curricula; DeepSeek-V3, arXiv 2412.19437, has the
fall from 0.3 to 0.1). Scores in eval.json: `main_loss` minus the `main_loss` of
next-token prediction (NTP) with the same seed, and `sampled_tokens_per_round`.

Parallel heads, D = 3, at weight 1 each, where the cost is largest: constant, 1 -> 0.1,
fall to 0 (each at two thirds of training), forward, reverse. One sequential module at
weight 0.3: constant, 0.3 -> 0.1, fall to 0.

Presets: `cpu`: the middle model of gains_with_scale:cpu; three seeds. `gpu`: the model
of width 384 of gains_with_scale:gpu, three seeds; `cluster`: of width 768, five.
Neither was run.

Expected, before the run of `cpu`: reverse and the fall to 0 close at least half of the
cost of the constant weight; forward keeps at least 0.9 of the accepted length, reverse
and the fall to 0 keep less.

`cpu` took 17 minutes on one core, beside other programs; found: experiments/README.md.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import gains_with_scale
from experiments.gains_with_scale import PARALLEL, SEQUENTIAL
from experiments.text_setup import model, text_config

_SIZES = {
  "cpu": gains_with_scale.CPU[1],
  "gpu": gains_with_scale.GPU[2],
  "cluster": gains_with_scale.GPU[4],
}
_SEEDS = {"cpu": 3, "gpu": 3, "cluster": 5}
_SCHEDULES = {
  name: {"mtp.schedule": name, "mtp.curriculum": "none"}
  for name in ("constant", "piecewise", "anneal")
}
_CURRICULA = {
  name: {"mtp.schedule": "constant", "mtp.curriculum": name}
  for name in ("forward", "reverse")
}


def get_config(preset: str = "cpu") -> ConfigDict:
  config = text_config("schedules", preset)
  if preset == "cpu":
    config.eval.max_new_tokens = 32
  config.mtp.final_weight = 0.1
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  shared = model(preset, _SIZES[preset])
  for seed in range(_SEEDS[preset]):
    for arm, settings in _arms():
      yield shared | settings | {"name": f"{arm},seed={seed}", "seed": seed}


def _arms() -> Iterator[tuple[str, dict]]:
  yield "kind=none", {"mtp.kind": "none", "mtp.depth": 0}
  for name, schedule in (_SCHEDULES | _CURRICULA).items():
    yield f"kind=parallel,{name}", PARALLEL | schedule | {"mtp.depth": 3}
  for name, schedule in _SCHEDULES.items():
    yield f"kind=sequential,{name}", SEQUENTIAL | schedule | {"mtp.depth": 1}
