"""Does multi-token prediction help, and does its gain grow with the size of the model?

  python -m launch.sweep --config=experiments/gains_with_scale.py:cpu \
      --workdir=runs/gains_with_scale --parallel=2
  python -m launch.report runs/gains_with_scale

Presets: `cpu` (bytes of the Python standard library, 12 minutes on two cores), `gpu`
(1M to 100M parameters on one accelerator: bytes of the installed packages) and
`cluster` (the ladder of Gloeckle et al. 2024, arXiv 2404.19737, tables S13 and S14, on
text prepared with launch.prepare; see `_cluster`).

At every size, plain next-token prediction (NTP) is compared with parallel heads as in
Gloeckle et al. (sum of all losses) and sequential modules as in DeepSeek-V3 (mean of
the extra losses, lambda 0.3), with 1 and 3 extra tokens. Arm `flops` is NTP trained for
as many FLOPs; `gpu` and `cluster` have arm `shortened` for parallel heads too, the rule
of that paper. `cpu` and `gpu` try other lambdas at the middle size, `gpu` also the step
from 0.3 to 0.1 of DeepSeek-V3, and its NTP has two more seeds. Trials named
`learning_rate=x0.5` and `x2` check that the learning rate chosen for the size suits NTP
(all seeds) and each arm (one seed). Within a size, all trials see the same data in the
same order and start from the same trunk for the same seed.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments import base


class Size(NamedTuple):
  """One rung of a ladder. Fields that the preset does not vary are in its config."""

  embed_dim: int
  num_layers: int
  num_heads: int
  learning_rate: float
  num_steps: int


# The head size is fixed within a ladder, and the learning rate is the rate of
# optimizer.base_width: see mtp_jax/optimizer.py for how it follows the width.
CPU = (
  Size(16, 4, 1, 6e-3, 1000),
  Size(32, 4, 2, 3.5e-3, 1000),
  Size(64, 4, 4, 4.5e-3, 1000),
)
GPU = (
  Size(128, 5, 2, 3e-3, 2_000),
  Size(256, 4, 4, 3e-3, 3_000),
  Size(384, 6, 6, 3e-3, 5_000),
  Size(512, 10, 8, 3e-3, 8_000),
  Size(768, 14, 12, 3e-3, 12_000),
)
CLUSTER = (
  Size(1024, 18, 16, 3e-4, 10_850),
  Size(1280, 27, 20, 3e-4, 10_850),
  Size(2048, 24, 16, 3e-4, 10_850),
  Size(2560, 36, 20, 3e-4, 10_850),
  Size(4096, 32, 32, 3e-4, 25_000),
  Size(5120, 40, 40, 3e-4, 25_000),
)
LADDERS = {"cpu": CPU, "gpu": GPU, "cluster": CLUSTER}

PARALLEL = {"mtp.kind": "parallel", "mtp.weighting": "sum", "mtp.weight": 1.0}
SEQUENTIAL = {"mtp.kind": "sequential", "mtp.weighting": "mean", "mtp.weight": 0.3}
DEPTHS = (1, 3)
SEEDS = {"cpu": (0, 1, 2), "gpu": (0, 1, 2), "cluster": (0, 1)}
NOISE_SEEDS = (3, 4)
LEARNING_RATE_CHECKS = (0.5, 2.0)
WEIGHTS = (0.1, 1.0)  # Other lambdas, for sequential D = 1 at the middle size.

# Of the cluster's sizes, by width: warm-up steps (table S13), and ours: GPUs or TPU
# chips, and over how many of them parameters are split.
_WARMUP_STEPS = {1024: 1000, 1280: 1000, 2048: 1000, 2560: 1000, 4096: 2000, 5120: 1000}
_DEVICES = {1024: 8, 1280: 16, 2048: 32, 2560: 64, 4096: 128, 5120: 256}
_FSDP = {1024: 8, 1280: 8, 2048: 8, 2560: 8, 4096: 16, 5120: 32}
_ROWS_PER_DEVICE = 4


def get_config(preset: str = "cpu") -> ConfigDict:
  if preset not in LADDERS:
    raise ValueError(f"preset must be one of {', '.join(LADDERS)}, got {preset!r}.")
  config = base.get_config()
  config.name = f"gains_with_scale_{preset}"
  {"cpu": _cpu, "gpu": _gpu, "cluster": _cluster}[preset](config)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials of a preset, sizes from small to large."""
  for size in LADDERS[preset]:
    model = rung(preset, size)
    for arm in _arms(preset, size):
      for seed in SEEDS[preset] + _more_seeds(preset, arm):
        trial = model | arm | {"seed": seed}
        yield trial | {"name": _name(trial)}
      for seed in _check_seeds(preset, arm):
        for factor in LEARNING_RATE_CHECKS:
          trial = model | arm | {"seed": seed}
          trial["optimizer.learning_rate"] *= factor
          yield trial | {"name": f"{_name(trial)},learning_rate=x{factor:g}"}
  if preset != "cluster":
    middle = LADDERS[preset][len(LADDERS[preset]) // 2]
    arm = SEQUENTIAL | {"mtp.depth": 1, "mtp.arm": "added"}
    for weight in WEIGHTS:
      for seed in SEEDS[preset]:
        trial = rung(preset, middle) | arm | {"seed": seed}
        name = f"{_name(trial)},weight={weight:g}"
        yield trial | {"mtp.weight": weight, "name": name}
    for seed in SEEDS[preset] if preset == "gpu" else ():
      trial = rung(preset, middle) | arm | {"seed": seed}
      name = f"{_name(trial)},schedule=piecewise"
      yield trial | {"mtp.schedule": "piecewise", "name": name}


def _check_seeds(preset: str, arm: dict) -> tuple[int, ...]:
  """The baseline's learning rate is tuned with all seeds, the others' with one."""
  if arm["mtp.arm"] == "flops":
    return ()
  return SEEDS[preset] if arm["mtp.kind"] == "none" else SEEDS[preset][:1]


def _more_seeds(preset: str, arm: dict) -> tuple[int, ...]:
  is_ntp = arm["mtp.kind"] == "none" and arm["mtp.arm"] == "added"
  return NOISE_SEEDS if preset == "gpu" and is_ntp else ()


def _arms(preset: str, size: Size) -> Iterator[dict]:
  yield {"mtp.kind": "none", "mtp.depth": 0, "mtp.arm": "added"}
  for kind in (PARALLEL, SEQUENTIAL):
    for depth in DEPTHS:
      yield kind | {"mtp.depth": depth, "mtp.arm": "added"}
      # The rule of the paper, where it leaves a trunk.
      if preset != "cpu" and kind is PARALLEL and size.num_layers > 1 + depth:
        yield kind | {"mtp.depth": depth, "mtp.arm": "shortened"}
      # Parallel heads cost a little less: their budget lies between these runs.
      if kind is SEQUENTIAL:
        yield {"mtp.kind": kind["mtp.kind"], "mtp.depth": depth, "mtp.arm": "flops"}


def rung(preset: str, size: Size) -> dict:
  """Returns the overrides of one rung."""
  # Three matrices of this width hold as many numbers as the usual two of 4 d.
  unit = 256 if preset == "cluster" else 32
  mlp_dim = -(-8 * size.embed_dim // (3 * unit)) * unit
  model = {
    "trunk.embed_dim": size.embed_dim,
    "trunk.mlp_dim": mlp_dim,
    "trunk.num_layers": size.num_layers,
    "trunk.num_heads": size.num_heads,
    "trunk.num_kv_heads": size.num_heads,
    "optimizer.learning_rate": size.learning_rate,
    "train.num_steps": size.num_steps,
  }
  return model | (_cluster_model(size) if preset == "cluster" else {})


def _name(trial: dict) -> str:
  parts = {
    "embed_dim": trial["trunk.embed_dim"],
    "kind": trial["mtp.kind"],
    "depth": trial["mtp.depth"],
    "arm": trial["mtp.arm"],
    "seed": trial["seed"],
  }
  return ",".join(f"{key}={value}" for key, value in parts.items())


def _cpu(config: ConfigDict) -> None:
  # Few tokens a step: at this budget more steps are worth more than larger batches.
  config.data.update(seq_len=128, batch_size=2)
  config.optimizer.base_width = 64
  # Comparing gradients takes longer to compile here than it teaches.
  config.train.update(log_every=100, diagnostics_every=0)
  config.checkpoint.update(every_steps=10_000, keep=1)
  config.eval.update(num_rows=512, rows_per_document=8)


def _gpu(config: ConfigDict) -> None:
  config.data.update(source="site_packages", seq_len=1024, batch_size=64)
  config.train.update(log_every=100, diagnostics_every=1000)
  config.checkpoint.update(every_steps=1000, keep=1)
  config.eval.update(
    split="test", num_rows=1024, line_prompts=512, function_prompts=256
  )


def _cluster(config: ConfigDict) -> None:
  """Batches of 8 * 2^20 tokens of a 32k vocabulary, context 4096, lr 3e-4 to 3 %.

  The text is not part of this repository. Prepare it once, and point the sweep at it
  with --config.data.path:

    python -m launch.prepare --config=experiments/gains_with_scale.py:cluster \
        --config.data.source=jsonl --config.data.path='code/*.jsonl.zst' \
        --output=prepared/code_32k
  """
  config.tokenizer.update(kind="bpe", vocab_size=32_768)
  config.data.update(
    source="array_record",
    path="prepared/code_32k",
    seq_len=4096,
    batch_size=2048,
    validation_fraction=0.001,
    test_fraction=0.001,
    num_workers=8,
  )
  config.optimizer.final_fraction = 0.03
  config.trunk.remat = "full"
  config.train.update(log_every=10, diagnostics_every=1000)
  config.checkpoint.update(every_steps=500, keep=2)
  config.eval.update(
    split="test",
    num_rows=4096,
    batch_size=256,
    line_prompts=1024,
    function_prompts=512,
    max_new_tokens=256,
  )


def _cluster_model(size: Size) -> dict:
  """The paper's learning rate is the same at every width, so ours is not scaled."""
  width = size.embed_dim
  microbatch = _DEVICES[width] * _ROWS_PER_DEVICE
  return {
    "optimizer.base_width": width,
    "optimizer.warmup_fraction": _WARMUP_STEPS[width] / size.num_steps,
    "train.accumulation_steps": 2048 // microbatch,
    "mesh.data": _DEVICES[width] // _FSDP[width],
    "mesh.fsdp": _FSDP[width],
  }
