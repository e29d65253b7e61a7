"""The page of verdicts: every claim beside what was measured here.

Reads the results folders of all experiments; one that is not there is "not yet run".
"""

import dataclasses
import html
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtp_jax.analysis import claims as claims_lib
from mtp_jax.analysis.claims import Claim, Experiment
from mtp_jax.analysis.drawing import STYLE, ZERO
from mtp_jax.analysis.page import html_figure, html_page, html_table
from mtp_jax.analysis.report import Report
from mtp_jax.analysis.results import Facts
from mtp_jax.analysis.rules import Estimate, Finding
from mtp_jax.analysis.runs import RunsError

TITLE = "Multi-token prediction: published claims, measured here"
# Okabe and Ito's colours; the mark and the word say it too.
COLOURS = {
  claims_lib.REPRODUCED: "#0072B2",
  claims_lib.AS_EXPECTED: "#0072B2",
  claims_lib.NOT_REPRODUCED: "#D55E00",
  claims_lib.NOT_AS_EXPECTED: "#D55E00",
  claims_lib.UNDECIDABLE: "#6b6b6b",
  claims_lib.NOT_RUN: "#6b6b6b",
}
MARKS = {
  claims_lib.REPRODUCED: "+",
  claims_lib.AS_EXPECTED: "+",
  claims_lib.NOT_REPRODUCED: "−",  # noqa: RUF001
  claims_lib.NOT_AS_EXPECTED: "−",  # noqa: RUF001
  claims_lib.UNDECIDABLE: "?",
  claims_lib.NOT_RUN: "·",
}
_NO_FACTS = Facts((), (), (), (), (), 0, 0, "")


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
      "verdict": self.verdict,
      "rule": self.claim.rule,
      "hardware": "; ".join(self.facts.hardware),
      "commit": "; ".join(self.facts.commit),
      "date": self.facts.date,
      "command": "; ".join(self.facts.command) or self.experiment.command,
    }


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What is seen of an experiment: its figure, the numbers in it, perhaps a table."""

  figure: Figure
  numbers: pd.DataFrame
  table: pd.DataFrame | None


def write_findings(results: Path, output: Path, command: str = "") -> Report:
  """Reads the results folders in `results` and writes the page into `output`.

  Raises:
    RunsError: no such folder, or results that are damaged or lack what a claim needs.
      Nothing is written then.
  """
  if not results.is_dir():
    raise RunsError(f"{results}: no such folder; it holds the results of experiments.")
  rows, drawn = [], []
  for experiment in claims_lib.experiments():
    own, drawing = _findings(experiment, results / experiment.folder)
    rows += own
    if drawing:
      drawn.append((experiment, drawing))
  output.mkdir(parents=True, exist_ok=True)
  figures, paths = [], []
  for experiment, seen in drawn:
    png = output / f"{experiment.folder}.png"
    figures.append(html_figure(seen.figure, png, experiment.title, experiment.caption))
    seen.numbers.to_csv(png.with_suffix(".csv"), index=False)
    paths += [png, png.with_suffix(".csv")]
    if seen.table is not None:
      figures[-1] += html_table(seen.table)
      paths.append(output / f"{experiment.folder}_table.csv")
      seen.table.to_csv(paths[-1], index=False)
  measured = [row for row in rows if row.verdict != claims_lib.NOT_RUN]
  if measured:
    paths.append(output / "summary.png")
    _summary(measured).savefig(paths[-1])
  tables = {
    "findings.html": html_page(TITLE, _body(rows, measured, figures, command)),
    "findings.csv": pd.DataFrame([row.as_dict() for row in rows]).to_csv(index=False),
    "estimates.csv": _estimates(measured).to_csv(index=False),
    "findings.md": _markdown(rows, measured),
  }
  for name, content in tables.items():
    (output / name).write_text(content)
  return Report(_as_text(rows), (*(output / name for name in tables), *paths))


def _findings(
  experiment: Experiment, folder: Path
) -> tuple[list[Row], Drawn | None]:
  """Returns the rows of an experiment and its drawing, if there is something to see."""
  if not folder.is_dir():
    return [Row(experiment, x, None, _NO_FACTS) for x in experiment.claims], None
  results = experiment.read(folder)
  rows = []
  for claim in experiment.claims:
    try:
      finding = claim.test(results)
    except RunsError as e:
      raise RunsError(f"{folder}, claim {claim.key!r}: {e}") from e
    rows.append(Row(experiment, claim, finding, results.facts))
  if all(row.verdict == claims_lib.NOT_RUN for row in rows):
    return rows, None
  with matplotlib.rc_context(STYLE):
    seen = experiment.draw(results)
  return rows, Drawn(*seen, experiment.table(results) if experiment.table else None)


def _estimates(rows: list[Row]) -> pd.DataFrame:
  """Returns every estimate of the measured claims, one a row."""
  fields = [x.name for x in dataclasses.fields(Estimate) if x.name != "text"]
  return pd.DataFrame(
    [
      {"experiment": row.experiment.folder, "claim": row.claim.key}
      | {field: getattr(estimate, field) for field in fields}
      for row in rows for estimate in row.finding.estimates
    ],
    columns=["experiment", "claim", *fields],
  )


def _as_text(rows: list[Row]) -> str:
  """Returns the verdicts for a terminal; experiments that were not run in one line."""
  width = max(map(len, COLOURS))
  waiting = _waiting(rows)
  lines = []
  for folder, own in _by_experiment(rows).items():
    if folder in waiting:
      continue
    lines.append(folder)
    for row in own:
      lines.append(f"  {row.verdict:<{width}}  {row.claim.statement}")
      lines += [f"  {'':{width}}    {x}" for x in textwrap.wrap(row.ours, 76)]
  if waiting:
    lines.append(claims_lib.NOT_RUN)
    lines += [f"  {x}: {own[0].experiment.command}" for x, own in waiting.items()]
  return "\n".join([*lines, _count(rows)])


def _count(rows: list[Row]) -> str:
  verdicts = [row.verdict for row in rows]
  counts = ", ".join(f"{verdicts.count(x)} {x}" for x in COLOURS if x in verdicts)
  return f"{len(rows)} claims: {counts}."


def _by_experiment(rows: list[Row]) -> dict[str, list[Row]]:
  groups: dict[str, list[Row]] = {}
  for row in rows:
    groups.setdefault(row.experiment.folder, []).append(row)
  return groups


def _markdown(rows: list[Row], measured: list[Row]) -> str:
  """Returns the measured claims as a table, then what waits for a machine."""
  lines = [
    "| claim | source: published | ours, 95 % interval over seeds | seeds | verdict |",
    "|---|---|---|---|---|",
  ]
  for row in measured:
    cells = (
      row.claim.statement, f"{row.claim.source}: {row.claim.published}", row.ours,
      str(row.finding.seeds), f"**{row.verdict}**",
    )
    lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  waiting = _waiting(rows)
  if waiting:
    lines += ["", "Not yet run:", ""]
    lines += [
      f"- {folder} (claims: {len(own)}): `{own[0].experiment.command}`"
      for folder, own in waiting.items()
    ]
  return "\n".join(lines) + "\n"


def _waiting(rows: list[Row]) -> dict[str, list[Row]]:
  """Returns the rows, by folder, of experiments without any finding."""
  return {
    folder: own
    for folder, own in _by_experiment(rows).items()
    if all(row.verdict == claims_lib.NOT_RUN for row in own)
  }


def _body(
  rows: list[Row], measured: list[Row], figures: list[str], command: str
) -> str:
  parts = [f'<div class="verdict"><p>{html.escape(_count(rows))}</p></div>']
  for own in _by_experiment(measured).values():
    parts += [
      f"<h2>{html.escape(own[0].experiment.title)} ({own[0].experiment.preset})</h2>",
      _claims_html(own),
      _facts_html(own[0]),
      figures.pop(0),
    ]
  waiting = _waiting(rows)
  parts.append("<h2>Not yet run</h2>")
  if waiting:
    table = [
      {"experiment": x, "claims": len(own), "command": own[0].experiment.command}
      for x, own in waiting.items()
    ]
    parts.append(html_table(pd.DataFrame(table)))
  listed = [row for row in rows if row.verdict == claims_lib.NOT_RUN]
  if listed:
    parts.append(
      f"<details><summary>Their {len(listed)} claims, with the rules</summary>"
      f"{_claims_html(listed)}</details>"
    )
  else:
    parts.append("<p>Nothing: every claim has a finding.</p>")
  parts.append(
    "<h2>How to read this</h2><p>Every rule is code, and was written before its "
    "results were read, unless it says otherwise. Brackets are 95 % intervals: "
    "Wilson's for shares of seeds, Student's t over seeds for all else; they speak of "
    "seeds, not of the choice of held-out examples, which all trials share. A verdict "
    "is about the models trained here, which are far smaller than the published ones: "
    "<em>not reproduced</em> does not say that the published figure is wrong. Many "
    "intervals are shown, and of those without any effect one in twenty misses its "
    "threshold by chance.</p>"
  )
  if command:
    parts.append(f"<p>Written by <code>{html.escape(command)}</code>.</p>")
  return "\n".join(parts)


def _claims_html(rows: list[Row]) -> str:
  header = ("verdict", "claim", "published", "ours", "seeds", "rule")
  lines = ["".join(f"<th>{name}</th>" for name in header)]
  for row in rows:
    badge = (
      f'<span style="background:{COLOURS[row.verdict]};color:#fff;padding:.1rem .4rem;'
      f'border-radius:3px">{MARKS[row.verdict]} {html.escape(row.verdict)}</span>'
    )
    seeds = str(row.finding.seeds) if row.finding else ""
    cells = (
      row.claim.statement, f"{row.claim.source}: {row.claim.published}", row.ours,
      seeds, row.claim.rule,
    )
    escaped = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    lines.append(f"<td>{badge}</td>{escaped}")
  body = "\n".join(f"<tr>{line}</tr>" for line in lines)
  return f'<div class="wide"><table>{body}</table></div>'


def _facts_html(row: Row) -> str:
  facts = row.facts
  values = {
    "Command": "; ".join(facts.command) or row.experiment.command,
    "Commit": "; ".join(facts.commit),
    "Hardware": "; ".join(facts.hardware),
    "Versions": "; ".join(facts.versions),
    "Seeds": ", ".join(map(str, facts.seeds)),
    "Trials": f"{facts.finished} of {facts.trials} finished",
    "Date": facts.date,
  }
  lines = "".join(
    f"<tr><th>{key}</th><td>{html.escape(value or 'not recorded')}</td></tr>"
    for key, value in values.items()
  )
  return f"<table>{lines}</table>"


def _summary(rows: list[Row]) -> Figure:
  """Draws one row a claim: words, where the interval lies, the verdict.

  The middle line is the threshold of the claim's rule; to its right the claim holds.
  Every row has its own scale, and the texts their places in inches.
  """
  height = 0.46 * len(rows) + 0.5
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(8.0, height), dpi=150)
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set(xlim=(0, 8), ylim=(len(rows) + 0.2, -0.9))
    ax.axis("off")
    ax.text(0.1, -0.45, "claim, and what was measured here", color="#444444")
    ax.text(5.45, -0.45, "against | for it", color="#444444", ha="center")
    ax.plot([5.45, 5.45], [-0.25, len(rows)], **ZERO)
    for place, row in enumerate(rows):
      _summary_row(ax, place, row)
  return figure


def _summary_row(ax: Axes, place: int, row: Row) -> None:
  colour = COLOURS[row.verdict]
  preset = "" if row.experiment.preset == "cpu" else f" ({row.experiment.preset})"
  ax.text(0.1, place + 0.2, row.claim.statement + preset, va="bottom", weight="bold")
  estimates = row.finding.estimates
  weakest = min(estimates, key=_margin)
  more = f", weakest of {len(estimates)}" if len(estimates) > 1 else ""
  ours = textwrap.shorten(f"{weakest}{more}", 78, placeholder=" ...")
  ax.text(0.1, place + 0.27, ours, va="top", color="#444444", fontsize=8)
  gap = 0.5 / (1 + len(estimates))
  for index, estimate in enumerate(estimates):
    bar = _to_scale(estimate)
    y = place + 0.05 + gap * (1 + index)
    ax.plot(5.45 + 0.8 * bar[[0, 2]], [y, y], color=colour, linewidth=1.6)
    ax.plot(5.45 + 0.8 * bar[1], y, color=colour, marker="o", markersize=4)
  words = textwrap.fill(f"{MARKS[row.verdict]} {row.verdict}", 18)
  ax.text(6.45, place + 0.3, words, va="center", color=colour, weight="bold")
  ax.axhline(place + 0.82, color="#e3e3e3", linewidth=0.6)


def _margin(estimate: Estimate) -> float:
  """How clearly an estimate is for the claim, on its own scale; less is weaker."""
  low, _, high = _to_scale(estimate)
  if np.isnan(low):
    return -np.inf
  return -max(abs(low), abs(high)) if estimate.side == "around" else low


def _to_scale(estimate: Estimate) -> np.ndarray:
  """Returns (low, mean, high) from the threshold, in [-1, 1]; positive is for it."""
  sign = -1.0 if estimate.side == "below" else 1.0
  ends = [estimate.low, estimate.mean, estimate.high]
  distance = sign * (np.array(ends[:: int(sign)], float) - estimate.threshold)
  largest = np.nanmax(np.abs(distance), initial=0.0)
  return distance / largest if largest else distance
