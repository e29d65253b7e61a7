"""Hand-written derivatives equal autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.kernels.dense import dense, gelu, swiglu


def _plain(x, w):
  return jnp.tensordot(x, w, axes=1)


def _grads(function, x, w):
  return jax.grad(lambda x, w: jnp.sum(jnp.sin(function(x, w))), (0, 1))(x, w)


# Narrow and wide outputs take different ways; heads give w a third dimension.
@pytest.mark.parametrize(
  "x_shape, w_shape",
  [((2, 5, 3), (3, 7)), ((2, 5, 7), (7, 3)), ((4, 6), (6, 2, 5)), ((6,), (6, 2))],
)
def test_dense_and_its_derivatives(x_shape, w_shape):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, w = (jnp.asarray(rng.normal(size=shape)) for shape in (x_shape, w_shape))
    np.testing.assert_array_equal(dense(x, w), _plain(x, w))
    found, expected = jax.jit(lambda x, w: (_grads(dense, x, w), _grads(_plain, x, w)))(
      x, w
    )
    for a, b in zip(found, expected, strict=True):
      assert a.shape == b.shape
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_dense_under_vmap_scan_and_remat():
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    x = jnp.asarray(rng.normal(size=(4, 3, 6)))
    w = jnp.asarray(rng.normal(size=(2, 6, 6)))

    def chain(product):
      layer = jax.checkpoint(lambda h, w: (jnp.tanh(product(h, w)), None))
      loss = lambda x, w: jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)  # noqa: E731
      return jax.vmap(jax.grad(loss, (0, 1)), in_axes=(0, None))(x, w)

    for a, b in zip(chain(dense), chain(_plain), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_dense_keeps_the_dtype_of_its_inputs():
  x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
  assert dense(x, w).dtype == jnp.bfloat16
  assert all(g.dtype == jnp.bfloat16 for g in _grads(dense, x, w))


def test_activations():
  x, up = jnp.linspace(-6, 6, 49), jnp.linspace(2, -2, 49)
  np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=True), atol=1e-6)
  np.testing.assert_allclose(swiglu(x, up), x / (1 + jnp.exp(-x)) * up, atol=1e-6)
