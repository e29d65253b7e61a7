"""Which predictor is worth its parameters and FLOPs: parallel, sequential or linear?

  python -m launch.sweep --config=experiments/head_design.py --workdir=runs/head_design

All predict two extra tokens under the same total weight. Arm `added` puts them on top
of one trunk; arm `shortened` takes as many layers from the trunk, so that the number of
parameters stays (Gloeckle et al. 2024, section 3); arm `flops` is plain next-token
prediction trained for longer, for the FLOPs that the named kind would have cost.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import base

_ADDED = (
  {"mtp.kind": "none", "mtp.depth": 0},
  {"mtp.kind": "linear"},
  {"mtp.kind": "parallel"},
  {"mtp.kind": "sequential"},
  {"mtp.kind": "sequential", "mtp.share_modules": True},
)


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "head_design"
  config.mtp.depth = 2
  return config


def sweep_head() -> Iterator[dict]:
  yield from _ADDED
  for arm in ("shortened", "flops"):
    for kind in ("parallel", "sequential"):
      yield {"mtp.kind": kind, "mtp.arm": arm}


def sweep_seed() -> Iterator[dict]:
  for seed in range(3):
    yield {"seed": seed}
