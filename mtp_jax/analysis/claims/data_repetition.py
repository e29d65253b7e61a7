"""Repeated text: the gain against the share of documents not held out for test."""

import functools

import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mtp_jax.analysis.claims.arms import NTP, parallel, penalty
from mtp_jax.analysis.claims.claim import (
  GLOECKLE,
  NO_FIGURE,
  PAIRED,
  Claim,
  Drawing,
  Experiment,
)
from mtp_jax.analysis.claims.pictures import lines, with_method
from mtp_jax.analysis.drawing import legend_below, panels, zero_line
from mtp_jax.analysis.results import Results
from mtp_jax.analysis.rules import NATS, Finding, mean_over_seeds, undecided

HELD_OUT = "data.test_fraction"


def experiment(preset: str) -> Experiment:
  return Experiment(
    "data_repetition", preset, "Repeated text",
    "Gain in next-token loss against the share of documents not held out for test (5 % "
    "more are validation; the less, the more epochs); mean and 95 % t interval over "
    "seeds.",
    tuple(
      Claim(
        f"shrinks_{n}", f"Repetition shrinks the gain of n = {n}",
        f"{GLOECKLE}, table 1", published,
        "NTP's main loss minus that of the parallel heads, with the most documents "
        f"minus with the fewest (most epochs), {PAIRED}",
        NATS, functools.partial(repetition_shrinks_gain, n=n),
      )
      for n, published in (
        (2, NO_FIGURE),
        (4, "pass rates only, 7B, gain in MBPP pass@1: +3.8 points at 0.8 epochs "
            "(200B tokens), +2.4 at 4 epochs (1T tokens)"),
      )
    ),
    draw,
  )


def repetition_shrinks_gain(results: Results, n: int) -> Finding:
  """Tests whether the gain in loss is smaller where the text is repeated most."""
  fractions = results.trials[results.key(HELD_OUT)]
  once, most = (gain(results, n, x) for x in (fractions.min(), fractions.max()))
  finding = Finding((
    mean_over_seeds(once - most, "gain at least minus at most epochs"),
  ))
  if fractions.nunique() < 2:
    return undecided(finding, "only one amount of text")
  return finding


def gain(results: Results, n: int, fraction: float) -> pd.Series:
  """Returns the gain of n heads, a seed, with this share of documents held out."""
  at = {HELD_OUT: fraction}
  return -penalty(results, parallel(n) | at, NTP | at)


def draw(results: Results) -> Drawing:
  """Gain against the share of documents that is not held out for test."""
  fractions = results.select({})[results.key(HELD_OUT)].unique()
  rows = with_method(
    pd.concat([
      gain(results, n, fraction).rename("value").reset_index().assign(
        **parallel(n), fraction=fraction, trained_on=1 - fraction
      )
      for n in (2, 4) for fraction in fractions
    ])
  )
  figure, axes = panels(1, 1, width=5.5)
  ax = axes[0, 0]
  ax.set_xscale("log")
  table = lines(ax, rows, "trained_on", ["method"])
  ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
  ax.xaxis.set_minor_locator(NullLocator())
  zero_line(ax)
  ax.set(
    xlabel="share of documents not held out for test",
    ylabel="gain over NTP, nats per token",
  )
  legend_below(figure, axes.flat)
  return figure, table
