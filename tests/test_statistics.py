"""Statistics over seeds against scipy, literals computed by hand, and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mtp_jax.analysis import statistics
from mtp_jax.analysis.claims import tax
from mtp_jax.analysis.claims.solving import gains

SIZES = (1e4, 1e5, 1e6)


def test_equivalence_agrees_with_the_interval_of_90_percent():
  rng = np.random.default_rng(0)
  for spread in (0.002, 0.01, 0.02):
    values = rng.normal(0.002, spread, 6)
    over = statistics.interval(values, 0.9)
    is_inside = over["low"] > -0.01 and over["high"] < 0.01
    assert (statistics.equivalence(values, 0.01) < 0.05) == is_inside


def test_equivalence_by_hand():
  # Mean 2, standard error 1 / sqrt(3): the nearer margin 3 is sqrt(3) of them away.
  p = statistics.equivalence([1.0, 2.0, 3.0], 3.0)
  assert p == pytest.approx(stats.t.sf(math.sqrt(3), 2))


def test_newcombe_as_published():
  """Newcombe 1998, table II: 56/70 against 48/80 has method 10 (0.0524, 0.3339)."""
  difference, low, high = statistics.share_difference((56, 70), (48, 80))
  assert (difference, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
  none = statistics.share_difference((0, 10), (0, 20))  # (0.0000: -0.1611, 0.2775)
  assert none == pytest.approx((0.0, -0.1611, 0.2775), abs=5e-5)


def test_kaplan_meier_by_hand():
  """Four seeds at 1, 2, 3, 3, of which one at 3 is censored: 3/4, 2/4, 1/4 are left."""
  curve = statistics.kaplan_meier(
    pd.Series([1.0, 2.0, 3.0, 3.0]), pd.Series([True, True, False, True])
  )
  assert list(curve["time"]) == [1, 2, 3]
  np.testing.assert_allclose(curve["share"], [0.25, 0.5, 0.75])


def test_a_restricted_mean_is_the_area_under_kaplan_meier():
  rng = np.random.default_rng(1)
  times = pd.Series(rng.lognormal(0, 1, 30))
  horizon = float(np.quantile(times, 0.7))
  solved = times <= horizon
  times = times.where(solved, horizon)
  logs = statistics.restricted_log_time(times, horizon, solved)
  curve = statistics.kaplan_meier(times[solved], solved[solved])
  everyone = statistics.kaplan_meier(times, solved)
  assert len(curve) == solved.sum()
  ends = np.log([*everyone["time"], horizon])
  left = 1 - np.array([0, *everyone["share"]])
  area = ends[0] + (left[1:] * np.diff(ends)).sum()
  assert logs.mean() == pytest.approx(area)


def test_an_early_end_without_success_is_refused():
  with pytest.raises(ValueError, match="ended before the horizon"):
    statistics.restricted_log_time(
      pd.Series([1.0, 5.0]), 5.0, pd.Series([False, True])
    )


def trials(times, horizon=800.0):
  """Rows of one arm: a seed each, None where it never solved."""
  return pd.DataFrame([
    {"trial": str(seed), "seed": seed, "data.seed": 0, "solved": time is not None,
     "tokens_to": horizon if time is None else time}
    for seed, time in enumerate(times)
  ])


def test_the_gain_in_time_is_paired_and_restricted():
  gain = gains(trials([400, None, 100]), trials([200, 400, 100]))["gain"]
  np.testing.assert_allclose(gain, [math.log(2), math.log(2), 0.0])
  # Nobody is credited with time after the earliest end of an unsolved trial.
  shorter = trials([200, 700, None], horizon=500.0)
  gain = gains(trials([400, 650, 100]), shorter)["gain"]
  np.testing.assert_allclose(gain, [math.log(2), 0.0, -math.log(5)])


def cells(slope, noise, seeds, rng, intercept=0.0):
  return [
    intercept + slope * np.log10(size) + rng.normal(0, noise, seeds) for size in SIZES
  ]


def test_a_slope_is_that_of_least_squares_over_all_seeds():
  rng = np.random.default_rng(2)
  own = [rng.normal(0, 1, n) for n in (8, 9, 12)]  # Some seeds are still missing.
  over = statistics.slope(SIZES, own)
  x = np.repeat(np.log10(SIZES), [8, 9, 12])
  assert over["mean"] == pytest.approx(stats.linregress(x, np.concatenate(own)).slope)
  assert (over["n"], over["low"] < over["mean"] < over["high"]) == (8, True)


def test_few_seeds_have_welchs_interval():
  """Two cells of weights 1 and -1: Welch's t interval of a difference."""
  first, second = np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.5])
  over = statistics.contrast([first, second], np.array([1.0, -1.0]))
  expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
  np.testing.assert_allclose([over["low"], over["high"]], expected)


