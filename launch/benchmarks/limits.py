"""What the device can do at best: work whose rate is the floor of the benchmarks.

It is timed in turns with what it is the floor of, so that a machine that is busy for a
while slows both.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.model.layers import compute_dtype

_PRODUCTS = 8
_COLUMNS = 4096
# Rows of a square matrix, and bytes that no cache holds.
_SIZES = {"cpu": (2048, 1 << 29), "other": (8192, 1 << 32)}


@dataclasses.dataclass(frozen=True)
class Work:
  """A program of known size. amount: FLOPs, or bytes read, of one run."""

  program: jax.stages.Compiled
  array: jax.Array
  amount: float

  def run(self) -> None:
    jax.block_until_ready(self.program(self.array))

  def seconds(self) -> float:
    """Returns the time of one run."""
    start = time.perf_counter()
    self.run()
    return time.perf_counter() - start


def products(dtype: str) -> Work:
  """Returns products of large square matrices, on the default device; warm."""
  rows, _ = _sizes()
  x = jax.jit(lambda: jax.random.normal(jax.random.key(0), (rows, rows), dtype))()

  def multiply(x: jax.Array) -> jax.Array:
    y = x
    for _ in range(_PRODUCTS):
      y = (x @ y) * rows**-0.5  # Scaled, so that the powers stay finite.
    return y

  return _warm(multiply, x, _PRODUCTS * 2 * rows**3)


def reads(dtype: str) -> Work:
  """Returns a pass over an array that no cache holds, on the default device; warm."""
  _, num_bytes = _sizes()
  shape = (num_bytes // jnp.dtype(dtype).itemsize // _COLUMNS, _COLUMNS)
  x = jax.jit(lambda: jnp.ones(shape, dtype))()
  # Which of the two a compiler reads faster with differs.
  candidates = [
    _warm(lambda x: x @ jnp.ones(_COLUMNS, dtype), x, x.nbytes),
    _warm(lambda x: jnp.sum(x, dtype=jnp.float32), x, x.nbytes),
  ]
  return min(candidates, key=lambda work: min(work.seconds() for _ in range(3)))


@dataclasses.dataclass(frozen=True)
class Ready:
  """What the floor says, as a contestant of `contestants.Turns`; FLOPs of one step."""

  hardware: str
  flops: float


def build_products(config: Config, name: str) -> tuple[Callable[[], None], Ready]:
  """Returns products in the compute dtype of a model, a `contestants.Build`."""
  del name
  work = products(jnp.dtype(compute_dtype(config.trunk)).name)
  return work.run, Ready(jax.devices()[0].device_kind, work.amount)


def _sizes() -> tuple[int, int]:
  return _SIZES.get(jax.devices()[0].platform, _SIZES["other"])


def _warm(
  function: Callable[[jax.Array], jax.Array], x: jax.Array, amount: int
) -> Work:
  work = Work(jax.jit(function).lower(x).compile(), x, float(amount))
  work.run()
  return work
