"""What a claim and an experiment are, and the words of their verdicts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mtp_jax.analysis import results as results_lib
from mtp_jax.analysis.rules import Finding, Margin

NOT_TESTED = "not tested (design)"
NOT_RUN = "not yet run"
NO_FIGURE = "no figure that we could check"
OWN = "our own question"
GLOECKLE = "Gloeckle et al. 2024, arXiv 2404.19737"
TOP = "TOP, arXiv 2508.19228"
DEEPSEEK = "DeepSeek-V3, arXiv 2412.19437"
AYNETDINOV = "Aynetdinov and Akbik 2025, arXiv 2505.22757"

PAIRED = "paired by seed, t interval over seeds, above 0"
Drawing = tuple[Figure, pd.DataFrame]


@dataclasses.dataclass(frozen=True)
class Claim:
  """One sentence that results can contradict.

  key:        unique within the experiment.
  published:  the published figure, or that there is none.
  rule:       in words, what `test` computes and where its interval must lie.
  margin:     the smallest effect of interest; see `rules`.
  not_tested: why the experiment, as it was run, cannot test the claim; else empty.
  """

  key: str
  statement: str
  source: str
  published: str
  rule: str
  margin: Margin
  test: Callable[[Any], Finding]
  not_tested: str = ""

  def judge(self, results: Any) -> Finding:
    """Returns what the results say, each estimate judged by the claim's margin."""
    return self.test(results).at(self.margin)

  def verdict(self, finding: Finding | None) -> str:
    """Returns the verdict on what was found; None is an experiment without results."""
    if finding is None or finding.seeds == 0:
      return NOT_RUN
    return NOT_TESTED if self.not_tested else finding.verdict


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The claims that one preset of an experiment decides.

  read: reads its results folder. draw: returns its figure and the numbers in it.
  table: returns what the page also shows as a table, if anything.
  """

  name: str
  preset: str
  title: str
  caption: str
  claims: tuple[Claim, ...]
  draw: Callable[[Any], Drawing]
  read: Callable[[Path], Any] = results_lib.read
  table: Callable[[Any], pd.DataFrame] | None = None

  @property
  def folder(self) -> str:
    return f"{self.name}_{self.preset}"

  @property
  def command(self) -> str:
    """The command that runs it; results carry the one that did."""
    return (
      f"python -m launch.sweep --config=experiments/{self.name}.py:{self.preset} "
      f"--workdir=runs/{self.folder}"
    )
