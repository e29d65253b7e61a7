"""The arg max of a vocabulary is numpy's, however it is searched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.kernels.argmax import argmax


@pytest.mark.parametrize("width", [1, 63, 64, 65, 264, 1000])
def test_it_is_that_of_numpy(width):
  rng = np.random.default_rng(width)
  x = rng.integers(0, 9, (8, 3, width)).astype(np.float32)  # Many are equal.
  x[1] = -np.inf
  x[2] = -np.inf
  x[2, :, -1] = np.finfo(np.float32).min
  x[4, :, width // 3] = np.inf
  found = jax.jit(argmax)(x)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, np.argmax(x, axis=-1))
  lost = jax.jit(argmax)(np.full_like(x, np.nan))
  assert np.all((lost >= 0) & (lost < width))
