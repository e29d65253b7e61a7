"""XLA flags that compile tiny programs fastest, for the tests and their processes.

A test's program takes far longer to compile than to run. Without optimisation and
without fusion emitters XLA for CPU compiles it in a fifth of the time.
"""

import os
import subprocess
import sys

# Newer versions do not know the second flag, and XLA ends a process for such a flag.
_CANDIDATES = (
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
  "--xla_backend_optimization_level=0",
)
# Eight devices share few cores. XLA's concurrent schedule may start their collectives
# in different orders: then they wait for each other without end.
_COLLECTIVES = (
  "--xla_cpu_enable_concurrency_optimized_scheduler=false"
  " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
_CHOSEN = "MTP_JAX_TESTS_XLA_FLAGS"  # Inherited by test workers and subprocesses.


def xla_flags(num_devices: int = 1) -> str:
  """Returns XLA_FLAGS for a process of the tests on `num_devices` CPU devices."""
  if _CHOSEN not in os.environ:
    os.environ[_CHOSEN] = next(filter(_is_known, _CANDIDATES), "")
  devices = f"--xla_force_host_platform_device_count={num_devices}"
  return f"{os.environ[_CHOSEN]} {_COLLECTIVES} {devices}"


def _is_known(flags: str) -> bool:
  start = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  return subprocess.run(start, env=environment, capture_output=True).returncode == 0
