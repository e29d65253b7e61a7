"""Norms, embeddings and initialisers.

Legend: B batch, T sequence, D embed, V entries of a table.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import TrunkConfig
from mtp_jax.sharding import constrain, platform


def compute_dtype(trunk: TrunkConfig) -> Any:
  """Returns the dtype of activations: bfloat16 on accelerators, float32 on CPU."""
  if trunk.compute_dtype == "auto":
    return jnp.float32 if platform() == "cpu" else jnp.bfloat16
  return jnp.dtype(trunk.compute_dtype)


def partitioned(init: nn.initializers.Initializer, *axes: str) -> Any:
  """Returns `init` with the logical axes that `sharding.AXIS_RULES` maps."""
  return nn.with_logical_partitioning(init, axes)


def fan_in_normal(fan_in: int, gain: float = 1.0) -> nn.initializers.Initializer:
  """Returns a normal initializer of standard deviation gain / sqrt(fan_in)."""
  return nn.initializers.normal(gain * fan_in**-0.5)


class RMSNorm(nn.Module):
  """Root-mean-square norm with a learned scale; statistics in at least float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.param(
      "scale", partitioned(nn.initializers.ones, "norm"), (x.shape[-1],)
    )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
    return (wide * inverse * scale_D).astype(x.dtype)


class LayerNorm(nn.Module):
  """Layer norm with learned scale and bias; statistics in at least float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dim = x.shape[-1]
    scale_D = self.param("scale", partitioned(nn.initializers.ones, "norm"), (dim,))
    bias_D = self.param("bias", partitioned(nn.initializers.zeros, "norm"), (dim,))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + self.eps)
    return (normed * scale_D + bias_D).astype(x.dtype)


def make_norm(
  trunk: TrunkConfig, name: str | None = None, kind: str = "trunk"
) -> nn.Module:
  """Returns the trunk's kind of norm, or RMSNorm where `kind` is "rms"."""
  is_rms = kind == "rms" or trunk.kind == "llama"
  return (RMSNorm if is_rms else LayerNorm)(trunk.norm_eps, name=name)


class Embedding(nn.Module):
  """A table of `num_entries` vectors; `axis` is the logical axis of its entries."""

  num_entries: int
  dim: int
  axis: str
  stddev: float
  dtype: Any

  def setup(self):
    self.embedding = self.param(
      "embedding",
      partitioned(nn.initializers.normal(self.stddev), self.axis, "embed"),
      (self.num_entries, self.dim),
    )

  def __call__(self, ids: jax.Array) -> jax.Array:
    return look_up(self.embedding.astype(self.dtype), ids, self.axis)


def look_up(table_VD: jax.Array, ids_BT: jax.Array, axis: str) -> jax.Array:
  """Returns table[ids], [B, T, D]; `axis` is the logical axis of the table's entries.

  The vectors of the table are gathered first, like any weight: with a table that is
  split along its vectors, XLA's partitioner would repeat the look-up on every device.
  """
  table_VD = constrain(table_VD, axis, "act_embed")
  return constrain(jnp.take(table_VD, ids_BT, axis=0), "batch", "seq", "act_embed")
