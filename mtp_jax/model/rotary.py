"""Rotary position embedding, and its frequencies for longer texts.

Legend: B batch, T sequence, N heads, H head dim, F frequencies: half of what turns.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import TrunkConfig


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, trunk: TrunkConfig) -> jax.Array:
  """Returns x with rotary position embedding; pairs are the halves of H, as in Llama.

  Pair f is rotated by `position * frequencies[f]` (Su et al. 2021, arXiv 2104.09864)
  and multiplied by `rotation_scale`. Angles are float32 (float64 for float64 input);
  the result has the dtype of x. With `trunk.rope_fraction` below 1 the first numbers of
  a head are rotated, as if there were no others, and the rest stays.
  """
  wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
  width = int(x_BTNH.shape[-1] * trunk.rope_fraction)
  frequency_F = jnp.asarray(frequencies(trunk, width), wide)
  angle_BT1F = positions_BT[:, :, None, None].astype(wide) * frequency_F
  scale = rotation_scale(trunk)
  cos, sin = scale * jnp.cos(angle_BT1F), scale * jnp.sin(angle_BT1F)
  first, second = jnp.split(x_BTNH[..., :width].astype(wide), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x_BTNH.dtype)
  if width == x_BTNH.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x_BTNH[..., width:]], axis=-1)


def frequencies(trunk: TrunkConfig, width: int) -> np.ndarray:
  """Returns the angle per position of each pair, [width / 2] in float64.

  Without scaling: `theta^(-2 f / width)`. `trunk.rope_scaling` is for texts that are s
  times (`factor`) as long as its `original_length` L. A pair makes so many turns in L:

  linear: all frequencies are divided by s (Chen et al. 2023, arXiv 2306.15595).
  llama3: pairs of fewer than `low_freq_factor` turns are divided by s; pairs of more
    than `high_freq_factor` turns stay; between, a blend linear in the turns (the code
    released with Llama 3.1).
  yarn: pairs of fewer than `beta_slow` turns are divided by s; pairs of more than
    `beta_fast` turns stay (Peng et al. 2023, arXiv 2309.00071). Between, the blend is
    linear in f, and its ends are rounded outwards to whole f: as in the paper's code,
    unlike its equation, which is linear in the turns.
  """
  scaling, L = trunk.rope_scaling, trunk.rope_scaling.original_length
  index_F = np.arange(width // 2)
  plain_F = trunk.rope_theta ** (-2.0 * index_F / width)
  if scaling.kind == "none":
    return plain_F
  if scaling.kind == "linear":
    return plain_F / scaling.factor
  if scaling.kind == "llama3":
    turns_F = L * plain_F / (2 * math.pi)
    between = scaling.high_freq_factor - scaling.low_freq_factor
    kept_F = np.clip((turns_F - scaling.low_freq_factor) / between, 0.0, 1.0)
  else:
    first = max(math.floor(_index_of_turns(trunk, width, scaling.beta_fast)), 0)
    last = min(math.ceil(_index_of_turns(trunk, width, scaling.beta_slow)), width - 1)
    # Avoids a division by 0: the ramp becomes a step after `first`.
    length = last - first if last != first else 0.001
    kept_F = 1.0 - np.clip((index_F - first) / length, 0.0, 1.0)
  return plain_F * (kept_F + (1.0 - kept_F) / scaling.factor)


def rotation_scale(trunk: TrunkConfig) -> float:
  """Returns the factor on rotated queries and keys: 1 except for yarn.

  It is `m(s, mscale) / m(s, mscale_all_dim)` with `m(s, c) = 0.1 c ln s + 1`. With
  mscale 1 and mscale_all_dim 0 this is the square root of the temperature of arXiv
  2309.00071, equation 22.
  """
  scaling = trunk.rope_scaling
  if scaling.kind != "yarn":
    return 1.0
  return _yarn_gain(scaling.factor, scaling.mscale) / softmax_gain(trunk)


def softmax_gain(trunk: TrunkConfig) -> float:
  """Returns `m(s, mscale_all_dim)`, 1 except for yarn; see `rotation_scale`.

  DeepSeek multiplies the softmax scale by the square of this factor, so that dimensions
  that are not rotated are tempered, too; other models do not.
  """
  scaling = trunk.rope_scaling
  if scaling.kind != "yarn":
    return 1.0
  return _yarn_gain(scaling.factor, scaling.mscale_all_dim)


def _yarn_gain(factor: float, mscale: float) -> float:
  return 0.1 * mscale * math.log(factor) + 1.0


def _index_of_turns(trunk: TrunkConfig, width: int, turns: float) -> float:
  """Returns the f, unrounded, whose pair makes `turns` in `original_length`."""
  ratio = trunk.rope_scaling.original_length / (2 * math.pi * turns)
  return 0.5 * width * math.log(ratio) / math.log(trunk.rope_theta)
