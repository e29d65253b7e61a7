"""Writes the report of a folder of runs: a page, figures, tables and verdicts.

    python -m launch.report runs/gains_with_scale
    python -m launch.report runs --output=report
    python -m launch.report runs/sat --results=experiments/results/sat_cpu \\
        --command="python -m launch.sweep --config=experiments/sat.py:cpu ..."
    python -m launch.report --findings

Reads config.json, eval.json and metrics.jsonl of every run folder below RUNS (run.json
for commit and hardware only), finished or not, and writes to the output folder
report.html (everything in one file), the same page as report.md, one PNG and one CSV
per figure, and the tables behind them. The page begins with a sentence, a figure and a
table: what each way of predicting more tokens gains over next-token prediction (NTP),
by size, each with its interval and verdict. On text that is the tax, at equal tokens,
FLOPs and wall clock; trials on `siblings` have the gain at the best step, trials on
`star_graph` the tokens saved until the graph is solved. The command prints the sentence
and the path of the page last.

The page also has whether a ladder on text counts as evidence about size. It counts if
every size has NTP at two seeds or more and at three learning rates, the best in the
middle, and each method was trained at the rates on both sides of its own, on one seed
at least. Arm `flops` (mtp.arm) adds the longer NTP runs that equal FLOPs and equal wall
clock are measured with.

With --results it writes what is worth keeping of the runs instead, as small tables.
--interim is the note of how much of an experiment they have while it is not finished.

With --findings it reads such tables, one folder an experiment, finished or not, and
sets every published claim beside what was measured: findings.md, findings.csv,
estimates.csv (every interval), one PNG and one CSV per experiment, and tax_and_gain.png
with a panel for each of the ladders `tax`, `siblings` and `look_ahead` that has pairs
of trials. Each claim's rule, margin and verdict stand beside the claim on the page.

Bad input ends in one message and exit code 2; trials that are not finished are listed.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from launch import cli, exits
from mtp_jax.analysis import results as results_lib
from mtp_jax.analysis.findings import write_findings
from mtp_jax.analysis.report import Report, write_report
from mtp_jax.analysis.runs import RunsError, load

RESULTS = Path("experiments/results")


def main(arguments: Sequence[str] | None = None) -> int:
  flags = _parser().parse_args(arguments)
  if broken := _broken_rule(flags):
    return cli.fail(broken, cli.BAD_INPUT)
  jax.config.update("jax_platforms", "cpu")  # Parameters are counted, nothing is run.
  try:
    if flags.findings:
      report = _findings(flags)
    elif flags.results:
      report = _results(flags)
    else:
      report = _report(flags)
  except RunsError as e:
    return cli.fail(str(e), cli.BAD_INPUT)
  except OSError as e:
    return cli.fail(f"the report could not be written: {e}", exits.FAILED)
  print(f"{report.text}\n\n{report.sentence}\nOpen: {report.paths[0]}")
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m launch.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "runs", type=Path, nargs="?", metavar="RUNS",
    help="a run folder, or any folder above some",
  )
  parser.add_argument(
    "--output", type=Path, metavar="DIR",
    help="where to write; default RUNS/report, with --findings RESULTS/findings",
  )
  parser.add_argument(
    "--results", type=Path, metavar="DIR",
    help="write the results of RUNS into this folder, and nothing else; with "
    f"--findings, the folder that holds all results, default {RESULTS}",
  )
  parser.add_argument(
    "--command", action="append", metavar="COMMAND",
    help="with --results: how the runs were started; may be given several times",
  )
  parser.add_argument(
    "--interim", default="", metavar="WORDS",
    help="with --results: the results are not all, these are what there is, such as "
    "'3 of 10 seeds, widths 8 to 64'",
  )
  parser.add_argument(
    "--findings", action="store_true", help="write the verdicts on published claims"
  )
  return parser


def _broken_rule(flags: argparse.Namespace) -> str:
  """Returns what is wrong with the flags together, or nothing."""
  if flags.findings and flags.runs:
    return f"--findings reads results: RUNS must not be given, got {flags.runs}."
  for flag in ("command", "interim"):
    if getattr(flags, flag) and flags.findings:
      return f"--{flag} goes with RUNS and --results, not with --findings."
    if getattr(flags, flag) and not flags.results:
      return f"--{flag} goes with --results, which is missing."
  if flags.findings:
    return ""
  if not flags.runs:
    return "RUNS is required: a run folder, or any folder above some (or --findings)."
  if flags.results and not flags.command:
    return "--command is required with --results: the command that started the runs."
  if flags.results and flags.output:
    return "--output goes with a report or --findings; --results is where to write."
  return ""


def _report(flags: argparse.Namespace) -> Report:
  output = flags.output or flags.runs / "report"
  return write_report(
    flags.runs, output, _own_command([str(flags.runs), f"--output={output}"])
  )


def _results(flags: argparse.Namespace) -> Report:
  runs = load(flags.runs)
  paths = results_lib.write(runs, flags.results, flags.command, flags.interim)
  missing = [f"Not finished: {x}." for x in results_lib.unfinished(runs)]
  finished = len(runs.trials) - len(missing)
  text = f"{finished} of {len(runs.trials)} trials below {flags.runs} are finished."
  return Report("\n".join(missing), text, tuple(paths))


def _findings(flags: argparse.Namespace) -> Report:
  results = flags.results or RESULTS
  output = flags.output or results / "findings"
  rest = ["--findings", f"--results={results}", f"--output={output}"]
  return write_findings(results, output, _own_command(rest))


def _own_command(rest: Iterable[str]) -> str:
  return shlex.join(["python", "-m", "launch.report", *rest])


if __name__ == "__main__":
  sys.exit(main())
