"""The page of verdicts: every claim beside what was measured here.

Reads the results folders of all experiments; a missing folder is "not yet run".
Writes Markdown, tables (CSV) and figures (PNG).
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from mtp_jax.analysis import page, tax_and_gain
from mtp_jax.analysis.claims import picture
from mtp_jax.analysis.claims.claim import (
  EQUIVALENT,
  NOT_RUN,
  NOT_TESTED,
  OPPOSITE,
  SUPPORTED,
  UNDECIDED,
  Claim,
  Estimate,
  Experiment,
  Finding,
)
from mtp_jax.analysis.claims.table import experiments
from mtp_jax.analysis.drawing import STYLE
from mtp_jax.analysis.report import Report
from mtp_jax.analysis.results import Facts
from mtp_jax.analysis.runs import RunsError

VERDICTS = (SUPPORTED, OPPOSITE, EQUIVALENT, UNDECIDED, NOT_TESTED, NOT_RUN)
_NO_FACTS = Facts((), (), (), (), (), 0, 0, "")
_HEADINGS = {
  SUPPORTED: "Supported",
  OPPOSITE: "Opposite: measured the other way round",
  EQUIVALENT: "Equivalent: any difference is smaller than the margin",
  UNDECIDED: "Undecided",
  NOT_TESTED: "Not tested, because of the design",
}
_HOW_TO_READ = """\
Brackets are 95 % intervals over seeds (Student's t, Wilson's for shares of seeds, BCa
or Welch's for slopes); held-out examples are shared by all trials. An interval inside
the claim's margin is *equivalent*; else it is *supported* or *opposite* by its side of
the threshold, else *undecided*. Verdicts are about the models trained here, which are
far smaller than the published ones. Rules were written before their results were read,
unless they say otherwise; the margins, and the rules on tokens until a star graph is
solved, came after the runs of `star_graph` and of all experiments below it."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A claim and what is known about it; `finding` is None without results."""

  experiment: Experiment
  claim: Claim
  finding: Finding | None
  facts: Facts

  @property
  def verdict(self) -> str:
    return self.claim.verdict(self.finding)

  @property
  def ours(self) -> str:
    if self.finding is None:
      return ""
    if self.finding.seeds == 0:
      return "no complete set of finished trials for it"
    return self.finding.ours

  def as_dict(self) -> dict[str, Any]:
    """Returns the row of findings.csv."""
    return {
      "experiment": self.experiment.folder,
      "claim": self.claim.key,
      "statement": self.claim.statement,
      "source": self.claim.source,
      "published": self.claim.published,
      "ours": self.ours,
      "seeds": self.finding.seeds if self.finding else 0,
      "margin": str(self.claim.margin),
      "verdict": self.verdict,
      "interim": self.facts.interim,
      "rule": self.claim.rule,
      "not_tested": self.claim.not_tested,
      "hardware": "; ".join(self.facts.hardware),
      "commit": "; ".join(self.facts.commit),
      "date": self.facts.date,
      "command": "; ".join(self.facts.command) or self.experiment.command,
    }


def write_findings(results: Path, output: Path, command: str = "") -> Report:
  """Reads the results folders in `results` and writes the page into `output`.

  Raises:
    RunsError: no such folder, or results that are damaged or lack what a claim needs.
      Nothing is written then.
  """
  if not results.is_dir():
    raise RunsError(f"{results}: no such folder; it holds the results of experiments.")
  judged = [_judge(x, results / x.folder) for x in experiments()]
  rows = [row for own, _ in judged for row in own]
  kept = [(own[0].experiment, read) for own, read in judged if _has_run(own)]
  reads = {x.folder: read for x, read in kept}
  # What figure and table of an experiment read.
  sources = {
    x.folder: [reads[name] for name in (x.folder, x.beside) if name in reads]
    for x, _ in kept
  }
  with matplotlib.rc_context(STYLE):
    drawings = {x.folder: picture.of(x, *sources[x.folder]) for x, _ in kept}
    # The largest preset of each experiment that has results.
    panels = tax_and_gain.of_results({x.name: read for x, read in kept})
    both = tax_and_gain.draw(panels)
    drawings |= {"tax_and_gain": both} if both else {}
  output.mkdir(parents=True, exist_ok=True)
  measured = [row for row in rows if row.verdict != NOT_RUN]
  tables = {
    "findings.csv": pd.DataFrame([row.as_dict() for row in rows]),
    "estimates.csv": _estimates(measured),
    **{f"{name}.csv": numbers for name, (_, numbers) in drawings.items()},
    **{
      f"{x.folder}_table.csv": x.table(*sources[x.folder]) for x, _ in kept if x.table
    },
  }
  for name, (figure, _) in drawings.items():
    figure.savefig(output / f"{name}.png")
  for name, table in tables.items():
    table.to_csv(output / name, index=False)
  shown = {panel.name for panel in panels}
  interim = [
    f"{x.folder} has {read.facts.interim}" for x, read in kept
    if x.name in shown and read.facts.interim
  ]
  caption = tax_and_gain.caption(both[1], "; ".join(interim)) if both else ""
  markdown = _markdown([own for own, _ in judged], caption, command)
  (output / "findings.md").write_text(markdown)
  names = ["findings.md", *tables, *(f"{name}.png" for name in drawings)]
  text = markdown[: markdown.index("## Each experiment")]
  return Report(text, _counts(rows), tuple(output / name for name in names))


def _judge(experiment: Experiment, folder: Path) -> tuple[list[Row], Any]:
  """Returns the rows of an experiment and its results, None if it was not run."""
  if not folder.is_dir():
    return [Row(experiment, x, None, _NO_FACTS) for x in experiment.claims], None
  results = experiment.read(folder)
  rows = []
  for claim in experiment.claims:
    try:
      rows.append(Row(experiment, claim, claim.judge(results), results.facts))
    except RunsError as e:
      raise RunsError(f"{folder}, claim {claim.key!r}: {e}") from e
  return rows, results


def _has_run(rows: list[Row]) -> bool:
  return any(row.verdict != NOT_RUN for row in rows)


def _estimates(rows: list[Row]) -> pd.DataFrame:
  """Returns every estimate of the measured claims, one a row."""
  fields = [x.name for x in dataclasses.fields(Estimate) if x.name != "text"]
  return pd.DataFrame(
    [
      {"experiment": row.experiment.folder, "claim": row.claim.key}
      | {field: getattr(estimate, field) for field in fields}
      | {"verdict": estimate.verdict}
      for row in rows for estimate in row.finding.estimates
    ],
    columns=["experiment", "claim", *fields, "verdict"],
  )


def _counts(rows: list[Row]) -> str:
  verdicts = [row.verdict for row in rows]
  counts = ", ".join(f"{verdicts.count(x)} {x}" for x in VERDICTS if x in verdicts)
  return f"{len(verdicts)} claims: {counts}."


def _markdown(groups: list[list[Row]], caption: str, command: str) -> str:
  """Returns the page: decided claims, the others, then each experiment, folded."""
  rows = [row for group in groups for row in group]

  def listed(verdicts: tuple[str, ...], heading: str) -> Iterator[str]:
    for verdict in verdicts:
      own = [_bullet(row) for row in rows if row.verdict == verdict]
      if own:
        yield from (heading.format(_HEADINGS[verdict]), "", *own, "")

  lines = [
    "# What multi-token prediction does at the sizes of a CPU", "",
    *listed((SUPPORTED, OPPOSITE, EQUIVALENT), "**{}**"),
  ]
  interim = {row.experiment.folder: row.facts.interim for row in rows}
  lines += [
    f"*Interim* are the results of `{folder}`: {words}. Their verdicts may change.\n"
    for folder, words in interim.items() if words
  ]
  if caption:
    lines += [f"![{caption}](tax_and_gain.png)", "", caption, ""]
  lines += [_HOW_TO_READ, "", *listed((UNDECIDED, NOT_TESTED), "## {}")]
  lines += ["## Each experiment: rules, figure, where it comes from", ""]
  waiting = []
  for own in groups:
    experiment = own[0].experiment
    if _has_run(own):
      title = f"{experiment.title} ({experiment.folder})"
      lines += page.details(title, _section(own))
    else:
      waiting.append(f"- {experiment.folder}: `{experiment.command}`")
  if waiting:
    lines += page.details(f"Not yet run: {len(waiting)} presets", waiting)
  if command:
    lines.append(f"Written by `{command}`.")
  return "\n".join(lines) + "\n"


def _bullet(row: Row) -> str:
  """Returns one claim in a line: what was claimed, what was measured, where."""
  reason = row.claim.not_tested if row.verdict == NOT_TESTED else _brief(row.finding)
  interim = ", *interim*" if row.facts.interim else ""
  return f"- {row.claim.statement}: {reason} (`{row.experiment.folder}`{interim})"


def _brief(finding: Finding) -> str:
  """Returns the estimates with two digits; of more than two, how far they reach."""
  estimates = finding.estimates
  if len(estimates) > 2:
    means = [f"{x(y.mean for y in estimates):.2g}" for x in (min, max)]
    return f"{' to '.join(means)} in {len(estimates)} comparisons"
  number = re.compile(r"[+-]?\d+\.\d{4}")
  labels = (f"{x.label} " if len(estimates) > 1 else "" for x in estimates)
  return "; ".join(
    label + number.sub(lambda x: format(float(x[0]), _sign(x[0]) + ".2g"), own.text)
    for label, own in zip(labels, estimates, strict=True)
  )


def _sign(number: str) -> str:
  return "+" if number[0] in "+-" else ""


def _section(rows: list[Row]) -> Iterator[str]:
  """Yields an experiment's table of claims, its figure and its facts."""
  yield "| claim | source: published | rule, margin | ours | seeds | verdict |"
  yield "|---|---|---|---|---|---|"
  for row in rows:
    claim = row.claim
    cells = (
      claim.statement, f"{claim.source}: {claim.published}",
      f"{claim.rule}; margin {claim.margin}", row.ours,
      str(row.finding.seeds if row.finding else 0),
      row.verdict + (" (interim)" if row.facts.interim else ""),
    )
    yield f"| {' | '.join(x.replace('|', '/') for x in cells)} |"
  experiment, facts = rows[0].experiment, rows[0].facts
  yield ""
  yield f"![{experiment.title}]({experiment.folder}.png)"
  more = f", `{experiment.folder}_table.csv`" if experiment.table else ""
  interim = f" Interim: {facts.interim}." if facts.interim else ""
  yield f"\n{experiment.caption}{interim} Numbers: `{experiment.folder}.csv`{more}.\n"
  origin = {
    "Command": "; ".join(f"`{x}`" for x in facts.command or (experiment.command,)),
    "Commit": "; ".join(facts.commit),
    "Hardware": "; ".join(facts.hardware),
    "Versions": "; ".join(facts.versions),
    "Seeds": ", ".join(map(str, facts.seeds)),
    "Trials": f"{facts.finished} of {facts.trials} finished",
    "Date": facts.date,
  } | ({"Interim": facts.interim} if facts.interim else {})
  for key, value in origin.items():
    yield f"- {key}: {value or 'not recorded'}"
