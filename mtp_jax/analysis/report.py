"""The report: one HTML file that needs nothing else, PNG and CSV files, and words."""

import dataclasses
import html
from pathlib import Path
from typing import Any

import pandas as pd

from mtp_jax.analysis import figures
from mtp_jax.analysis.gains import COMPARISONS, Analysis, analyse
from mtp_jax.analysis.ladders import NTP, settings_that_scale, size_text
from mtp_jax.analysis.page import definitions, html_figure, html_page, html_table
from mtp_jax.analysis.runs import load
from mtp_jax.analysis.verdict import Section, as_text, verdict
from mtp_jax.config import Config

TITLE = "Multi-token prediction: what the runs say"


@dataclasses.dataclass(frozen=True)
class Report:
  """The words, and the files that were written, report.html first."""

  text: str
  paths: tuple[Path, ...]


def write_report(root: Path, output: Path, command: str = "") -> Report:
  """Reads the run folders below `root` and writes the report into `output`.

  Raises:
    RunsError: see `runs.load`. Nothing is written then.
  """
  analysis = analyse(load(root))
  output.mkdir(parents=True, exist_ok=True)
  labels = list(dict.fromkeys(analysis.trials["ladder"]))
  body, texts, paths = [], [], []
  for number, label in enumerate(labels, start=1):
    ladder = analysis.ladder(label)
    sections = verdict(ladder)
    if len(labels) > 1:
      body.append(f"<h2>{html.escape(label)}</h2>")
      texts.append(f"== {label}")
    texts.append(as_text(sections))
    suffix = f"_{number}" if len(labels) > 1 else ""
    figure_html, written = _figures_html(ladder, output, suffix)
    body += [_verdict_html(sections), figure_html, _tables_html(ladder)]
    paths += written
  body += [_trials_html(analysis), definitions(), _provenance_html(analysis, command)]
  texts.append("\n".join(["Trials", *(f"  - {x}" for x in _state_lines(analysis))]))
  page = output / "report.html"
  page.write_text(html_page(TITLE, "\n".join(body)))
  return Report("\n\n".join(texts), (page, *paths, *_write_tables(analysis, output)))


def _write_tables(analysis: Analysis, output: Path) -> list[Path]:
  paths = []
  for name in ("trials", "levels", "pairs", "gains", "slopes", "rates"):
    table = getattr(analysis, name)
    paths.append(output / f"all_{name}.csv")
    _columns_for_csv(table).to_csv(paths[-1], index=False)
  return paths


def _columns_for_csv(table: pd.DataFrame) -> pd.DataFrame:
  return table.drop(columns=["config", "mtp", "order"], errors="ignore")


def _figures_html(
  ladder: Analysis, output: Path, suffix: str
) -> tuple[str, list[Path]]:
  parts, paths = [], []
  for plot in figures.PLOTS:
    drawn = figures.draw(plot, ladder)
    if drawn is None:
      continue
    figure, table = drawn
    png = output / f"{plot.stem}{suffix}.png"
    csv = png.with_suffix(".csv")
    parts.append(html_figure(figure, png, plot.title, plot.caption))
    _columns_for_csv(table).to_csv(csv, index=False)
    paths += [png, csv]
  return "\n".join(parts), paths


def _verdict_html(sections: list[Section]) -> str:
  parts = []
  for section in sections:
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in section.lines)
    title = html.escape(section.title)
    parts.append(
      f"<details><summary>{title}: all numbers</summary><ul>{lines}</ul></details>"
      if section.is_detail else f"<h3>{title}</h3><ul>{lines}</ul>"
    )
  return f'<div class="verdict">{"".join(parts)}</div>'


def _tables_html(ladder: Analysis) -> str:
  methods = method_table(ladder)
  parts = []
  if len(methods):
    parts += ["<h3>Methods at each size</h3>", html_table(methods)]
  scaled = settings_that_scale(ladder.trials)
  if len(scaled) > 1:
    scaled["size"] = scaled["size"].map(size_text)
    parts += ["<h3>Settings that follow the size</h3>", html_table(scaled)]
  described = ladder.trials.drop_duplicates("method")
  settings = pd.DataFrame(
    [
      {"method": row["method"]} | dataclasses.asdict(row["mtp"])
      for _, row in described.iterrows()
      if row["mtp"].depth and row["arm"] != "flops"
    ]
  )
  if len(settings):
    parts += ["<h3>Settings of the methods (mtp section)</h3>", html_table(settings)]
  return "\n".join(parts)


def method_table(ladder: Analysis) -> pd.DataFrame:
  """Returns one row per size and method: loss, gains and cost, as text."""
  losses = ladder.levels[ladder.levels["metric"] == "main_loss"]
  gains = ladder.gains[ladder.gains["metric"] == "main_loss"]
  trials = ladder.trials[ladder.trials["chosen"]]
  rows = []
  for _, loss in losses.sort_values(["size", "order"]).iterrows():
    key = {"size": loss["size"], "method": loss["method"]}
    own = _where(trials, **key)
    ntp = _where(trials, size=loss["size"], method=NTP)
    row = {
      "size": size_text(loss["size"]),
      "method": loss["method"],
      "learning rate": f"{own['learning_rate'].iloc[0]:g}",
      "seeds": loss["n"],
      "loss": _number(loss, 4, sign=False),
      "trained parameters": f"{own['total'].iloc[0]:,}",
      "FLOPs / NTP": _ratio(own["train_flops"], ntp["train_flops"]),
      "seconds / NTP": _ratio(own["train_seconds"], ntp["train_seconds"]),
    }
    for comparison in COMPARISONS:
      gain = _where(gains, **key, comparison=comparison)
      row[f"gain, equal {comparison}"] = (
        f"{gain['bound'].iloc[0]} {_number(gain.iloc[0], 4)}"
        f"{' (rough clock: no verdict)' if gain['is_rough'].iloc[0] else ''}".strip()
        if len(gain) else ""
      )
    rows.append(row)
  return pd.DataFrame(rows)


