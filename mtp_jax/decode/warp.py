"""From logits to the log-probabilities that tokens are sampled from: one function.

The trunk's and the drafter's distribution must both come from here: verification is
exact only for the distributions that tokens are really drawn from.

Legend: B batch, R rows, V vocab.
"""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Warp(NamedTuple):
  """How logits are warped; each value a scalar or broadcastable, such as [B, 1, 1].

  None switches a cut off. Since None is a part of the pytree's structure, a program
  without top-k and top-p has no sort in it, while other values share one program.

  temperature: divides the logits; greater than 0.
  top_k:       keep the k most likely tokens; at equal logits lower ids come first.
  top_p:       keep the smallest set of most likely tokens whose mass reaches p.
  min_p:       keep tokens at least min_p times as likely as the most likely one.
  """

  temperature: jax.Array | float
  top_k: jax.Array | int | None = None
  top_p: jax.Array | float | None = None
  min_p: jax.Array | float | None = None


def warp(logits: jax.Array, settings: Warp) -> jax.Array:
  """Returns normalised log-probabilities [..., V], -inf for tokens that are cut.

  Temperature comes first, then top-k, top-p (of what top-k left, renormalised) and
  min-p, the order of Hugging Face transformers. The most likely token always stays.
  float32, or float64 for float64 logits.

  Args:
    logits: [..., V], below +inf; every row has a finite one.
    settings: see `Warp` and `check_warp`.
  """
  x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  # The maximum goes first: a division by a small temperature cannot overflow then.
  x = (x - jnp.max(x, axis=-1, keepdims=True)) / settings.temperature
  if settings.top_k is not None or settings.top_p is not None:
    x = jnp.where(_most_likely(x, settings.top_k, settings.top_p), x, -jnp.inf)
  if settings.min_p is not None:
    x = jnp.where(x >= jnp.log(settings.min_p), x, -jnp.inf)  # The maximum is 0.
  return jax.nn.log_softmax(x, axis=-1)


def _most_likely(x, top_k, top_p):
  """Returns the mask of the tokens that top-k and top-p keep: a prefix in order."""
  size = x.shape[-1]
  ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  negative, order = jax.lax.sort((-x, ids), dimension=-1, num_keys=2)
  count = size if top_k is None else jnp.minimum(top_k, size)
  if top_p is not None:
    kept = jnp.where(jnp.arange(size) < count, -negative, -jnp.inf)
    mass = jnp.cumsum(jax.nn.softmax(kept, axis=-1), axis=-1)
    nucleus = 1 + jnp.sum(mass < top_p, axis=-1, keepdims=True, dtype=jnp.int32)
    # top_p 1 keeps all: a sum of probabilities may round to 1 too soon.
    count = jnp.where(top_p < 1, jnp.minimum(count, nucleus), count)
  last = jnp.broadcast_to(count - 1, (*x.shape[:-1], 1))
  cut = -jnp.take_along_axis(negative, last, axis=-1)
  cut_id = jnp.take_along_axis(order, last, axis=-1)
  return (x > cut) | ((x == cut) & (ids <= cut_id))


def check_warp(
  temperature: float,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
) -> Warp:
  """Returns the Warp of numbers given by a user; a cut that cuts nothing becomes None.

  Raises:
    ValueError: a number out of its range, with key, rule and value.
  """
  if temperature == 0:
    raise ValueError(
      "temperature must be positive, got 0. For the most likely token at every "
      "position use rule='greedy'."
    )
  normal = np.finfo(np.float32)  # Smaller numbers may count as 0.
  _require(
    _is_real(temperature) and normal.tiny <= temperature <= normal.max,
    "temperature", "a number that is positive and finite in float32", temperature,
  )
  if top_k is not None:
    _require(
      _is_real(top_k) and isinstance(top_k, numbers.Integral) and 1 <= top_k < 2**31,
      "top_k", "an integer of at least 1 (and less than 2**31), or None", top_k,
    )
  if top_p is not None:
    _require(
      _is_real(top_p) and 0 < top_p <= 1,
      "top_p", "a number in (0, 1], or None", top_p,
    )
  if min_p is not None:
    _require(
      _is_real(min_p) and 0 <= min_p < 1,
      "min_p", "a number in [0, 1), or None", min_p,
    )
  return Warp(
    np.float32(temperature),
    None if top_k is None else np.int32(top_k),
    None if top_p is None or top_p == 1 else np.float32(top_p),
    None if min_p is None or min_p == 0 else np.float32(min_p),
  )


def _is_real(value) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _require(condition: bool, key: str, rule: str, value: object) -> None:
  if not condition:
    raise ValueError(f"{key} must be {rule}, got {value!r}.")
