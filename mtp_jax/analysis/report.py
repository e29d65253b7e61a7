"""The report of a folder of runs: Markdown, one HTML file, PNG and CSV files.

The page begins with a sentence, a figure and a table: each method's gain over
next-token prediction at every size, its interval and its verdict. The rest is folded.
Trials on siblings and star graphs have the gain that their claims are about; all other
trials are compared ladder by ladder.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from mtp_jax.analysis import figures, ladders, page, tax_and_gain
from mtp_jax.analysis import results as results_lib
from mtp_jax.analysis.checks import check_ladder, rows_of
from mtp_jax.analysis.claims import by_size, claim, look_ahead, siblings
from mtp_jax.analysis.drawing import STYLE
from mtp_jax.analysis.gains import (
  COMPARISONS,
  EXACT,
  SHARES,
  TOKENS,
  Analysis,
  analyse,
  effect,
  rough_clocks,
  trend,
)
from mtp_jax.analysis.ladders import NTP, settings_that_scale, size_text
from mtp_jax.analysis.results import Results, unfinished
from mtp_jax.analysis.runs import load
from mtp_jax.analysis.statistics import interval
from mtp_jax.config import Config

TITLE = "Multi-token prediction: what the runs show"
# What the trials of a task are reported as.
_TASKS = {"siblings": siblings.experiment, "look_ahead": look_ahead.experiment}
# Columns of gains: (name, comparison, metric).
_GAINS = (
  *((f"gain, equal {x}", x, "main_loss") for x in COMPARISONS),
  *((f"gain, {x.replace('_', ' ')}", TOKENS, x) for x in SHARES),
)
_DEFINITIONS = {
  "Size": """Parameters of the plain next-token model with the trial's trunk settings,
    embeddings included; of the model that a shortened trunk is compared with.""",
  "Gain": """NTP minus MTP for losses, MTP minus NTP for shares; positive is better.
    Always between trials of the same size, model seed (the same initial values of the
    layers that both have) and data seed (the same order of the text).""",
  "Interval": """In brackets: Student's t at 95 % over pairs of seeds, not over held-out
    documents, which all trials share. "Equal within the margin": the interval lies
    within 0.01 nats, 5 points, or a factor of 1.3 in tokens. "No effect found": it is
    wider and holds 0.""",
  "Equal FLOPs, equal wall clock": """The MTP trial's model FLOPs, or its training
    seconds (median over seeds) at the median speed of NTP at this size, are turned into
    the tokens that NTP trains on with them. NTP's metric at that many tokens is
    interpolated, linearly in their logarithm, between finished NTP runs of the same
    size and seeds: the plain one and the longer ones of arm "flops". A point in the
    middle of a longer run is not used: its learning rate has not come down yet, which
    would flatter MTP. Beyond the finished runs there is only a bound ("at most", "at
    least"). Budgets within 1 % count as equal. The clock runs while training steps run.
    It has no verdict where equal runs differ by more than the method and NTP do.""",
  "Per decade": """Gain per factor of ten in size: least squares on log10 of the size,
    seeds resampled within a size (BCa), Welch's interval below 8 seeds. The interval
    accounts for seeds, not for a trend that is not a straight line.""",
  "Learning rate": """Of several that a method was trained with at one size, the rate
    with the most seeds is used, the lowest mean loss among equals.""",
  "Ladder counts": """Every larger NTP model is better than the next smaller one beyond
    seed noise; NTP's learning rate is the best of at least three at every size, with
    worse neighbours on both sides, at most 4 times away; each method's neighbours were
    tried at every size and none is better beyond seed noise (95 %, from the spread of
    paired differences at that size). Rates are compared on shared seeds.""",
}


@dataclasses.dataclass(frozen=True)
class Report:
  """What to print, a sentence on it, and the written files, the page to open first."""

  text: str
  sentence: str
  paths: tuple[Path, ...]


def write_report(root: Path, output: Path, command: str = "") -> Report:
  """Reads the run folders below `root` and writes the report into `output`.

  Raises:
    RunsError: see `runs.load`. Nothing is written then.
  """
  runs = load(root)
  analysis = analyse(runs)
  tasks = {
    name: results_lib.of(own) for name, source in tax_and_gain.SOURCES.items()
    if len((own := runs.of_source(source)).trials)
  }
  # A task without a pair of trials is compared like text.
  of_tasks = tax_and_gain.of_results(tasks)
  covered = {tax_and_gain.SOURCES[panel.name] for panel in of_tasks}
  sources = ladders.sources(analysis.trials)
  labels = [label for label, source in sources.items() if source not in covered]
  of_ladders = {label: analysis.ladder(label) for label in labels}
  output.mkdir(parents=True, exist_ok=True)
  panels = [*tax_and_gain.of_ladders(analysis, labels), *of_tasks]
  words = {label: in_short(ladder) for label, ladder in of_ladders.items()}
  nothing = next((own[0] for own in words.values()), "")
  sentence = tax_and_gain.sentence(panels) if panels else nothing
  first = _first_table(of_ladders, of_tasks)
  table = page.table(first) if len(first) else ""
  lines, paths = [f"# {TITLE}", "", f"**{sentence}**", ""], []
  head = _write_drawing(output / "tax_and_gain.png", tax_and_gain.draw, panels)
  if head:
    caption = tax_and_gain.caption(pd.read_csv(head[1]))
    lines += [f"![{caption}]({head[0].name})", "", caption, "", table, ""]
    paths += head
  for panel in of_tasks:
    own = _TASKS[panel.name]("cpu")
    part, written = _task_part(own, tasks[panel.name], output)
    lines += part
    paths += written
  for number, (label, ladder) in enumerate(of_ladders.items(), start=1):
    suffix = f"_{number}" if len(labels) > 1 else ""
    drawn, written = _figures(ladder, output, suffix)
    if len(labels) > 1:
      lines += [f"## {label}", ""]
    # The first of these words is the sentence at the top of the page.
    lines += [*words[label][2:], "", *_folded(ladder, drawn)]
    paths += written
  states = [f"- {line}" for line in _states(analysis)]
  lines += page.details("Trials", [*states, "", _trials(analysis)])
  lines += page.details(
    "How it is computed",
    (f"- **{term}**: {' '.join(text.split())}" for term, text in _DEFINITIONS.items()),
  )
  lines += page.details("Where it comes from", _provenance(analysis, command))
  markdown = "\n".join(lines)
  pages = {
    "report.html": page.html(markdown, TITLE, output), "report.md": markdown,
  }
  for name, content in pages.items():
    (output / name).write_text(content)
  tables = []
  for name in ("trials", "levels", "pairs", "gains", "slopes", "rates"):
    tables.append(output / f"all_{name}.csv")
    _write(getattr(analysis, name), tables[-1])
  standing = [x for label, own in words.items() for x in (label, *own[1:]) if x]
  text = "\n".join([table, "", *standing, "", "Trials", *states])
  return Report(text, sentence, (*(output / name for name in pages), *paths, *tables))


def _first_table(
  of_ladders: dict[str, Analysis], of_tasks: list[tax_and_gain.Panel]
) -> pd.DataFrame:
  """Returns method x size, as text: gain with interval and verdict."""
  shown = [name for name, *_ in _GAINS[: len(COMPARISONS)]]
  parts = []
  for label, ladder in of_ladders.items():
    rows = method_table(ladder)
    columns = [name for name in shown if name in rows]
    if columns:
      rows = rows.dropna(subset=columns, how="all")
      data = label.removeprefix("data.source=")
      parts.append(rows[["method", "size", "seeds", *columns]].assign(data=data))
  for panel in of_tasks:
    index, gains = by_size.cells(panel.pairs, ["series"], sort=False)
    own = [interval(x) | {"bound": "", "is_rough": False} for x in gains]
    parts.append(pd.DataFrame({
      "method": index["series"], "size": index["size"].map(size_text),
      "seeds": [x["n"] for x in own],
      shown[0]: [f"{_interval(x)}: {effect(x, panel.part.margin.value)}" for x in own],
      "data": panel.part.data,
    }))
  rows = pd.concat(parts) if parts else pd.DataFrame(columns=["data"])
  first = ["data"] if rows["data"].nunique() > 1 else []
  return rows[[*first, *(x for x in rows if x != "data")]]


def _task_part(
  experiment: claim.Experiment, results: Results, output: Path
) -> tuple[list[str], list[Path]]:
  """Returns the folded part of a task, every score of it, and its files."""
  paths = _write_drawing(output / f"{experiment.name}.png", experiment.draw, results)
  lines = [
    f"![{experiment.title}]({paths[0].name})", "", experiment.caption, "",
    page.table(experiment.table(results).round(4)), "",
  ]
  return page.details(experiment.title, lines), paths


def _write_drawing(png: Path, draw: Callable, shown: Any) -> list[Path]:
  """Draws and writes a figure and its numbers; returns the files, if there are any."""
  with matplotlib.rc_context(STYLE):
    drawn = draw(shown)
  if drawn is None:
    return []
  drawn[0].savefig(png)
  _write(drawn[1], png.with_suffix(".csv"))
  return [png, png.with_suffix(".csv")]


def in_short(ladder: Analysis) -> list[str]:
  """Returns what the ladder shows in a sentence, and whether it counts."""
  finished = set(ladder.levels["method"])
  panels = tax_and_gain.of_ladders(ladder, ladder.trials["ladder"].unique())
  reasons = {
    "No trial is finished: there is nothing to compare.": not finished,
    "There is no finished NTP trial, so no gain can be computed.": NTP not in finished,
    "Only NTP is finished: there is no MTP trial to compare with NTP.": (
      finished == {NTP}
    ),
    "No MTP trial has a finished NTP partner of the same size, seed and data seed, so "
    "no gain can be computed.": not panels,
  }
  for reason, is_so in reasons.items():
    if is_so:
      return [reason]
  check = check_ladder(ladder)
  lines = [f"**{tax_and_gain.sentence(panels)}**"]
  counted = [method for method in check.spans if check.counts(method)]
  if not check.spans:
    standing = "One size a method: no evidence of how gains change with size."
  elif not counted:
    standing = "This ladder does not count as evidence about size; reasons below."
  else:
    only = "" if len(counted) == len(check.spans) else f" for {', '.join(counted)} only"
    standing = f"This ladder counts as evidence about size{only}."
  lines += ["", standing]
  clocks = rough_clocks(ladder.trials)
  if clocks["is_rough"].any():
    spread = clocks["spread"].max()
    by = "an unknown amount" if math.isnan(spread) else f"up to {spread:.0%}"
    lines.append(
      f"Wall clock has no verdict for {clocks['is_rough'].sum()} of {len(clocks)} "
      f"methods and sizes: equal runs differ in seconds per token by {by}, at least as "
      f"much as the method and NTP do."
    )
  return lines


def method_table(ladder: Analysis) -> pd.DataFrame:
  """Returns one row per method and size, as text: loss, cost, gains with verdicts."""
  losses = ladder.levels[ladder.levels["metric"] == "main_loss"]
  trials = ladder.trials[ladder.trials["chosen"]]
  rows = []
  for _, loss in losses.sort_values(["order", "size"]).iterrows():
    method, here = loss["method"], trials[trials["size"] == loss["size"]]
    trial, ntp = (here[here["method"] == x] for x in (method, NTP))
    row = {
      "method": method,
      "size": size_text(loss["size"]),
      "seeds": str(loss["n"]),
      "loss": _interval(loss, "") if loss["n"] else "n/a (not finite)",
      "learning rate": f"{trial['learning_rate'].iloc[0]:g}",
      "trained parameters": f"{trial['total'].iloc[0]:,}",
    }
    for name, key in (("FLOPs", "train_flops"), ("seconds", "train_seconds")):
      ratio = trial[key].median() / ntp[key].median()
      row[f"{name} / NTP"] = "" if math.isnan(ratio) else f"{ratio:.2f}"
    for name, comparison, metric in _GAINS:
      gains = rows_of(ladder.gains, method, comparison, metric)
      for _, gain in gains[gains["size"] == loss["size"]].iterrows():
        row[name] = f"{gain['bound']} {_interval(gain)}: {effect(gain)}".strip()
    rows.append(row)
  return pd.DataFrame(rows)


def trend_table(ladder: Analysis) -> pd.DataFrame:
  """Returns one row per method and comparison: the gain per decade of size, as text."""
  rows = []
  fits = ladder.slopes[ladder.slopes["metric"] == "main_loss"]
  for _, fit in fits.sort_values("order").iterrows():
    gains = rows_of(ladder.gains, fit["method"], fit["comparison"])
    rows.append({
      "method": fit["method"], "equal": fit["comparison"],
      "seeds": fit["n"],
      "gain per decade": _interval(fit.rename({"slope": "mean"})),
      "verdict": trend(fit, gains[gains["bound"] == EXACT]),
    })
  return pd.DataFrame(rows)


def _interval(row: Any, sign: str = "+") -> str:
  """Returns a mean with its interval, if it has one."""
  text = f"{row['mean']:{sign}.4f}"
  if math.isnan(row["low"]):
    return text
  return f"{text} [{row['low']:{sign}.4f}, {row['high']:{sign}.4f}]"


def _figures(
  ladder: Analysis, output: Path, suffix: str
) -> tuple[dict[str, list[str]], list[Path]]:
  """Draws and writes every figure; returns the Markdown of each, and the files."""
  shown, paths = {}, []
  for plot in figures.PLOTS:
    files = _write_drawing(output / f"{plot.stem}{suffix}.png", plot.draw, ladder)
    if not files:
      continue
    paths += files
    png = files[0]
    shown[plot.stem] = [
      f"![{plot.title}]({png.name})", "",
      f"{plot.title}. {plot.caption} Numbers: `{png.stem}.csv`.", "",
    ]
  return shown, paths


def _write(table: pd.DataFrame, path: Path) -> None:
  internal = ["config", "mtp", "order"]
  table.drop(columns=internal, errors="ignore").to_csv(path, index=False)


def _folded(ladder: Analysis, drawn: dict[str, list[str]]) -> Iterator[str]:
  """Yields what a first reading can pass over: reasons, figures, tables."""
  if len(ladder.gains):
    check = check_ladder(ladder)
    reasons = [*check.ladder, *(x for own in check.methods.values() for x in own)]
    yield from page.details(
      "What speaks against this ladder as evidence about size",
      [f"- {reason}" for reason in reasons] or ["Nothing: both rules hold."],
    )
  yield from page.details("All figures", itertools.chain(*drawn.values()))
  scaled = settings_that_scale(ladder.trials)
  scaled = scaled.assign(size=scaled["size"].map(size_text))
  methods = ladder.trials.drop_duplicates("method")
  methods = methods[(methods["depth"] > 0) & (methods["arm"] != "flops")]
  settings = pd.DataFrame([
    {"method": row["method"]} | dataclasses.asdict(row["mtp"])
    for _, row in methods.iterrows()
  ])
  for title, rows in (
    ("Methods at each size: loss, cost, gains", method_table(ladder)),
    ("Trends with size, nats per token", trend_table(ladder)),
    ("Settings that follow the size", scaled[: len(scaled) if len(scaled) > 1 else 0]),
    ("Settings of the methods (mtp section)", settings),
  ):
    if len(rows):
      yield from page.details(title, [page.table(rows)])


def _trials(analysis: Analysis) -> str:
  columns = {
    "trial": "trial", "status": "status", "step": "step", "num_steps": "of",
    "size": "size", "method": "method", "learning_rate": "learning rate",
    "seed": "seed", "data_seed": "data seed", "chosen": "compared",
    "skipped_steps": "skipped steps",
  }
  rows = analysis.trials[list(columns)].rename(columns=columns)
  return page.table(rows.assign(
    size=rows["size"].map(size_text),
    compared=rows["compared"].map({True: "yes", False: "no"}),
  ))


def _states(analysis: Analysis) -> Iterator[str]:
  """Yields what is finished, what is not, and which pairs are missing."""
  trials, metrics = analysis.trials, analysis.runs.metrics
  is_broken = (metrics["metric"] == "main_loss") & metrics["mean"].isna()
  finished = (trials["status"] == "finished").sum()
  yield f"{finished} of {len(trials)} trials below the folder are finished."
  for name in unfinished(analysis.runs):
    yield f"Not finished: {name}."
  for _, row in trials[trials["copy"] != ""].iterrows():
    yield f"{row['trial']} repeats {row['copy']} and is left out."
  for name in metrics.loc[is_broken, "trial"]:
    yield f"{name} ended with a loss that is not a number and is left out."
  for _, row in trials[trials["skipped_steps"] > 0].iterrows():
    yield (
      f"{row['trial']} skipped {row['skipped_steps']} update(s): loss or gradient was "
      f"not finite."
    )
  intervals = analysis.gains["low"][analysis.gains["metric"] != "bits_per_byte"].count()
  if intervals:
    yield (
      f"{intervals} intervals of gains are computed. If nothing had any effect, about "
      f"{intervals * 0.05:.0f} of them would miss 0 by chance."
    )
  hardware = sorted(set(trials["hardware"]) - {""})
  if len(hardware) > 1:
    yield (
      f"Wall clock compares different hardware ({_distinct(hardware)}): do not use it."
    )
  # MTP trials without an NTP partner, and seeds of NTP that a method lacks.
  for (label, size), cell in trials[trials["chosen"]].groupby(["ladder", "size"]):
    seeds = {
      method: set(zip(rows["seed"], rows["data_seed"], strict=True))
      for method, rows in cell.groupby("method", sort=False)
    }
    ntp = seeds.pop(NTP, set())
    for method, own in seeds.items():
      for who, other, lacking in ((NTP, method, own - ntp), (method, NTP, ntp - own)):
        if lacking:
          names = ", ".join(f"{s} (data {d})" for s, d in sorted(lacking))
          at = f"{size_text(size)}{', ' if label else ''}{label}"
          yield (
            f"At {at}, {who} lacks seed {names} that {other} has; "
            f"unpaired trials are not compared."
          )


def _provenance(analysis: Analysis, command: str) -> list[str]:
  """Returns where the numbers come from, as a list."""
  trials, configs = analysis.trials, analysis.trials["config"]
  seeds = sorted(set(zip(trials["seed"], trials["data_seed"], strict=True)))
  facts = {
    "Command": [command],
    **{key.title(): trials[key] for key in ("commit", "hardware", "versions")},
    "Seeds (model, data)": [", ".join(f"({s}, {d})" for s, d in seeds)],
    "Text": configs.map(_text),
    "Tokenizer": configs.map(lambda c: f"{c.tokenizer.kind}, {c.tokenizer.vocab_size}"),
    "Held-out split": configs.map(lambda c: c.eval.split),
    "Held-out documents": trials.loc[trials["num_documents"] > 0, "num_documents"],
  }
  return [f"- {key}: {_distinct(values)}" for key, values in facts.items()]


def _text(config: Config) -> str:
  data = config.data
  trained_on = f", trained on {data.train_on}" if data.train_on else ""
  return f"{data.source} {data.path}{trained_on}"


def _distinct(values: Iterable) -> str:
  """Returns the different values that occur, or that there is none."""
  texts = dict.fromkeys(str(value).strip() for value in values)
  return "; ".join(page.code(text) for text in texts if text) or "not recorded"
