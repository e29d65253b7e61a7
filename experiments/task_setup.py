"""Shared setup of the experiments on synthetic tasks; not an experiment itself."""

from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from experiments import base

PRESETS = ("cpu", "gpu", "cluster")
# Presets of what `make reproduce` trains, on two sets of seeds.
REPRODUCE = {"reproduce": range(5), "second_seeds": range(5, 10)}


def check_preset(preset: str, presets: Sequence[str] = PRESETS) -> None:
  if preset not in presets:
    raise ValueError(f"preset must be one of {', '.join(presets)}, got {preset!r}.")


def task_config(task: str, preset: str) -> ConfigDict:
  """Returns the config of a task; every extra predictor has weight 1.

  Raises:
    ValueError: preset is not one of `PRESETS`.
  """
  check_preset(preset)
  config = base.get_config()
  config.name = f"{task}_{preset}"
  config.tokenizer.kind = "symbols"
  config.data.source = task
  config.mtp.update(weighting="sum", weight=1.0)
  config.train.diagnostics_every = 0
  config.checkpoint.update(every_steps=10_000, keep=1)
  if preset == "cpu":
    config.trunk.update(
      num_layers=4, embed_dim=64, mlp_dim=176, num_heads=4, num_kv_heads=4
    )
    config.optimizer.update(base_width=64, learning_rate=3e-3)
    config.eval.update(num_rows=512, batch_size=128, task_examples=512)
  else:
    config.data.num_workers = 4
    config.eval.update(
      split="test", num_rows=4096, batch_size=1024, task_examples=10_000
    )
  return config


def width_of(width: int, head: int) -> dict:
  """Returns the overrides of a rung of a ladder of widths, with heads of one size."""
  num_heads = max(1, width // head)
  return {
    "trunk.embed_dim": width,
    # Three matrices of this width hold as many numbers as the usual two of 4 d.
    "trunk.mlp_dim": -(-8 * width // 24) * 8,
    "trunk.num_heads": num_heads,
    "trunk.num_kv_heads": num_heads,
  }


def numbers_of_tokens(depths: Sequence[int], seeds: int) -> Iterator[dict]:
  """Yields NTP (depth 0) and parallel heads, n = depth + 1 tokens at once.

  Seed by seed, so that a sweep cut short still compares; a seed has its own examples.
  """
  for seed in range(seeds):
    for depth in depths:
      yield {
        "name": f"n={1 + depth},seed={seed}",
        "mtp.kind": "parallel" if depth else "none",
        "mtp.depth": depth,
        "seed": seed,
        "data.seed": seed,
      }
