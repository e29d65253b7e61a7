r"""Every kind of predictor on one trunk: what each drafts, and what each costs?

  python -m launch.sweep --config=experiments/kinds.py:cpu_trunks \
      --workdir=runs/kinds_cpu_trunks --parallel=1
  python -m launch.sweep --config=experiments/kinds.py:cpu --workdir=runs/kinds_cpu \
      --parallel=1
  python -m launch.sweep --config=experiments/kinds.py:cpu_siblings \
      --workdir=runs/kinds_cpu_siblings --parallel=1

The first command trains plain next-token prediction (NTP); the second trains all else,
and looks for the folders of the first from where it is started. The third trains every
kind with its trunk, at one extra depth of weight 1, on the siblings of
`experiments/siblings.py`: 1,000 triples, widths 32 and 64, five seeds.

All kinds learn the cross-entropy with the data at three extra depths of equal weight,
for as many steps on the same data in the same order, and draft three tokens a round.
So kinds are compared by their architecture: the objectives and weights of their papers
(KL, feature loss, weights that decay) are in `experiments/drafters.py`. What a kind
must have stays: Medusa heads have matrices of their own, heads with a Markov head have
a table of rank 256 (DSpark's), DFlash has two layers. `one_module` is one module for
all depths, with the weights 1, 0.6, 0.36 of FastMTP (arXiv 2509.18362; there
divided by their sum, which Adam does not see on a frozen trunk). TOP (arXiv 2508.19228)
ranks 32 tokens and drafts nothing.

`from=ntp`: on the frozen trunk of the NTP run of the same seed. `from=start`: with the
trunk, from the first step. Parallel heads n = 4 have a part of the trunk as their first
head, and TOP changes nothing but its trunk: both have no `from=ntp`. Weights there:
parallel heads and TOP 1 for each depth, as published, the other kinds 0.3 together.

Scores in eval.json: `main_loss`, `decoded_tokens_per_round` (greedy), and at
temperature 1 `sample_proposal_tokens_per_round` (drafts are drawn from the predictors'
distribution) and `argmax_proposal_tokens_per_round` (drafts are the most likely
tokens).

Presets: `cpu`: width 32 of gains_with_scale:cpu; `gpu`, with `gpu_trunks` in
`runs/kinds_gpu_trunks`: width 384 of gains_with_scale:gpu. Three seeds. Rules stand in
`mtp_jax/analysis/claims/kinds.py`, what was expected in the log. In `cpu_siblings` NTP
and parallel heads have the rate and decay that were tuned for NTP and n = 2; the other
kinds have the settings of n = 2.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import drafters, gains_with_scale, siblings
from experiments.gains_with_scale import PARALLEL

_SEEDS = (1, 2, 3)  # Seed 0 of four arms was seen when the commands were checked.
_SIZES = {"cpu": gains_with_scale.CPU[1], "gpu": gains_with_scale.GPU[2]}
_SIBLINGS = "cpu_siblings"
_PRESETS = (*_SIZES, *(f"{machine}_trunks" for machine in _SIZES), _SIBLINGS)
_SIBLING_WIDTHS = (32, 64)
_RANK = 256
_HEADS = {
  "parallel": {},
  "parallel_markov": {"mtp.markov_rank": _RANK},
}
_AFTER_OR_BEFORE = {
  "linear": {"mtp.kind": "linear"},
  "medusa": {"mtp.kind": "medusa", "mtp.unembed": "own"},
  "medusa_markov": {
    "mtp.kind": "medusa", "mtp.unembed": "own", "mtp.markov_rank": _RANK
  },
  "modules": {"mtp.kind": "sequential"},
  "one_module": {
    "mtp.kind": "sequential", "mtp.share_modules": True,
    "mtp.depth_weights": (1.0, 0.6, 0.36),
  },
  "eagle": {"mtp.kind": "eagle"},
  "eagle3": {"mtp.kind": "eagle3"},
  "peagle": {"mtp.kind": "peagle"},
  "dflash": {"mtp.kind": "dflash"},
}
_TOP = {"mtp.kind": "top", "mtp.depth": 1, "mtp.unembed": "own", "mtp.weight": 1.0}
_NTP = {"mtp.kind": "none", "mtp.depth": 0}


def get_config(preset: str = "cpu") -> ConfigDict:
  if preset not in _PRESETS:
    raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {preset!r}.")
  if preset == _SIBLINGS:
    config = siblings.get_config("cpu")
    config.name = f"kinds_{preset}"
    return config
  machine = preset.removesuffix("_trunks")
  config = drafters.get_config(f"{machine}_trunks")
  config.name = f"kinds_{preset}"
  config.eval.both_proposals = preset == machine
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  if preset == _SIBLINGS:
    yield from _sibling_trials()
    return
  machine = preset.removesuffix("_trunks")
  size = _SIZES[machine]
  for seed in _SEEDS:
    model = gains_with_scale.rung(machine, size) | {"seed": seed}
    if preset != machine:
      yield model | _NTP | {"name": f"kind=none,seed={seed}"}
      continue
    # What a sweep calls the folder of that trial.
    folder = f"runs/kinds_{machine}_trunks/none-s{seed}"
    frozen = {"train.freeze_trunk": True, "train.trunk_from": folder}
    heads = {name: PARALLEL | arm for name, arm in _HEADS.items()} | {"top": _TOP}
    for start, arms, more in (
      ("ntp", _AFTER_OR_BEFORE, frozen), ("start", _AFTER_OR_BEFORE, {}),
      ("start", heads, {}),
    ):
      for name, arm in arms.items():
        trial = model | {"mtp.depth": 3} | arm | more
        yield trial | {"name": f"from={start},kind={name},seed={seed}"}


def _sibling_trials() -> Iterator[dict]:
  heads = {name: {"mtp.kind": "parallel"} | arm for name, arm in _HEADS.items()}
  # With one depth, one module for all depths is a module.
  others = {x: arm for x, arm in _AFTER_OR_BEFORE.items() if x != "one_module"}
  # A row has 14 tokens.
  top = _TOP | {"mtp.window": 8}
  for seed in range(1, 6):
    for width in _SIBLING_WIDTHS:
      for name, arm in ({"none": _NTP} | heads | others | {"top": top}).items():
        trial = siblings.trial("cpu", width, 1_000, float(name != "none"), seed) | arm
        yield trial | {"name": f"width={width},kind={name},seed={seed}"}
