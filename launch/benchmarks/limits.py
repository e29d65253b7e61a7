"""The limits of a device, which the floors are made of; and the memory of a step.

The work of a floor takes turns with what it is the floor of, so that a machine that is
busy for a while slows both.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.model.layers import compute_dtype

# Products in one run, columns of the array that is read, and
# per platform the rows of the square matrices and bytes that no cache holds.
_PRODUCTS, _COLUMNS = 8, 4096
_SIZES = {"cpu": (2048, 1 << 29), "other": (8192, 1 << 32)}


class Work(NamedTuple):
  """A program of known size; `amount` is the FLOPs, or bytes read, of one run."""

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


def products(dtype: Any) -> Work:
  """Returns products of large square matrices, on the default device; warm."""
  rows, _ = _sizes()
  x = jax.jit(lambda: jax.random.normal(jax.random.key(0), (rows, rows), dtype))()

  def multiply(x: jax.Array) -> jax.Array:
    y = x
    for _ in range(_PRODUCTS):
      y = (x @ y) * rows**-0.5  # Scaled, so that the powers stay finite.
    return y

  return _warm(multiply, x, _PRODUCTS * 2 * rows**3)


def reads(dtype: Any) -> Work:
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


def build_products(config: Config) -> tuple[Callable[[], None], dict[str, Any]]:
  """Builds the floor's contestant: products in the compute dtype of a model."""
  work = products(compute_dtype(config.trunk))
  return work.run, {"hardware": jax.devices()[0].device_kind, "flops": work.amount}


def _sizes() -> tuple[int, int]:
  return _SIZES.get(jax.devices()[0].platform, _SIZES["other"])


def _warm(
  function: Callable[[jax.Array], jax.Array], x: jax.Array, amount: int
) -> Work:
  work = Work(jax.jit(function).lower(x).compile(), x, float(amount))
  work.run()
  return work


def resident() -> int | None:
  """Returns the bytes of this process's resident set, None where that is unknown."""
  return _status_bytes("VmRSS")


def resident_with_jax() -> int | None:
  """Returns the same once JAX has loaded what any program needs."""
  jax.block_until_ready(jnp.ones(()) + 1)
  return resident()


def peak_memory(
  step: Callable[[], Any], before: int | None, torch: Any = None
) -> int | None:
  """Returns the bytes that one warm step needs at most, model and optimizer included.

  On a GPU the allocator's peak. On a CPU the growth of the resident set since `before`
  (`resident`, before the step's arrays existed): what compilation needed and freed is
  returned to the kernel first, and the kernel's high-water mark is set back. None where
  the system offers neither. `torch` is PyTorch if the step is PyTorch's.
  """
  if torch is not None and torch.cuda.is_available():
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()
  if torch is None and jax.devices()[0].platform != "cpu":
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  gc.collect()
  try:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
  except (AttributeError, OSError):
    return None
  step()
  peak = _status_bytes("VmHWM")
  return None if peak is None or before is None else peak - before


def _status_bytes(key: str) -> int | None:
  """Returns a size from /proc/self/status; None where the system has no such file."""
  try:
    lines = Path("/proc/self/status").read_text().splitlines()
  except OSError:
    return None
  kilobytes = next(line for line in lines if line.startswith(key)).split()[1]
  return int(kilobytes) * 1024
