"""Parameters and training FLOPs of every trunk, kind and fairness arm.

Model FLOPs: matrix products and attention scores, forward and backward (three times the
forward pass); rematerialisation, norms and the optimizer are not counted.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np

from mtp_jax.config import Config, TrunkConfig, next_token_only
from mtp_jax.lm import MtpLm, deployed, zeros_batch
from mtp_jax.predictors import kind_of, num_trunk_layers, predictor_trunk
from mtp_jax.sharding import unbox


@dataclasses.dataclass(frozen=True)
class Counts:
  """Numbers of parameters, and training FLOPs.

  total: all. trunk: blocks of the trunk. deployed: what remains for next-token
  prediction when the extra predictors are deleted. active: of the deployed
  parameters, those that one token uses: of the routed experts only its own; embedding
  and unembedding count whole.
  """

  total: int
  trunk: int
  deployed: int
  active: int
  train_flops_per_token: float


@functools.lru_cache(maxsize=32)
def abstract_params(config: Config) -> Any:
  """Returns the parameter tree as ShapeDtypeStructs wrapped with their logical axes.

  Equal configs get one and the same tree, which is not to be changed: a start of
  training asks for it several times, and tracing the model takes a while.
  """
  # Parameters do not depend on it, and this machine need not have the kernels.
  trunk = dataclasses.replace(config.trunk, attention="xla")
  model = MtpLm(dataclasses.replace(config, trunk=trunk))
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
    active=_size(kept) - _idle_experts(kept, config.trunk),
    train_flops_per_token=train_flops_per_token(config),
  )


def train_flops_per_token(
  config: Config, attention_pairs: Literal["causal", "full"] = "causal"
) -> float:
  """Returns model FLOPs per trained token, all depths included.

  What is trained costs three times its forward pass. A frozen trunk costs one, as its
  main head does, and its output matrix two where extra depths read it: nothing is
  differentiated for it. The same is true of that matrix with `mtp.detach`.

  `attention_pairs`: "causal" counts the (T + 1) / 2 keys that a token sees on average;
  "full" the T keys that an implementation without skipping computes.
  """
  trunk, mtp = config.trunk, config.mtp
  dim, vocab = trunk.embed_dim, config.tokenizer.vocab_size
  logits, is_frozen = 2 * dim * vocab, config.train.freeze_trunk
  flops = functools.partial(
    _block_flops, seq_len=config.data.seq_len, attention_pairs=attention_pairs
  )
  deployed = trunk.dense_prefix * flops(trunk.dense()) + logits
  deployed += (num_trunk_layers(config) - trunk.dense_prefix) * flops(trunk)
  kind = kind_of(mtp)
  added = kind.blocks(mtp) * flops(predictor_trunk(trunk, mtp)) + kind.flops(config)
  passes = 2 if (is_frozen or mtp.detach) and mtp.unembed == "shared" else 3
  total = (1 if is_frozen else 3) * deployed + 3.0 * added
  total += passes * mtp.depth * logits
  # Own tokens take the logits of every depth but the last once more, and the logits of
  # the trunk as a teacher are computed for every depth; neither has a gradient.
  total += mtp.depth * logits * (mtp.fed == "own")
  return total + mtp.depth * logits * (mtp.objective != "cross_entropy")


def resolve(config: Config) -> Config:
  """Returns the config that is trained: arm `flops` becomes a longer plain NTP run.

  Its steps are scaled by the ratio of training FLOPs per token of the named kind and
  depth (heads added) to the steps of plain NTP, rounded to the nearest step.
  """
  if config.mtp.arm != "flops":
    return config
  added = dataclasses.replace(config.mtp, arm="added")
  baseline = dataclasses.replace(config, mtp=next_token_only(config.mtp))
  ratio = train_flops_per_token(dataclasses.replace(config, mtp=added))
  ratio /= train_flops_per_token(baseline)
  train = dataclasses.replace(
    config.train, num_steps=round(config.train.num_steps * ratio)
  )
  return dataclasses.replace(baseline, train=train)


def _block_flops(trunk: TrunkConfig, seq_len: int, attention_pairs: str) -> float:
  """Forward FLOPs per token of one block; of the experts, those a token uses."""
  dim, moe = trunk.embed_dim, trunk.moe
  if trunk.attention_kind == "latent":
    weights, per_key = _latent_attention(trunk)
  else:
    heads = trunk.num_heads * trunk.head_dim
    kv_heads = trunk.num_kv_heads * trunk.head_dim
    weights, per_key = dim * (2 * heads + 2 * kv_heads), 2 * heads
  if moe.num_experts:
    weights += dim * moe.num_experts
    weights += (moe.experts_per_token + moe.num_shared) * 3 * dim * moe.expert_dim
  else:
    weights += dim * trunk.mlp_dim * (3 if trunk.kind == "llama" else 2)
  keys = (seq_len + 1) / 2 if attention_pairs == "causal" else seq_len
  return 2.0 * weights + 2.0 * per_key * keys


def _latent_attention(trunk: TrunkConfig) -> tuple[int, int]:
  """Returns the entries of all matrices, and the products per query and key."""
  sizes, dim, heads = trunk.latent, trunk.embed_dim, trunk.num_heads
  query_dim = sizes.nope_dim + sizes.rope_dim
  if sizes.query_rank:
    weights = sizes.query_rank * (dim + heads * query_dim)
  else:
    weights = dim * heads * query_dim
  weights += dim * (sizes.kv_rank + sizes.rope_dim)
  weights += sizes.kv_rank * heads * (sizes.nope_dim + sizes.value_dim)
  weights += heads * sizes.value_dim * dim
  return weights, heads * (query_dim + sizes.value_dim)


def _idle_experts(params: Any, trunk: TrunkConfig) -> int:
  """Returns the parameters of the routed experts that a token does not use."""
  if not trunk.moe.num_experts:
    return 0
  experts = _size(params["trunk"]["blocks"]["moe"]["experts"])
  used = trunk.moe.experts_per_token / trunk.moe.num_experts
  return round(experts * (1 - used))


def _size(tree: Any) -> int:
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
