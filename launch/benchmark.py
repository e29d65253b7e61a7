"""Benchmarks that anyone can rerun; their tables go to experiments/results/benchmarks.

    python -m launch.benchmark train --help
"""

import argparse

from launch.benchmarks import train


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m launch.benchmark",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
  train.add_parser(commands)
  args = parser.parse_args(argv)
  args.run(args)


if __name__ == "__main__":
  main()
