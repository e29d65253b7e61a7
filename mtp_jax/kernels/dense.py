"""Matrix products with a hand-written derivative on CPU, and activations.

XLA on CPU is slow at products whose wide operand is transposed, and at products into
which it fuses cheap operations, for which it has no fast kernel. The derivative here
avoids both. Other platforms use plain autodiff.
"""

import jax
import jax.numpy as jnp

from mtp_jax.sharding import platform

_SQRT_2_OVER_PI = 0.7978845608028654
_CUBIC = 0.044715


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
  """Contracts the last axis of x [..., D] with the first of w [D, ...]; dtype of x."""
  return _dense_cpu(x, w) if platform() == "cpu" else _dense(x, w)


def _dense(x, w):
  return jnp.tensordot(x, w, axes=1).astype(x.dtype)


@jax.custom_vjp
def _dense_cpu(x, w):
  return _dense(x, w)


def _dense_cpu_fwd(x, w):
  return _dense(x, w), (x, w)


def _dense_cpu_bwd(saved, d_out):
  x, w = saved
  d_out = jax.lax.optimization_barrier(d_out)
  outputs = tuple(range(x.ndim - 1, d_out.ndim))
  d_x = jax.lax.dot_general(d_out, w, ((outputs, tuple(range(1, w.ndim))), ((), ())))
  # XLA transposes the first operand, so put the narrow one first.
  tokens = tuple(range(x.ndim - 1))
  if w.shape[0] <= w[0].size:
    d_w = _barrier_dot(x, d_out, tokens)
  else:
    d_w = jnp.moveaxis(_barrier_dot(d_out, x, tokens), -1, 0)
  return d_x.astype(x.dtype), d_w.astype(w.dtype)


def _barrier_dot(a, b, axes):
  product = jax.lax.dot_general(a, b, ((axes, axes), ((), ())))
  return jax.lax.optimization_barrier(product)


_dense_cpu.defvjp(_dense_cpu_fwd, _dense_cpu_bwd)


def gelu(x: jax.Array) -> jax.Array:
  """GELU by tanh, as in GPT-2 (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
  return 0.5 * x * (1.0 + jnp.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x**3)))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
  return jax.nn.silu(gate) * up
