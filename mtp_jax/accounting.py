"""Parameters and training FLOPs of every trunk, kind and fairness arm.

Model FLOPs: matrix products and attention scores, forward and backward (three times the
forward pass); rematerialisation, norms and the optimizer are not counted.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from mtp_jax.config import Config, TrunkConfig, num_trunk_layers
from mtp_jax.model.lm import MtpLm, deployed, zeros_batch
from mtp_jax.sharding import unbox


@dataclasses.dataclass(frozen=True)
class Counts:
  """total: all trained parameters. trunk: blocks of the trunk. deployed: what remains
  for next-token prediction when the extra predictors are deleted."""

  total: int
  trunk: int
  deployed: int
  train_flops_per_token: float


def abstract_params(config: Config) -> Any:
  """Returns the parameter tree as ShapeDtypeStructs wrapped with their logical axes."""
  model = MtpLm(config)
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), zeros_batch(config))["params"]
  )


def count(config: Config) -> Counts:
  """Counts a resolved config (see `resolve`); takes no memory for the parameters."""
  params = unbox(abstract_params(config))
  kept = jax.eval_shape(lambda p: deployed(p, config)[0], params)
  return Counts(
    total=_size(params),
    trunk=_size(params["trunk"]),
    deployed=_size(kept),
    train_flops_per_token=train_flops_per_token(config),
  )


def train_flops_per_token(
  config: Config, attention_pairs: Literal["causal", "full"] = "causal"
) -> float:
  """Returns model FLOPs per trained token, all depths included.

  `attention_pairs`: "causal" counts the (T + 1) / 2 keys that a token sees on average;
  "full" the T keys that an implementation without skipping computes.
  """
  trunk, mtp = config.trunk, config.mtp
  dim, num_predictors = trunk.embed_dim, 1 + mtp.depth
  block = _block_flops(trunk, config.data.seq_len, attention_pairs)
  forward = num_trunk_layers(config) * block
  forward += num_predictors * 2 * dim * config.tokenizer.vocab_size
  if mtp.kind == "parallel":
    forward += num_predictors * block
  elif mtp.kind == "sequential":
    forward += mtp.depth * (block + 2 * 2 * dim * dim)
  elif mtp.kind == "linear":
    forward += mtp.depth * 2 * dim * dim
  return 3.0 * forward


def resolve(config: Config) -> Config:
  """Returns the config that is trained: arm `flops` becomes a longer plain NTP run.

  Its steps are scaled by the ratio of training FLOPs per token of the named kind and
  depth (heads added) to those of plain NTP, rounded to the nearest step.
  """
  if config.mtp.arm != "flops":
    return config
  added = dataclasses.replace(config.mtp, arm="added")
  plain = dataclasses.replace(
    added, kind="none", depth=0, depth_weights=(), share_modules=False
  )
  baseline = dataclasses.replace(config, mtp=plain)
  ratio = train_flops_per_token(dataclasses.replace(config, mtp=added))
  ratio /= train_flops_per_token(baseline)
  train = dataclasses.replace(
    config.train, num_steps=round(config.train.num_steps * ratio)
  )
  return dataclasses.replace(baseline, train=train)


def _block_flops(trunk: TrunkConfig, seq_len: int, attention_pairs: str) -> float:
  """Forward FLOPs per token of one block."""
  heads = trunk.num_heads * trunk.head_dim
  kv_heads = trunk.num_kv_heads * trunk.head_dim
  weights = trunk.embed_dim * (2 * heads + 2 * kv_heads)
  weights += trunk.embed_dim * trunk.mlp_dim * (3 if trunk.kind == "llama" else 2)
  keys = (seq_len + 1) / 2 if attention_pairs == "causal" else seq_len
  return 2.0 * weights + 2 * 2.0 * heads * keys


def _size(tree: Any) -> int:
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
