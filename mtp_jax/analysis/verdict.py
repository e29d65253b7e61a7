"""What the numbers support, in words computed from them.

A gain has a word (better, worse, no effect found, no verdict), a trend has one, and a
ladder that does not count (see checks.py) is said not to.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from mtp_jax.analysis.checks import (
  Check,
  check_ladder,
  mtp_methods,
  rows_of,
  with_interval,
)
from mtp_jax.analysis.gains import (
  COMPARISONS,
  LOWER,
  SHARES,
  UPPER,
  Analysis,
  rough_clocks,
)
from mtp_jax.analysis.ladders import NTP, size_text

BETTER, WORSE, NO_EFFECT = "better", "worse", "no effect found"
ONE_SEED, BOUND = "no verdict from one pair of seeds", "no verdict from a bound"
NO_SPREAD = "no verdict from pairs that are all the same"
ROUGH_CLOCK = "no verdict from this clock"
_METRIC_NAMES = {
  "next_line_exact_match": "next-line exact match",
  "function_parses": "completed functions that parse",
}


@dataclasses.dataclass(frozen=True)
class Section:
  """Some findings; `is_detail` marks what a first reading can pass over."""

  title: str
  lines: tuple[str, ...]
  is_detail: bool = False


def effect(gain: pd.Series) -> str:
  """Returns what one row of `gains` supports."""
  if math.isnan(gain["low"]):
    return ONE_SEED
  if gain["is_rough"]:
    return ROUGH_CLOCK
  if gain["high"] - gain["low"] < 1e-12 and gain["mean"] != 0:  # Few prompts, say.
    return NO_SPREAD
  if gain["low"] > 0 and gain["bound"] != UPPER:
    return BETTER
  if gain["high"] < 0 and gain["bound"] != LOWER:
    return WORSE
  return BOUND if gain["bound"] else NO_EFFECT


def trend(slope: pd.Series, gains: pd.DataFrame) -> str:
  """Returns what one row of `slopes` supports; it was fitted to the rows `gains`."""
  if math.isnan(slope["low"]):
    return "no verdict on a trend: fewer than two seeds have every size"
  if gains["is_rough"].any():
    return f"no verdict on a trend: {ROUGH_CLOCK}"
  if slope["low"] > 0:
    words = "the gain grows with size"
    if (gains["mean"] < 0).all():
      words = "the disadvantage shrinks with size"
  elif slope["high"] < 0:
    words = "the gain falls with size"
    if (gains["mean"] < 0).all():
      words = "the disadvantage grows with size"
  else:
    return "no trend with size found"
  span = np.log10(gains["size"].max() / gains["size"].min())
  if slope["misfit"] > abs(slope["slope"]) * span / 2:
    words += ", though not along a straight line"
  return words


def verdict(ladder: Analysis) -> list[Section]:
  """Returns the findings of one ladder: in short, whether it counts, each method."""
  if not len(ladder.levels):
    return [Section("In short", ("No trial is finished: nothing can be said.",))]
  methods = mtp_methods(ladder.gains)
  if not methods:
    return [Section("In short", (_nothing_to_compare(ladder),))]
  check = check_ladder(ladder)
  sections = [
    Section("In short", tuple(_in_short(ladder, check, m) for m in methods)),
    _standing(check),
  ]
  sections += [
    Section(m, tuple(_findings(ladder, check, m)), is_detail=True) for m in methods
  ]
  sections.append(Section("How to read this", tuple(_reading_notes(ladder))))
  return sections


def as_text(sections: list[Section]) -> str:
  """Returns the sections as plain text."""
  return "\n".join(
    "\n".join([section.title, *(f"  - {line}" for line in section.lines)])
    for section in sections
  )


def _nothing_to_compare(ladder: Analysis) -> str:
  methods = set(ladder.levels["method"])
  if methods == {NTP}:
    return "Only NTP is finished here: there is no MTP trial to compare with it."
  if NTP not in methods:
    return "There is no finished NTP trial here, so no gain can be computed."
  return (
    "No MTP trial has a finished NTP partner of the same size, seed and data seed, so "
    "no gain can be computed."
  )


def _standing(check: Check) -> Section:
  """Whether this is a ladder, whether it counts, and why not."""
  names = ", ".join(size_text(s) for s in check.sizes)
  reasons = (*check.ladder, *(x for r in check.methods.values() for x in r))
  passing = [m for m in check.spans if check.counts(m)]
  if not check.spans:
    title = f"No ladder: each method is compared at one size (of {names})"
    says = "A comparison at one size says nothing about how gains change with size."
    if reasons:
      says += " What the rules for a ladder would object to:"
    return Section(title, (says, *reasons))
  if not passing:
    return Section("This ladder does not count", reasons)
  if len(passing) < len(check.spans):
    return Section(f"This ladder counts for {', '.join(passing)} only", reasons)
  return Section(
    "This ladder counts",
    (
      f"Over {names} parameters every larger NTP model is better than the next smaller "
      f"one beyond seed noise; NTP's learning rate is an interior optimum at each "
      f"size, and each method's was checked at each size.",
      *reasons,
    ),
  )


def _in_short(ladder: Analysis, check: Check, method: str) -> str:
  """What a method does to the next-token loss, one clause a comparison."""
  clauses = []
  for comparison in COMPARISONS:
    rows = rows_of(ladder.gains, method, comparison)
    clause = f"at equal {comparison} {_summary(rows)}"
    slope = rows_of(ladder.slopes, method, comparison)
    if len(slope):
      clause += f" ({trend(slope.iloc[0], rows[rows['bound'] == ''])})"
    clauses.append(clause)
  words = f"{method}: {'; '.join(clauses)}."
  if method in check.spans and not check.counts(method):
    words += " No evidence about size: the ladder does not count for it, see below."
  return words


def _summary(rows: pd.DataFrame) -> str:
  """The effects of rows of one comparison in words, with the sizes where they hold."""
  if not len(rows):
    return "not measured"
  rows = rows.sort_values("size")
  effects = rows.apply(effect, axis=1)
  if effects.nunique() == 1:
    everywhere = {1: f"at {size_text(rows['size'].iloc[0])}"}
    place = everywhere.get(len(rows), f"at each of {len(rows)} sizes")
    return f"{effects.iloc[0]} {place}"
  parts = []
  for word in effects.unique():
    places = ", ".join(size_text(s) for s in rows.loc[effects == word, "size"])
    parts.append(f"{word} at {places}")
  return ", ".join(parts)


def _findings(ladder: Analysis, check: Check, method: str) -> Iterator[str]:
  for comparison in COMPARISONS:
    rows = rows_of(ladder.gains, method, comparison).sort_values("size")
    points = "; ".join(
      f"{size_text(row['size'])}: {row['bound']}{' ' if row['bound'] else ''}"
      f"{with_interval(row)} ({row['n']})"
      for _, row in rows.iterrows()
    )
    yield f"Equal {comparison}, nats per token: {_summary(rows)}. {points}."
    slope = rows_of(ladder.slopes, method, comparison)
    if len(slope):
      yield _slope_words(slope.iloc[0], rows, comparison)
    elif method in check.spans:
      yield f"Equal {comparison}: fewer than two sizes have a gain, so no slope."
  for metric in SHARES:
    rows = rows_of(ladder.gains, method, metric=metric).sort_values("size")
    if len(rows):
      points = "; ".join(
        f"{size_text(row['size'])}: {with_interval(row, 100, 1)} ({row['n']})"
        for _, row in rows.iterrows()
      )
      yield (
        f"Equal tokens, {_METRIC_NAMES[metric]}, percentage points: "
        f"{_summary(rows)}. {points}."
      )
  if method in check.spans and not check.counts(method):
    yield "Not evidence about size: this ladder does not count for this method."


def _slope_words(slope: pd.Series, rows: pd.DataFrame, comparison: str) -> str:
  row = slope.rename({"slope": "mean"})
  seeds = f"slopes of {slope['n']} seed(s)" if slope["n"] else "fitted to the means"
  words = (
    f"Equal {comparison}, gain per decade of size: {with_interval(row)} ({seeds}, "
    f"{slope['sizes']} sizes): {trend(slope, rows[rows['bound'] == ''])}."
  )
  if math.isfinite(slope["crossing"]):
    words += f" The fitted line crosses zero at {size_text(slope['crossing'])}"
    if not slope["low"] > 0 and not slope["high"] < 0:
      words += ", which means little without a trend"
    elif math.isfinite(slope["crossing_low"]):
      words += (
        f" ({size_text(slope['crossing_low'])} to {size_text(slope['crossing_high'])} "
        f"over those seeds whose line crosses inside the ladder)"
      )
    words += "."
  return words


def _reading_notes(ladder: Analysis) -> Iterator[str]:
  yield (
    "Gains are NTP minus MTP for losses and MTP minus NTP for shares, so positive is "
    "better; brackets are 95 % t intervals over pairs of seeds, whose number follows "
    "in parentheses. \"No effect found\" means that the interval holds 0; effects "
    "outside the interval are unlikely."
  )
  shown = ladder.gains[ladder.gains["metric"] != "bits_per_byte"]  # Says the same.
  shown = int(shown["low"].notna().sum())
  if shown:
    yield (
      f"{shown} intervals of gains are computed here. If nothing had any effect, about "
      f"{shown * 0.05:.0f} of them would miss 0 by chance."
    )
  bounds = ladder.gains[ladder.gains["bound"] != ""]
  if len(bounds):
    yield (
      "\"At most\" marks budgets that no finished NTP run reaches, \"at least\" those "
      "below every one: the nearest run gives a bound, and nothing is extrapolated."
    )
  clocks = rough_clocks(ladder.trials)
  if clocks["is_rough"].any():
    spread, rough = clocks["spread"].max(), int(clocks["is_rough"].sum())
    by = f"by up to {spread:.0%}" if np.isfinite(spread) else "by an unknown amount"
    yield (
      f"Wall clock has no verdict for {rough} of {len(clocks)} methods and sizes: the "
      f"seconds per token of equal runs differ ({by}) at least as much as the method "
      f"and NTP do. Runs beside each other share a machine."
    )
  hardware = sorted(set(ladder.trials["hardware"]) - {""})
  if len(hardware) > 1:
    yield (
      f"Wall clock compares different hardware here ({'; '.join(hardware)}); do not "
      f"use it."
    )

