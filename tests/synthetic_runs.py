"""Run folders with planted numbers: what the analysis should find is known."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax import accounting
from mtp_jax.config import Config, to_dict
from tests.common import tiny_config

# Three model sizes, each about four times the one before.
WIDTHS = (16, 32, 64)
BEST_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class World:
  """How losses come about.

  gain:      {(kind, depth): (gain at the smallest size, gain per decade of size)}.
  size_step: how much NTP improves per decade of size.
  best_rate: where the loss is least, as a function of the peak learning rate.
  seed_noise, trial_noise: noise shared by the trials of a seed, and of each trial.
  """

  gain: dict[tuple[str, int], tuple[float, float]]
  size_step: float = 0.5
  best_rate: float = BEST_RATE
  seed_noise: float = 0.05
  trial_noise: float = 0.001
  speed: float = 1e9  # FLOPs per second.


def trial_config(
  width: int,
  kind: str = "none",
  depth: int = 0,
  seed: int = 0,
  rate: float = BEST_RATE,
  overrides: dict[str, Any] | None = None,
) -> Config:
  values = {
    "trunk.embed_dim": width,
    "trunk.mlp_dim": 2 * width,
    "trunk.num_layers": 5,
    "seed": seed,
    "data.seed": seed,
    "optimizer.learning_rate": rate,
    "train.num_steps": 100,
  }
  return tiny_config(kind, depth, values | (overrides or {}))


def write_trial(
  root: Path,
  world: World,
  config: Config,
  *,
  name: str = "",
  finished: bool = True,
  run_json: dict[str, Any] | None = None,
) -> Path:
  """Writes the run folder that training `config` in `world` would leave."""
  resolved = accounting.resolve(config)
  mtp, steps = resolved.mtp, resolved.train.num_steps
  rng = np.random.default_rng([config.seed, config.data.seed, config.trunk.embed_dim])
  seed_noise = rng.normal(0.0, world.seed_noise)
  trial = [mtp.depth, config.mtp.depth, len(config.mtp.kind), len(config.mtp.arm)]
  own = np.random.default_rng([config.seed, config.trunk.embed_dim, *trial])
  decades = math.log10(config.trunk.embed_dim / WIDTHS[0]) * 2  # Roughly: N ~ width^2.
  loss = 3.0 - world.size_step * decades - 0.3 * math.log10(steps / 100)
  loss += 0.2 * math.log(config.optimizer.learning_rate / world.best_rate) ** 2
  start, slope = world.gain.get((mtp.kind, mtp.depth), (0.0, 0.0))
  loss += seed_noise + own.normal(0.0, world.trial_noise) - start - slope * decades
  tokens = steps * resolved.data.batch_size * resolved.data.seq_len
  flops = tokens * accounting.train_flops_per_token(resolved)
  folder = root / (name or _name(config))
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(to_dict(config)))
  lines = [
    {
      "kind": "train", "step": step, "nonfinite_steps": 0, "seconds": 1.0,
      "tokens": step * tokens / steps, "loss": [loss + 1 / step] * (1 + mtp.depth),
    }
    for step in (steps // 2, steps)[: 2 if finished else 1]
  ]
  for part in (0.25, 0.5, 1.0)[: 3 if finished else 1]:
    lines.append({
      "kind": "validation", "step": int(part * steps), "tokens": part * tokens,
      "seconds": part * flops / world.speed, "bits_per_byte": loss / math.log(2),
      "loss": [loss - math.log(part)] * (1 + mtp.depth),
    })
  (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  if finished:
    evaluation = _evaluation(loss, mtp.depth) | {
      "step": steps, "tokens": tokens, "train_flops": flops,
      "train_seconds": flops / world.speed, "split": "validation",
    }
    (folder / "eval.json").write_text(json.dumps(evaluation))
  if run_json is not None:
    (folder / "run.json").write_text(json.dumps(run_json))
  return folder


def write_ladder(
  root: Path,
  world: World,
  *,
  widths: tuple[int, ...] = WIDTHS,
  seeds: tuple[int, ...] = (0, 1, 2),
  rates: tuple[float, ...] = (BEST_RATE / 2, 2 * BEST_RATE),
  arms: tuple[str, ...] = ("added", "flops"),
) -> Path:
  """Writes NTP and each method of `world` at every size, and its rate checks."""
  for width in widths:
    for kind, depth in [("none", 0), *world.gain]:
      for seed in seeds:
        for arm in arms if depth else ("added",):
          config = trial_config(width, kind, depth, seed, overrides={"mtp.arm": arm})
          write_trial(root, world, config)
      for rate in rates:
        write_trial(root, world, trial_config(width, kind, depth, seeds[0], rate))
  return root


def _name(config: Config) -> str:
  return (
    f"w{config.trunk.embed_dim}-{config.mtp.kind}{config.mtp.depth}-{config.mtp.arm}"
    f"-l{config.mtp.weight:g}-lr{config.optimizer.learning_rate:g}-s{config.seed}"
    f"-d{config.data.seed}-t{config.train.num_steps}"
  )


def _evaluation(loss: float, depth: int) -> dict[str, Any]:
  value = lambda mean: {"mean": mean, "stderr": 0.01}  # noqa: E731
  share = 1 / (1 + math.exp(loss - 2))
  return {
    "num_documents": 40,
    "main_loss": value(loss),
    "bits_per_byte": value(loss / math.log(2)),
    "depth_loss": [value(loss + 0.5 * m) | {"count": 9} for m in range(1 + depth)],
    "depth_accuracy": [value(share / (1 + m)) for m in range(1 + depth)],
    "teacher_forced_agreement": [value(share**m) for m in range(1, 1 + depth)],
    "joint_prefix_agreement": [value(share**m) for m in range(1, 1 + depth)],
    "simulated_accepted_length": value(sum(share**m for m in range(1 + depth))),
    "next_line_exact_match": value(share / 4) | {"count": 64},
    "function_parses": None,
    "task_accuracy": None,
    **{
      f"{name}_{key}": x
      for name in ("decoded", "sampled")
      for key, x in (
        ("tokens_per_round", value(sum(share**m for m in range(1 + depth)))),
        ("survival", [value(share**m) for m in range(1, 1 + depth)]),
        ("acceptance", [value(share)] * depth),
      )
    },
  }
