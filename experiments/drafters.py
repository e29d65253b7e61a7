r"""Do drafters that are trained after the fact do as well as those trained jointly?

  python -m launch.sweep --config=experiments/drafters.py:cpu_trunks \
      --workdir=runs/drafters_cpu_trunks --parallel=2
  for run in runs/drafters_cpu_trunks/*/; do
    python -m launch.write_corpus --workdir="$run" --documents=4000 \
        --output="${run}written.jsonl"
  done
  python -m launch.sweep --config=experiments/drafters.py:cpu \
      --workdir=runs/drafters_cpu --parallel=2

The first command trains plain next-token prediction (NTP), the second lets these models
write text, the third trains all else: it looks for those folders by these names, from
where it is started, and begins no trial if one is missing. Everything drafts three
tokens per round.

On the frozen trunk of the NTP run of the same size and seed (`from=ntp`):

- `drafter=medusa`: Medusa-1 (Cai et al. 2024, arXiv 2401.10774), heads with output
  matrices of their own; `medusa_shared`: they read the trunk's.
- `eagle`: EAGLE-1 (Li et al. 2024, arXiv 2401.15077), trained one step deep, soft
  cross-entropy of weight 0.1 beside the feature loss. `eagle3`: EAGLE-3 (Li et al.
  2025, arXiv 2503.01840), trained as it drafts, step k of weight 0.8^(k - 1).
- `modules`: three modules of DeepSeek-V3. `module`: one for all depths, as the rest:
  `module_kl`, `module_tv`, `module_lk` learn the trunk's distribution (see
  `losses.OBJECTIVES`), and `module_kl_written` does so on text that the trunk wrote
  (recursive self-distillation).

Together with their trunk, from the first step (`from=start`): `parallel` heads,
`modules`, one `module`, and `medusa` (Medusa-2, but from the first step).

Equal steps: every drafter gets as many, on the same data in the same order, so that
drafters on an NTP trunk cost more in all. Equal parameters: EAGLE and `module` have the
width of feed-forward layer (`mtp.mlp_dim`) with which they are as large as Medusa with
its own matrices or, with `gpu`, whose layers are larger, as one module;
`medusa_shared`, `modules` and `parallel` are not matched. Learning rates follow the
size and were not tuned for any arm. Weights: head k of Medusa 0.8^k, beside a trunk
that learns too 0.2 times that, a choice of ours; parallel 1 each; modules 0.3 together.

Scores in eval.json: `sampled_tokens_per_round`, `sampled_acceptance` (temperature 1),
`decoded_tokens_per_round` (greedy) and, as the price of training jointly, `main_loss`,
which with a frozen trunk equals the NTP run's. Costs and trees are measured by
`launch.benchmark decode --runs`.

Presets: `cpu`: widths 32 and 64 of gains_with_scale:cpu; `gpu`, with `gpu_trunks` in
`runs/drafters_gpu_trunks`: widths 256 and 384 of gains_with_scale:gpu (200000 documents
to write); three seeds.

Expected, written before any run, for `cpu`: modules on a frozen trunk bring at least
0.9 of the tokens per round of joint ones; Medusa heads on a frozen trunk at most 1.5
tokens, about as many as parallel heads and fewer than modules in every pair; training
them jointly adds less than 0.1. Main loss against NTP: joint modules within 0.02 nats,
joint Medusa within 0.03, parallel heads at least 0.05 worse. EAGLE-3 brings more than
EAGLE-1, and no more than `module_kl`, which is nearly the same thing here; KL more than
the data's cross-entropy when tokens are sampled; LK no more than KL; text that the
trunk wrote a little more than the corpus.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import gains_with_scale
from experiments.gains_with_scale import PARALLEL, SEQUENTIAL

SIZES = {"cpu": gains_with_scale.CPU[1:], "gpu": gains_with_scale.GPU[1:3]}
_PRESETS = (*SIZES, *(f"{machine}_trunks" for machine in SIZES))
_SEEDS = 3
_DEPTH = 3
_VOCABULARY = 264  # Bytes.
# Parameters of a layer besides its feed-forward matrices, in units of d^2 and d.
_AROUND = {"sequential": (6, 5), "eagle": (6, 2), "eagle3": (10, 4)}

_MEDUSA = {
  "mtp.kind": "medusa",
  "mtp.unembed": "own",
  "mtp.weighting": "sum",
  "mtp.depth_weights": tuple(0.8**k for k in range(1, 1 + _DEPTH)),
}
_MODULE = SEQUENTIAL | {"mtp.share_modules": True}
_EAGLE = {
  "mtp.kind": "eagle",
  "mtp.depth": 1,
  "mtp.objective": "kl",
  "mtp.weight": 0.1,
  "mtp.feature_weight": 10.0,
}
_EAGLE3 = {
  "mtp.kind": "eagle3",
  "mtp.objective": "kl",
  "mtp.weighting": "sum",
  "mtp.weight": 1.0,
  "mtp.depth_weights": tuple(0.8**k for k in range(_DEPTH)),
}
_AFTERWARDS = {
  "medusa": _MEDUSA | {"mtp.weight": 1.0},
  "medusa_shared": _MEDUSA | {"mtp.weight": 1.0, "mtp.unembed": "shared"},
  "eagle": _EAGLE,
  "eagle3": _EAGLE3,
  "modules": SEQUENTIAL,
  "module": _MODULE,
  "module_kl": _MODULE | {"mtp.objective": "kl"},
  "module_tv": _MODULE | {"mtp.objective": "tv"},
  "module_lk": _MODULE | {"mtp.objective": "log_acceptance"},
  "module_kl_written": _MODULE | {"mtp.objective": "kl"},
}
_JOINTLY = {
  "parallel": PARALLEL,
  "modules": SEQUENTIAL,
  "module": _MODULE,
  "medusa": _MEDUSA | {"mtp.weight": 0.2},
}


def get_config(preset: str = "cpu") -> ConfigDict:
  if preset not in _PRESETS:
    raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {preset!r}.")
  machine = preset.removesuffix("_trunks")
  config = gains_with_scale.get_config(machine)
  config.name = f"drafters_{preset}"
  config.eval.middle_prompts = 64
  if machine == "cpu":
    config.data.batch_size = 4
    config.eval.max_new_tokens = 32
  if preset == machine:
    config.eval.num_drafts = _DEPTH
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  machine = preset.removesuffix("_trunks")
  for seed in range(_SEEDS):
    for size in SIZES[machine]:
      model = gains_with_scale.rung(machine, size) | {"seed": seed}
      width = f"embed_dim={size.embed_dim}"
      trunk = f"{width},kind=none,seed={seed}"
      if preset != machine:
        yield model | {"name": trunk, "mtp.kind": "none", "mtp.depth": 0}
        continue
      # What a sweep calls the folder of that trial.
      short = f"e{size.embed_dim}-none-s{seed}"
      folder = f"runs/drafters_{machine}_trunks/{short}"
      frozen = {"train.freeze_trunk": True, "train.trunk_from": folder}
      for start, arms, more in (("ntp", _AFTERWARDS, frozen), ("start", _JOINTLY, {})):
        for name, arm in arms.items():
          trial = model | {"mtp.depth": _DEPTH} | arm | more
          if name.endswith("_written"):
            trial["data.train_on"] = f"{folder}/written.jsonl"
          if name.startswith(("module", "eagle")) and name != "modules":
            trial["mtp.mlp_dim"] = mlp_dim(arm["mtp.kind"], model)
          yield trial | {"name": f"{width},from={start},drafter={name},seed={seed}"}


def mlp_dim(kind: str, model: dict) -> int:
  """Returns the feed-forward width with which one layer has the size of the others.

  That is the size of Medusa's heads or, where it is larger, of a module as wide as the
  trunk. A layer has 3 d parameters a unit of width; all else is in units of d^2 and d.
  """
  d, (squares, vectors) = model["trunk.embed_dim"], _AROUND[kind]
  heads = _DEPTH * (d * d + d + d * _VOCABULARY)
  module = 6 * d * d + 5 * d + 3 * d * model["trunk.mlp_dim"]
  left = max(heads, module) - squares * d * d - vectors * d
  return round(left / (3 * d))
