"""The most likely token: arg max over a vocabulary."""

import jax
import jax.numpy as jnp

from mtp_jax.sharding import platform

_GROUP = 64


def argmax(x: jax.Array) -> jax.Array:
  """Returns the first index of the largest entry on the last axis, int32.

  With NaNs the index is arbitrary. XLA on CPU searches entry by entry on one core.
  There this function first takes the maximum of every group of entries, for which XLA
  has a fast kernel, and then searches one group.
  """
  width = x.shape[-1]
  if platform() != "cpu" or width <= _GROUP:
    return jnp.argmax(x, axis=-1).astype(jnp.int32)
  num_groups = -(-width // _GROUP)
  unused = [(0, 0)] * (x.ndim - 1) + [(0, num_groups * _GROUP - width)]
  x = jnp.pad(x, unused, constant_values=-jnp.inf)
  x = x.reshape(*x.shape[:-1], num_groups, _GROUP)
  group = jnp.argmax(jnp.max(x, axis=-1), axis=-1)
  entries = jnp.take_along_axis(x, group[..., None, None], axis=-2)[..., 0, :]
  return (group * _GROUP + jnp.argmax(entries, axis=-1)).astype(jnp.int32)
