r"""Do drafters that are trained after the fact do as well as those trained jointly?

  python -m launch.sweep --config=experiments/drafters.py:cpu_trunks \
      --workdir=runs/drafters_cpu_trunks --parallel=2
  python -m launch.sweep --config=experiments/drafters.py:cpu \
      --workdir=runs/drafters_cpu --parallel=2

The first command trains plain next-token prediction (NTP), the second all else, once
the first is done: it looks for those run folders by these names, from where it is
started, and begins no trial if one is missing. Five arms, D = 3:

- `from=ntp,kind=medusa`: Medusa heads (Cai et al. 2024, arXiv 2401.10774) on the frozen
  trunk of the NTP run with the same size and seed (Medusa-1);
- `from=ntp,kind=sequential`: the modules of DeepSeek-V3 on the same frozen trunk;
- `from=start`: parallel heads, sequential modules and Medusa heads (Medusa-2, but from
  the first step) trained together with their trunk.

Every drafter gets as many steps on the same data in the same order, so arms on an NTP
trunk cost more in all; learning rates are those of the size and were not tuned for the
arms. Weights: parallel 1 each; sequential 0.3 together; head k of Medusa 0.8^k, which
takes `mtp.depth_weights` of 0.8^k, `mtp.weighting` "sum" ("mean" divides by D) and
`mtp.weight` 1. Beside a trunk that learns too that weight is 0.2, a choice of ours.

Scores, of eval.json: `sampled_tokens_per_round`, `sampled_acceptance` and, the price of
training jointly, `main_loss`: with a frozen trunk it is that of the NTP run.

Presets: `cpu`: widths 32 and 64 of gains_with_scale:cpu; `gpu`, with `gpu_trunks` in
`runs/drafters_gpu_trunks`: widths 256 and 384 of gains_with_scale:gpu; three seeds. Not
yet run.

Expected, written before any run, for `cpu`: modules on a frozen trunk bring at least
0.9 of the tokens per round of joint ones; Medusa heads on a frozen trunk at most 1.5
tokens, about as many as parallel heads and fewer than modules in every pair; training
them jointly adds less than 0.1. Main loss against NTP: joint modules within 0.02 nats,
joint Medusa within 0.03, parallel heads at least 0.05 worse.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import gains_with_scale
from experiments.gains_with_scale import PARALLEL, SEQUENTIAL

_SIZES = {"cpu": gains_with_scale.CPU[1:], "gpu": gains_with_scale.GPU[1:3]}
_PRESETS = (*_SIZES, *(f"{machine}_trunks" for machine in _SIZES))
_SEEDS = 3
_DEPTH = 3
_MEDUSA = {
  "mtp.kind": "medusa",
  "mtp.weighting": "sum",
  "mtp.depth_weights": tuple(0.8**k for k in range(1, 1 + _DEPTH)),
}
_AFTERWARDS = (_MEDUSA | {"mtp.weight": 1.0}, SEQUENTIAL)
_JOINTLY = (PARALLEL, SEQUENTIAL, _MEDUSA | {"mtp.weight": 0.2})


def get_config(preset: str = "cpu") -> ConfigDict:
  if preset not in _PRESETS:
    raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {preset!r}.")
  machine = preset.removesuffix("_trunks")
  config = gains_with_scale.get_config(machine)
  config.name = f"drafters_{preset}"
  if machine == "cpu":
    config.data.batch_size = 4
    config.eval.max_new_tokens = 32
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  machine = preset.removesuffix("_trunks")
  for seed in range(_SEEDS):
    for size in _SIZES[machine]:
      model = gains_with_scale.rung(machine, size) | {"seed": seed}
      width = f"embed_dim={size.embed_dim}"
      trunk = f"{width},kind=none,seed={seed}"
      if preset != machine:
        yield model | {"name": trunk, "mtp.kind": "none", "mtp.depth": 0}
        continue
      frozen = {
        "train.freeze_trunk": True,
        "train.trunk_from": f"runs/drafters_{machine}_trunks/{trunk}",
      }
      for start, kinds, more in (("ntp", _AFTERWARDS, frozen), ("start", _JOINTLY, {})):
        for kind in kinds:
          yield model | kind | more | {
            "name": f"{width},from={start},kind={kind['mtp.kind']},seed={seed}",
            "mtp.depth": _DEPTH,
          }
