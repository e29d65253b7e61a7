"""Matrix products and activations whose derivative is worth writing by hand.

Legend: D contracted dimension, F mlp.
"""

import jax
import jax.numpy as jnp

_SQRT_2_OVER_PI = 0.7978845608028654
_CUBIC = 0.044715


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
  """Contracts the last axis of x [..., D] with the first of w [D, ...]; dtype of x."""
  return jnp.tensordot(x, w, axes=1).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
  """GELU by tanh, as in GPT-2 (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
  return 0.5 * x * (1.0 + jnp.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x**3)))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
  return jax.nn.silu(gate) * up
