"""Memory and traffic of one train step from abstract shapes, where nothing compiles.

Per device, with P parameters, b rows of T tokens in a microbatch, n = b T tokens, width
D, vocabulary V, L layers (predictors included), M = 1 + depth, N query heads, c bytes
of the compute dtype; every size is the share of one device. Temporaries are

  gradients      4 P, and as much again for their sum over microbatches
  copies         c P, the stacked weights in the compute dtype (none if that is float32)
  tables         embedding and unembedding whole along fsdp, and their whole gradients
  saved          c n D per layer, and what remat `names` keeps; of `none`, twice its
                 widths and the weights of attention `xla`
  hidden         3 c M n D: the states of all depths, stacked, and their gradient
  and the larger of
  layer          weights of one layer, whole along fsdp, and their gradient; c n times
                 twice its widths; scores; rows and copied matrices of experts
  loss           (8 + c) V loss.block_tokens: logits, exponentials, d logits

Scores are `8 + c` bytes each: b N T T of attention `xla`, a block of rows of `blocked`,
and of `cudnn` none, but the mask, c b T T.

A device sends, in every microbatch: each layer's weights, c bytes each, gathered in the
forward and again in the backward pass; their gradient, summed over `fsdp` (scattered)
and over `data`; the gradients of both tables, summed whole, the embedding's once per
look-up (1 + depth in sequential modules and EAGLE); and once per step the tables. A
split over `tensor` adds sums of c n D: two per layer and pass, three passes if layers
are rematerialised, and one of every depth's gradient in the loss. `context` gathers
keys and values in each of these passes and scatters their gradients. `expert` gathers
tokens and scatters outputs. A ring of k devices sends (k - 1) / k of what it gathers or
scatters, twice that of what it sums.

What the formula leaves out is what XLA knows: which buffers live at once. The tests
hold it against programs that were compiled for CPU devices.
"""

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.planning import hlo, programs
from mtp_jax import accounting
from mtp_jax.config import Config, TrunkConfig, routed_layers
from mtp_jax.model import attention_ops, grouped_matmul
from mtp_jax.model.layers import compute_dtype
from mtp_jax.sharding import logical_axes, num_row_shards, tokens_per_block

