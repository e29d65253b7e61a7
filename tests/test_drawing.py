"""Figures: what is told apart, and what an axis shows."""

import itertools

import pandas as pd
import pytest
from matplotlib.figure import Figure

from mtp_jax.analysis.drawing import method_styles, series_style, share_axis, zero_line


def test_methods_of_one_kind_and_depth_differ_in_marker_and_line():
  methods = [("sequential", 1), ("sequential", 1), ("sequential", 1), ("parallel", 1)]
  rows = pd.DataFrame(methods, columns=["kind", "depth"])
  rows = rows.assign(method=[f"m{i}" for i in range(4)], order=range(4))
  styles = method_styles(rows)
  for first, second in itertools.combinations(("m0", "m1", "m2"), 2):
    assert styles[first]["marker"] != styles[second]["marker"]
    assert styles[first]["linestyle"] != styles[second]["linestyle"]
  assert styles["m0"]["color"] != styles["m3"]["color"]


def test_series_differ_in_colour_and_marker():
  looks = [series_style(index) for index in range(7)]
  assert len({x["color"] for x in looks}) == len({x["marker"] for x in looks}) == 7


@pytest.mark.parametrize("limits, lines", [((-0.04, 0.04), 1), ((0.1, 0.2), 0)])
def test_zero_is_marked_only_within_the_axis(limits, lines):
  ax = Figure().subplots()
  ax.plot([0, 1], limits)
  before = ax.get_ylim()
  zero_line(ax)
  assert len(ax.lines) == 1 + lines and ax.get_ylim() == before


def test_shares_of_0_are_drawn_on_the_whole_axis():
  ax = Figure().subplots()
  ax.plot([0, 1], [0.0, 0.0])
  share_axis(ax)
  assert ax.get_ylim() == (-0.03, 1.03)
