"""Writes the report of a folder of runs: HTML, figures, tables, and what they say.

    python -m launch.report runs/gains_with_scale
    python -m launch.report runs --output=report

Reads config.json, eval.json and metrics.jsonl of every run folder below RUNS (run.json
for commit and hardware only), finished or not, and writes to the output folder
report.html (everything in one file), one PNG and one CSV per figure, and the tables
behind them. The verdict is printed: what each way of predicting more tokens gains over
next-token prediction at equal tokens, FLOPs and wall clock, how that changes with size,
and whether the ladder counts. For that, every size needs NTP at two seeds or more and
at three learning rates, the best in the middle; each method needs the rates on both
sides of its own, on one seed at least. Arm `flops` (mtp.arm) adds the longer NTP runs
that equal FLOPs and equal wall clock are measured with.

Bad input ends in one message and exit code 2; trials that are not finished are listed.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from launch import cli
from mtp_jax.analysis.report import write_report
from mtp_jax.analysis.runs import RunsError


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m launch.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "runs", type=Path, metavar="RUNS", help="a run folder, or any folder above some"
  )
  parser.add_argument(
    "--output", type=Path, metavar="DIR", help="where to write; default RUNS/report"
  )
  flags = parser.parse_args(arguments)
  output = flags.output or flags.runs / "report"
  jax.config.update("jax_platforms", "cpu")  # Parameters are counted, nothing is run.
  command = ["python", "-m", "launch.report", str(flags.runs), f"--output={output}"]
  try:
    report = write_report(flags.runs, output, shlex.join(command))
  except RunsError as e:
    return cli.fail(str(e), cli.BAD_INPUT)
  print(report.text)
  print("\nWritten:")
  for path in report.paths:
    print(f"  {path}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
