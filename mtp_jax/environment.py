"""Facts for logs: hardware, package versions, and the commit of the code."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import jax


def hardware() -> str:
  """Returns a description of JAX's devices; for CPU devices also of the CPU."""
  device = jax.devices()[0]
  name = f"{jax.device_count()} x {device.device_kind}"
  return f"{name}, {cpu()}" if device.platform == "cpu" else name


def cpu() -> str:
  """Returns the number of usable cores and the CPU's name; starts no JAX backend."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
  return f"{len(cpu_cores())} core(s) {next(names, platform.machine())}"


def cpu_cores() -> list[int]:
  """Returns the CPU cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def machine_memory() -> int | None:
  """Returns the bytes of this machine; None where the system has no such figure."""
  try:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, ValueError, OSError):
    return None


def device_memory() -> int | None:
  """Returns the bytes of the first device, for a CPU of the machine."""
  stats = jax.local_devices()[0].memory_stats()
  return stats["bytes_limit"] if stats and "bytes_limit" in stats else machine_memory()


def versions(packages: Iterable[str]) -> dict[str, str]:
  """Returns the versions of Python and `packages`; "missing" where not installed."""
  found = {"python": platform.python_version()}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "missing"
  return found


@functools.cache
def code_commit() -> str:
  """Returns the commit of the code, marked if the tree has changes; '' outside git."""
  here = Path(__file__).parent
  try:
    run = functools.partial(
      subprocess.run, cwd=here, capture_output=True, text=True, check=True
    )
    # An installed package may lie within the repository of another project.
    run(["git", "ls-files", "--error-unmatch", Path(__file__).name])
    commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
    dirty = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
  except (OSError, subprocess.CalledProcessError):
    return ""
  return commit + ("+changes" if dirty.strip() else "")