Mesh = jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on one device: the parts of the temporaries, and what is sent per step."""

  parts: dict[str, float]
  sent: dict[str, float]

  @property
  def temporaries(self) -> float:
    phases = ("layer", "loss")
    kept = sum(size for name, size in self.parts.items() if name not in phases)
    return kept + max(self.parts[name] for name in phases)


def resolve_auto(config: Config, mesh: Mesh, platform: str) -> Config:
  """Returns the config with what `auto` becomes on accelerators, "gpu" or "tpu"."""
  trunk = config.trunk
  if trunk.compute_dtype == "auto":
    trunk = dataclasses.replace(trunk, compute_dtype="bfloat16")
  key_dim, value_dim = _head_dims(trunk)
  with jax.sharding.use_abstract_mesh(mesh):
    attention = attention_ops.choose_implementation(
      trunk.attention, platform, jnp.dtype(trunk.compute_dtype), key_dim,
      config.data.seq_len, value_dim,
    )
  experts = grouped_matmul.choose_implementation(trunk.moe.grouped_matmul, platform)
  moe = dataclasses.replace(trunk.moe, grouped_matmul=experts)
  block_tokens = tokens_per_block(config.loss.block_tokens, platform)
  return dataclasses.replace(
    config,
    trunk=dataclasses.replace(trunk, attention=attention, moe=moe),
    loss=dataclasses.replace(config.loss, block_tokens=block_tokens),
  )


def estimate(config: Config, mesh: Mesh) -> Estimate:
  """Returns the estimate for a config whose choices are made, see `resolve_auto`."""
  sizes = _Sizes(config, mesh)
  return Estimate(parts=_temporaries(sizes), sent=_traffic(sizes))


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """A parameter.

  section: where it is: its stack, or the table it belongs to.
  layers:  of the stack; 0 if it is in none.
  shard:   numbers on one device, of all layers.
  whole:   numbers on one device of one layer, joined along `fsdp`.
  fsdp:    devices that it is split over along `fsdp`.
  """

  section: tuple[str, ...]
  layers: int
  shard: float
  whole: float
  fsdp: int


class _Sizes:
  """The numbers of the formula."""

  def __init__(self, config: Config, mesh: Mesh):
    self.config, self.mesh = config, mesh
    trunk, data = config.trunk, config.data
    self.microbatches = config.train.accumulation_steps
    self.rows = data.batch_size / self.microbatches / num_row_shards(mesh)
    self.length = data.seq_len / mesh.shape["context"]
    self.tokens = self.rows * self.length
    self.width = trunk.embed_dim
    self.heads = trunk.num_heads / mesh.shape["tensor"]
    self.bytes = jnp.dtype(compute_dtype(trunk)).itemsize
    self.states = 1 + config.mtp.depth
    params = programs.abstract_state(config, mesh).params
    names = logical_axes(accounting.abstract_params(programs.traceable(config)))
    self.leaves = [
      _leaf(path, leaf, axes, mesh)
      for (path, leaf), axes in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(names, is_leaf=lambda node: isinstance(node, tuple)),
        strict=True,
      )
    ]
    self.stacks: dict[tuple[str, ...], list[_Leaf]] = collections.defaultdict(list)
    for leaf in self.leaves:
      if leaf.layers:
        self.stacks[leaf.section].append(leaf)
    self.tables = [
      leaf for leaf in self.leaves if leaf.section[0] in ("embed", "unembed")
    ]

  @property
  def layers(self) -> int:
    return sum(max(leaf.layers for leaf in stack) for stack in self.stacks.values())


def _leaf(path: Any, leaf: Any, axes: tuple[str, ...], mesh: Mesh) -> _Leaf:
  spec = [n for entry in leaf.sharding.spec if entry for n in np.atleast_1d(entry)]
  layers = leaf.shape[0] if axes[0] in ("layers", "depths") else 0
  others = math.prod(mesh.shape[name] for name in spec if name != "fsdp")
  return _Leaf(
    section=tuple(key.key for key in path[: 2 if layers else 1]),
    layers=layers,
    shard=math.prod(leaf.sharding.shard_shape(leaf.shape)),
    whole=math.prod(leaf.shape) / max(layers, 1) / others,
    fsdp=mesh.shape["fsdp"] if "fsdp" in spec else 1,
  )


def _temporaries(s: _Sizes) -> dict[str, float]:
  config, c = s.config, s.bytes
  shards = sum(leaf.shard for leaf in s.leaves)
  stacked = sum(leaf.shard for leaf in s.leaves if leaf.layers)
  tables = sum(leaf.whole for leaf in s.tables)
  tied = config.trunk.tie_embeddings
  vocab = config.tokenizer.vocab_size / s.mesh.shape["tensor"]
  block = min(config.loss.block_tokens, s.tokens)
  return {
    "gradients": 4 * shards * (2 if s.microbatches > 1 else 1),
    "copies": c * stacked if c != 4 else 0,
    # The gradient of the unembedding is summed in float32.
    "tables": tables * c + tables * (4 if tied else (4 + c) / 2),
    "saved": c * s.tokens * s.layers * (s.width + _kept_widths(config, s)),
    "hidden": 3 * c * s.states * s.tokens * s.width,
    "layer": max(_layer(s, stack) for stack in s.stacks.values()),
    "loss": (8 + c) * block * vocab,
  }


def _layer(s: _Sizes, stack: list[_Leaf]) -> float:
  weights = sum(leaf.whole for leaf in stack)
  activations = 2 * s.bytes * s.tokens * _widths(s)
  return 2 * s.bytes * weights + activations + _scores(s) + _experts(s)


def _widths(s: _Sizes) -> float:
  """Numbers per token in one layer between its input and its output."""
  trunk, tensor = s.config.trunk, s.mesh.shape["tensor"]
  key_dim, value_dim = _head_dims(trunk)
  attention = (trunk.num_heads + trunk.num_kv_heads) * (key_dim + value_dim)
  return 4 * s.width + (attention + 3 * _mlp_width(trunk)) / tensor


def _kept_widths(config: Config, s: _Sizes) -> float:
  """Numbers per token of a layer that the backward pass finds, besides its input."""
  trunk, tensor = config.trunk, s.mesh.shape["tensor"]
  if trunk.remat == "full":
    return 0
  key_dim, value_dim = _head_dims(trunk)
  if trunk.remat == "names":  # See `block.SAVED_NAMES`.
    heads = trunk.num_heads * key_dim + trunk.num_kv_heads * (key_dim + value_dim)
    if trunk.attention == "blocked":
      heads += trunk.num_heads * value_dim
    return s.width + (heads + 2 * _mlp_width(trunk)) / tensor
  weights = s.heads * config.data.seq_len if trunk.attention == "xla" else 0
  return 2 * _widths(s) + weights


def _mlp_width(trunk: TrunkConfig) -> int:
  """The width of the feed-forward layer, of the experts that of the shared ones."""
  if trunk.moe.num_experts:
    return trunk.moe.num_shared * trunk.moe.expert_dim
  return trunk.mlp_dim


def _scores(s: _Sizes) -> float:
  trunk, length = s.config.trunk, s.config.data.seq_len
  if trunk.attention in ("cudnn", "tokamax"):
    return s.bytes * s.rows * s.length * length
  each = (8 + s.bytes) * s.rows * s.heads * length
  if trunk.attention == "blocked":
    return each * max(64, length / 16)  # See `attention_ops._blocks`.
  return each * s.length


def _experts(s: _Sizes) -> float:
  """Tokens and rows of the routed experts, copies of matrices, and gradients."""
  moe, mesh = s.config.trunk.moe, s.mesh
  if not moe.num_experts:
    return 0
  tokens = s.tokens * mesh.shape["expert"]
  width = moe.expert_dim / mesh.shape["tensor"]
  plan = grouped_matmul.make_plan(
    moe.grouped_matmul,
    (int(tokens), moe.experts_per_token),
    moe.num_experts,
    moe.num_experts // mesh.shape["expert"],
    int(s.width * width),
  )
  rows = plan.num_blocks * plan.block
  numbers = tokens * s.width + rows * (2 * s.width + 4 * width)
  return 2 * s.bytes * (numbers + 3 * plan.chunk * s.width * width)


def _traffic(s: _Sizes) -> dict[str, float]:
  c, mesh, moe = s.bytes, s.mesh.shape, s.config.trunk.moe
  sent = dict.fromkeys(hlo.KINDS, 0.0)
  passes = 3 if s.config.trunk.remat != "none" else 2  # Of which one is the backward.
  for leaf in s.leaves:
    if leaf in s.tables:
      group = mesh["data"] * mesh["fsdp"] * mesh["expert"] * mesh["context"]
      sent["all-gather"] += c * leaf.whole * _ring(leaf.fsdp)
      is_unembed = leaf.section[0] == "unembed"
      width, times = (4, 1) if is_unembed else (c, _look_ups(s.config))
      sums = times * width * leaf.whole * 2 * _ring(group)
      sent["all-reduce"] += s.microbatches * sums
    elif leaf.layers:
      times = s.microbatches * leaf.layers * c
      sent["all-gather"] += 2 * times * leaf.whole * _ring(leaf.fsdp)
      sent["reduce-scatter"] += times * leaf.whole * _ring(leaf.fsdp)
      replicas = mesh["data"] * mesh["context"]
      if leaf.section[-1] != "experts":
        replicas *= mesh["expert"]
      part = leaf.whole / leaf.fsdp
      sent["all-reduce"] += times * part * 2 * _ring(replicas)
  state = s.microbatches * c * s.tokens * s.width
  sent["all-reduce"] += 2 * passes * s.layers * state * 2 * _ring(mesh["tensor"])
  sent["all-reduce"] += s.states * state * 2 * _ring(mesh["tensor"])
  key_dim, value_dim = _head_dims(s.config.trunk)
  kv_heads = s.config.trunk.num_kv_heads / mesh["tensor"]
  keys = s.rows * s.config.data.seq_len * kv_heads * (key_dim + value_dim)
  keys *= s.microbatches * c * s.layers * _ring(mesh["context"])
  sent["all-gather"] += (passes - 1) * keys
  sent["reduce-scatter"] += keys
  routed = sum(routed_layers(s.config).values()) if moe.num_experts else 0
  tokens = routed * mesh["expert"] * state * _ring(mesh["expert"])
  sent["all-gather"] += passes * tokens
  sent["reduce-scatter"] += passes * tokens
  return sent


def _look_ups(config: Config) -> int:
  """How often the embedding is looked up in a forward pass."""
  mtp = config.mtp
  return 1 + mtp.depth if mtp.is_autoregressive and mtp.fed != "none" else 1


def _ring(devices: int) -> float:
  return (devices - 1) / devices


def _head_dims(trunk: TrunkConfig) -> tuple[int, int]:
  """Returns the head dim of keys and that of values."""
  if trunk.attention_kind == "latent":
    return trunk.latent.nope_dim + trunk.latent.rope_dim, trunk.latent.value_dim
  return trunk.head_dim, trunk.head_dim
