"""The reduced vocabulary of EAGLE-3: only frequent tokens can be drafted.

Its output matrix has a column for each of them, which makes drafting cheaper where the
vocabulary is large (Li et al. 2025, arXiv 2503.01840, and its code). A token that can
not be drafted is no target: losses of the extra depths, in training and evaluation, are
means over the others. The ids are a parameter that nothing changes, so that whatever
saves or loads the drafter has them.

Legend: V vocab, C draft vocabulary, M = 1 + depth, B batch, T sequence.
"""

import jax
import jax.numpy as jnp
import numpy as np


def most_frequent(counts_V: np.ndarray, size: int) -> np.ndarray:
  """Returns the ids of the `size` most frequent tokens, ascending; ties: lower ids."""
  order_V = np.argsort(-counts_V, kind="stable")
  return np.sort(order_V[:size]).astype(np.int32)


def localize(
  targets: jax.Array, tokens_C: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
  """Returns `(number among tokens_C, whether it is among them)` of every id."""
  size = tokens_C.shape[0]
  numbers_V = jnp.full(vocab_size, size).at[tokens_C].set(jnp.arange(size))
  numbers = numbers_V[targets]
  return jnp.minimum(numbers, size - 1), numbers < size


def scatter(logits_C: jax.Array, tokens_C: jax.Array, vocab_size: int) -> jax.Array:
  """Returns logits [..., V], -inf for tokens that cannot be drafted."""
  nothing = jnp.full((*logits_C.shape[:-1], vocab_size), -jnp.inf, logits_C.dtype)
  return nothing.at[..., tokens_C].set(logits_C)