def _trials_html(analysis: Analysis) -> str:
  lines = "".join(f"<li>{html.escape(x)}</li>" for x in _state_lines(analysis))
  columns = {
    "trial": "trial", "status": "status", "step": "step", "num_steps": "of",
    "size": "size", "method": "method", "learning_rate": "learning rate",
    "seed": "seed", "data_seed": "data seed", "chosen": "compared",
    "skipped_steps": "skipped steps",
  }
  table = analysis.trials[list(columns)].rename(columns=columns)
  table["size"] = table["size"].map(size_text)
  table["compared"] = table["compared"].map({True: "yes", False: "no"})
  return (
    f"<h2>Trials</h2><ul>{lines}</ul><details><summary>All {len(table)} trials"
    f"</summary>{html_table(table)}</details>"
  )


def _state_lines(analysis: Analysis) -> list[str]:
  """What is finished, what is not, and which pairs are missing."""
  trials = analysis.trials
  finished = trials["status"] == "finished"
  lines = [f"{finished.sum()} of {len(trials)} trials below the folder are finished."]
  lines += [
    f"Not finished: {row['trial']} (step {row['step']} of {row['num_steps']})."
    for _, row in trials[~finished].iterrows()
  ]
  lines += [
    f"{row['trial']} repeats {row['copy']} and is left out."
    for _, row in trials[trials["copy"] != ""].iterrows()
  ]
  losses = analysis.runs.metrics
  broken = losses[(losses["metric"] == "main_loss") & losses["mean"].isna()]
  lines += [
    f"{name} ended with a loss that is not a number and is left out."
    for name in broken["trial"]
  ]
  skipped = trials[trials["skipped_steps"] > 0]
  lines += [
    f"{row['trial']} skipped {row['skipped_steps']} update(s): loss or gradient was "
    f"not finite."
    for _, row in skipped.iterrows()
  ]
  return lines + _missing_pairs(trials)


def _missing_pairs(trials: pd.DataFrame) -> list[str]:
  """MTP trials without an NTP partner, and seeds of NTP that a method lacks."""
  lines = []
  chosen = trials[trials["chosen"]]
  for (_, size), cell in chosen.groupby(["ladder", "size"]):
    seeds = {
      method: set(zip(rows["seed"], rows["data_seed"], strict=True))
      for method, rows in cell.groupby("method", sort=False)
    }
    ntp = seeds.pop(NTP, set())
    for method, own in seeds.items():
      for who, lacking in ((NTP, own - ntp), (method, ntp - own)):
        if lacking:
          names = ", ".join(f"{s} (data {d})" for s, d in sorted(lacking))
          other = method if who == NTP else NTP
          lines.append(
            f"At {size_text(size)}, {who} lacks seed {names} that {other} has; "
            f"unpaired trials are not compared."
          )
  return lines


def _text(config: Config) -> str:
  data = config.data
  trained_on = f", trained on {data.train_on}" if data.train_on else ""
  return f"{data.source} {data.path}{trained_on}"


def _provenance_html(analysis: Analysis, command: str) -> str:
  trials = analysis.trials
  config = trials["config"].iloc[0]
  seeds = sorted(set(zip(trials["seed"], trials["data_seed"], strict=True)))
  facts = {
    "Command": command,
    "Commit": _distinct(trials["commit"]),
    "Hardware": _distinct(trials["hardware"]),
    "Versions": _distinct(trials["versions"]),
    "Seeds (model, data)": ", ".join(f"({s}, {d})" for s, d in seeds),
    "Text": _distinct(trials["config"].map(_text)),
    "Tokenizer": _distinct(
      trials["config"].map(lambda c: f"{c.tokenizer.kind}, {c.tokenizer.vocab_size}")
    ),
    "Held-out split": f"{config.eval.split}, "
    f"{_distinct(trials.loc[trials['num_documents'] > 0, 'num_documents'])} documents",
  }
  rows = "".join(
    f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>"
    for key, value in facts.items()
    if value
  )
  return f"<h2>Where it comes from</h2><table>{rows}</table>"


def _distinct(values: pd.Series) -> str:
  """The different values that occur, or a plain word if there are none."""
  texts = dict.fromkeys(str(v).strip() for v in values)
  return "; ".join(t for t in texts if t) or "not recorded"


def _where(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
  for column, value in values.items():
    table = table[table[column] == value]
  return table


def _ratio(own: pd.Series, other: pd.Series) -> str:
  return f"{own.median() / other.median():.2f}" if len(other) else ""


def _number(row: pd.Series, digits: int, sign: bool = True) -> str:
  plus = "+" if sign else ""
  text = f"{row['mean']:{plus}.{digits}f}"
  if pd.notna(row["low"]):
    text += f" [{row['low']:{plus}.{digits}f}, {row['high']:{plus}.{digits}f}]"
  return text
