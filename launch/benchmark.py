"""Runs one benchmark: train, loss, decode, pack, sanity, or on a GPU all: gpu.

  mtp-jax bench train --help
  mtp-jax bench train --preset=quick     takes seconds, shows that it works
  mtp-jax bench train --preset=gpu

Every benchmark measures a floor, our code and its peers in turns, prints their ratios,
and writes a page (.md) and its figures (.json) to experiments/results/benchmarks.
"""

import importlib
import os
import sys

from absl import flags

from launch import cli

NAMES = ("train", "loss", "decode", "pack", "sanity", "gpu")


def main() -> None:
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("--help", "-h"):
    print(__doc__)
    sys.exit(0)
  if name not in NAMES:
    message = f"bench must be given one of {', '.join(NAMES)}, got {name!r}."
    sys.exit(cli.fail(message, cli.BAD_INPUT))
  # This process and the contestants share the GPU: none may reserve most of its memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  del sys.argv[1]
  benchmark = importlib.import_module(f"launch.benchmarks.{name}")
  # The help of this command is the help of the benchmark.
  sys.modules["__main__"].__doc__ = benchmark.__doc__
  flags.adopt_module_key_flags(benchmark)
  cli.run(benchmark.main)


if __name__ == "__main__":
  main()
