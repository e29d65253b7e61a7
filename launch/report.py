r"""Writes the report of a folder of runs: a page, figures, tables and verdicts.

  mtp-jax report runs/gains_with_scale
  mtp-jax report runs --output=report
  mtp-jax report runs/sat --results=experiments/results/sat_cpu \
      --command="mtp-jax sweep --config=experiments/sat.py:cpu ..."
  mtp-jax report --findings

Reads config.json, eval.json and metrics.jsonl of every run folder below the folder that
is named (run.json for commit and hardware only), finished or not, and writes to the
output folder report.html (everything in one file), the same page as report.md, one PNG
and one CSV per figure, and the tables behind them. The page begins with a sentence, a
figure and a table: what each way of predicting more tokens gains over next-token
prediction (NTP), by size, each with its interval and verdict. On text that is the tax,
at equal tokens, FLOPs and wall clock; trials on `siblings` have the gain at the best
step, trials on `star_graph` the tokens saved until the graph is solved. The command
prints the sentence and the path of the page last.

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

import shlex
from collections.abc import Iterable
from pathlib import Path

import jax
from absl import flags

from launch import cli, exits
from mtp_jax.analysis import results as results_lib
from mtp_jax.analysis.findings import write_findings
from mtp_jax.analysis.report import Report, write_report
from mtp_jax.analysis.runs import RunsError, load

RESULTS = Path("experiments/results")


_WORKDIR = cli.define_workdir("a run folder, or any folder above some", required=False)
_OUTPUT = flags.DEFINE_string(
  "output", None,
  "where to write; by default WORKDIR/report, with --findings RESULTS/findings",
  allow_override=True,
)
_RESULTS = flags.DEFINE_string(
  "results", None,
  "write the results of the runs into this folder, and nothing else; with --findings, "
  f"the folder that holds all results, by default {RESULTS}",
)
_COMMAND = flags.DEFINE_multi_string(
  "command", [], "with --results: how the runs were started; may be given again"
)
_INTERIM = flags.DEFINE_string(
  "interim", "",
  "with --results: the results are not all, these are what there is, such as "
  "'3 of 10 seeds, widths 8 to 64'",
)
_FINDINGS = flags.DEFINE_bool(
  "findings", False, "write the verdicts on published claims"
)
_BRIEF = flags.DEFINE_bool(
  "brief", False, "print only the sentence, and which picture and page to open"
)


def main() -> int:
  if broken := _broken_rule():
    return cli.fail(broken, cli.BAD_INPUT)
  jax.config.update("jax_platforms", "cpu")  # Parameters are counted, nothing is run.
  try:
    if _FINDINGS.value:
      report = _findings()
    elif _RESULTS.value:
      report = _results(Path(_WORKDIR.value), Path(_RESULTS.value))
    else:
      report = _report(Path(_WORKDIR.value))
  except RunsError as e:
    return cli.fail(str(e), cli.BAD_INPUT)
  except OSError as e:
    return cli.fail(f"the report could not be written: {e}", exits.FAILED)
  pictures = [path for path in report.paths if path.suffix == ".png"]
  ends = [report.sentence, *(f"Picture: {x}" for x in pictures[:1])]
  text = "" if _BRIEF.value else report.text
  print("\n".join([text, "", *ends, f"Open: {report.paths[0]}"]).lstrip())
  return 0


def _broken_rule() -> str:
  """Returns what is wrong with the flags together, or nothing."""
  runs, results, command = _WORKDIR.value, _RESULTS.value, _COMMAND.value
  if _FINDINGS.value and runs:
    return f"--findings reads results: --workdir must not be given, got {runs}."
  for flag in (_COMMAND, _INTERIM):
    if flag.value and _FINDINGS.value:
      return f"--{flag.name} goes with --workdir and --results, not with --findings."
    if flag.value and not results:
      return f"--{flag.name} goes with --results, which is missing."
  if _FINDINGS.value:
    return ""
  if not runs:
    return "--workdir is required: a run folder, or any folder above some."
  if results and not command:
    return "--command is required with --results: the command that started the runs."
  if results and _OUTPUT.value:
    return "--output goes with a report or --findings; --results is where to write."
  return ""


def _report(runs: Path) -> Report:
  output = Path(_OUTPUT.value or runs / "report")
  return write_report(runs, output, _own_command([str(runs), f"--output={output}"]))


def _results(folder: Path, results: Path) -> Report:
  runs = load(folder)
  paths = results_lib.write(runs, results, _COMMAND.value, _INTERIM.value)
  missing = [f"Not finished: {x}." for x in results_lib.unfinished(runs)]
  finished = len(runs.trials) - len(missing)
  text = f"{finished} of {len(runs.trials)} trials below {folder} are finished."
  return Report("\n".join(missing), text, tuple(paths))


def _findings() -> Report:
  results = Path(_RESULTS.value or RESULTS)
  if not results.is_dir():
    raise RunsError(
      "--results must name the folder of kept results, which a clone has as "
      f"{RESULTS}; there is no folder {str(results)!r} here."
    )
  output = Path(_OUTPUT.value or results / "findings")
  rest = ["--findings", f"--results={results}", f"--output={output}"]
  return write_findings(results, output, _own_command(rest))


def _own_command(rest: Iterable[str]) -> str:
  return shlex.join(["python", "-m", "launch.report", *rest])


if __name__ == "__main__":
  cli.run(main)