def test_many_seeds_have_the_bias_corrected_bootstrap():
  rng = np.random.default_rng(3)
  own = rng.exponential(1, 12)
  over = statistics.contrast([own], np.array([1.0]))
  expected = stats.bootstrap(
    (own,), np.mean, n_resamples=statistics.RESAMPLES, method="BCa",
    rng=np.random.default_rng(0),
  ).confidence_interval
  np.testing.assert_allclose([over["low"], over["high"]], expected, rtol=1e-12)
  assert over == statistics.contrast([own], np.array([1.0]))  # The same every time.


@pytest.mark.parametrize("seeds, width", [(1, np.nan), (3, 0.0), (10, 0.0)])
def test_seeds_without_spread(seeds, width):
  over = statistics.slope(SIZES, [np.full(seeds, 0.1)] * 3)
  assert over["mean"] == pytest.approx(0, abs=1e-12)
  np.testing.assert_allclose(over["high"] - over["low"], width, atol=1e-12)


@pytest.mark.parametrize("seeds", [4, 10])
def test_the_log_slope_is_a_power_law(seeds):
  rng = np.random.default_rng(4)
  own = [0.5 * size**-0.3 * rng.lognormal(0, 0.05, seeds) for size in SIZES]
  over = statistics.log_slope(SIZES, own)
  assert over["mean"] == pytest.approx(-0.3, abs=0.03)
  assert -0.4 < over["low"] < -0.3 + 0.03 and -0.33 < over["high"] < -0.2
  with pytest.raises(ValueError, match="no logarithm"):
    statistics.log_slope(SIZES, [np.array([-1.0, 0.5])] * 3)


def test_a_prediction_interval_widens_away_from_the_ladder():
  sizes = np.array([1e4, 3e4, 1e5, 3e5])
  values = 0.5 * sizes**-0.2 * np.array([1.02, 0.97, 1.03, 0.99])
  at = tax.prediction(sizes, values, np.array([5e4, 1e9]))
  assert at["low"][0] < at["mean"][0] < at["high"][0]
  assert at["mean"][0] == pytest.approx(0.5 * 5e4**-0.2, rel=0.05)
  ratio = at["high"] / at["low"]
  assert ratio[1] > 1.3 * ratio[0]


@pytest.mark.slow
@pytest.mark.parametrize("seeds, low, high", [(3, 0.93, 0.975), (10, 0.91, 0.965)])
def test_slope_intervals_cover(seeds, low, high, monkeypatch):
  """Welch's at its level; BCa of ten seeds a little below it."""
  monkeypatch.setattr(statistics, "RESAMPLES", 999)
  rng = np.random.default_rng(5)
  fits = [statistics.slope(SIZES, cells(0.02, 0.03, seeds, rng)) for _ in range(1000)]
  covered = np.mean([x["low"] < 0.02 < x["high"] for x in fits])
  assert low < covered < high


@pytest.mark.slow
def test_equivalence_is_wrong_as_often_as_said():
  """At a true effect of the margin itself two one-sided tests err in 5 % of samples."""
  rng = np.random.default_rng(6)
  wrong = [
    statistics.equivalence(rng.normal(0.01, 0.003, 6), 0.01) < 0.05
    for _ in range(2000)
  ]
  assert 0.035 < np.mean(wrong) < 0.065
