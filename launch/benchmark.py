"""Benchmarks that anyone can rerun; their tables go to experiments/results/benchmarks.

    python -m launch.benchmark train --help
    python -m launch.benchmark loss --help
    python -m launch.benchmark decode --help
    python -m launch.benchmark pack --help
    python -m launch.benchmark input --help
    python -m launch.benchmark startup --help
"""

import argparse
import os

from launch.benchmarks import decode, input, loss, pack, startup, train
from mtp_jax.config import ConfigError
from mtp_jax.data.sources import DataError


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m launch.benchmark",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
  train.add_parser(commands)
  loss.add_parser(commands)
  decode.add_parser(commands)
  pack.add_parser(commands)
  input.add_parser(commands)
  startup.add_parser(commands)
  args = parser.parse_args(argv)
  # This process and the contestants share the GPU: none may reserve most of its memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  try:
    args.run(args)
  except (ConfigError, DataError) as error:
    parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
  main()
