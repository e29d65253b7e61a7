"""Pairing, budgets, intervals and slopes on numbers whose answer is known."""

import itertools

import numpy as np
import pandas as pd
import pytest

from mtp_jax.analysis import gains as gains_lib
from mtp_jax.analysis.gains import (
  CLOCK,
  EXACT,
  FLOPS,
  LOWER,
  TOKENS,
  UPPER,
  interval,
  levels,
  paired_gains,
  slopes,
)
from mtp_jax.analysis.ladders import NTP

SIZES = (1e6, 4e6, 16e6)


def trial(method, size, seed, loss, *, tokens=1000, flops=None, seconds=None, **more):
  """One row of a table of chosen trials: its main loss unless `metric` is given."""
  arm = "flops" if method.startswith("NTP at") else "added"
  is_ntp = method.startswith(NTP)
  return {
    "ladder": "", "order": 0 if is_ntp else 1, "method": method,
    "kind": "none" if is_ntp else "sequential", "depth": 0 if is_ntp else 1,
    "arm": arm, "size": size, "seed": seed, "data_seed": seed, "metric": "main_loss",
    "at_depth": 0, "mean": loss, "stderr": 0.01, "tokens": tokens,
    "train_flops": tokens * 10.0 if flops is None else flops,
    "train_seconds": tokens / 100.0 if seconds is None else seconds,
    "flops_per_token": 10.0, "trial": f"{method}-{size}-{seed}-{tokens}",
  } | more


def gains_at(rows, comparison):
  pairs = paired_gains(pd.DataFrame(rows))
  table = gains_lib.gains(pairs)
  return table[table["comparison"] == comparison]


def test_interval_is_students_t():
  result = interval([1.0, 2.0, 3.0])
  half = 4.302653 * 1.0 / np.sqrt(3)  # t(0.975, 2 degrees of freedom), sd = 1.
  assert (result["n"], result["mean"]) == (3, 2.0)
  ends = [result["low"], result["high"]]
  np.testing.assert_allclose(ends, [2 - half, 2 + half], rtol=1e-5)


def test_one_value_has_no_interval():
  result = interval([0.5])
  assert result["mean"] == 0.5
  assert np.isnan(result["low"])
  assert np.isnan(result["high"])


def test_intervals_cover_at_their_level():
  rng = np.random.default_rng(0)
  results = [interval(rng.normal(0.3, 1.0, 3)) for _ in range(2000)]
  covered = np.mean([r["low"] < 0.3 < r["high"] for r in results])
  assert 0.935 < covered < 0.965


def test_pairing_removes_what_the_seeds_share():
  rng = np.random.default_rng(1)
  rows = []
  for seed in range(4):
    shared = rng.normal(0.0, 1.0)
    rows.append(trial(NTP, 1e6, seed, 2.0 + shared))
    rows.append(trial("m", 1e6, seed, 1.99 + shared + rng.normal(0.0, 0.001)))
  gain = gains_at(rows, TOKENS).iloc[0]
  assert gain["n"] == 4
  assert 0.005 < gain["low"] < gain["mean"] < gain["high"] < 0.015
  spread = levels(pd.DataFrame(rows))
  assert (spread["high"] - spread["low"] > 0.5).all()  # Unpaired: far wider.


def test_seeds_without_a_partner_are_not_compared():
  rows = [trial(NTP, 1e6, 0, 2.0), trial("m", 1e6, 0, 1.5), trial("m", 1e6, 1, 0.0)]
  gain = gains_at(rows, TOKENS).iloc[0]
  assert (gain["n"], gain["mean"]) == (1, 0.5)


def test_data_order_is_part_of_a_pair():
  rows = [trial(NTP, 1e6, 0, 2.0), trial("m", 1e6, 0, 1.5, data_seed=7)]
  assert paired_gains(pd.DataFrame(rows)).empty


def test_shares_gain_upwards_and_losses_downwards():
  share = {"metric": "next_line_exact_match"}
  rows = [
    trial(NTP, 1e6, 0, 2.0), trial("m", 1e6, 0, 2.5),
    trial(NTP, 1e6, 0, 0.25, **share), trial("m", 1e6, 0, 0.5, **share),
  ]
  gain = gains_at(rows, TOKENS).set_index("metric")["mean"]
  assert gain["main_loss"] == -0.5
  assert gain["next_line_exact_match"] == 0.25


def test_equal_flops_takes_the_finished_run_of_that_budget():
  rows = [
    trial(NTP, 1e6, 0, 2.0),
    trial("NTP at FLOPs of m", 1e6, 0, 1.8, tokens=1502),  # Rounded to whole steps.
    trial("m", 1e6, 0, 1.9, flops=15_000.0),
  ]
  gain = gains_at(rows, FLOPS).iloc[0]
  assert gain["bound"] == EXACT
  assert gain["mean"] == pytest.approx(-0.1)


def test_between_finished_runs_the_loss_is_linear_in_log_tokens():
  rows = [
    trial(NTP, 1e6, 0, 2.0),
    trial("NTP at FLOPs of m", 1e6, 0, 1.0, tokens=4000),
    trial("m", 1e6, 0, 1.9, flops=20_000.0),  # 2000 tokens: half way in log.
  ]
  gain = gains_at(rows, FLOPS).iloc[0]
  assert gain["bound"] == EXACT
  assert gain["mean"] == pytest.approx(1.5 - 1.9)


def test_wall_clock_is_turned_into_tokens_at_the_speed_of_ntp():
  rows = [
    trial(NTP, 1e6, 0, 2.0, seconds=10.0),  # 100 tokens a second.
    trial("NTP at FLOPs of m", 1e6, 0, 1.0, tokens=4000, seconds=40.0),
    trial("m", 1e6, 0, 1.9, seconds=20.0),
  ]
  gain = gains_at(rows, CLOCK).iloc[0]
  assert gain["budget"] == pytest.approx(2000)
  assert gain["mean"] == pytest.approx(1.5 - 1.9)


@pytest.mark.parametrize(
  "flops, bound, expected", [(90_000.0, UPPER, 1.0 - 1.9), (5_000.0, LOWER, 2.0 - 1.9)]
)
def test_outside_the_finished_runs_there_is_only_a_bound(flops, bound, expected):
  rows = [
    trial(NTP, 1e6, 0, 2.0),
    trial("NTP at FLOPs of m", 1e6, 0, 1.0, tokens=4000),
    trial("m", 1e6, 0, 1.9, flops=flops),
  ]
  gain = gains_at(rows, FLOPS).iloc[0]
  assert gain["bound"] == bound
  assert gain["mean"] == pytest.approx(expected)


def test_bounds_do_not_enter_slopes_or_mean_gains():
  rows = []
  for size, seed in itertools.product(SIZES, (0, 1)):
    rows.append(trial(NTP, size, seed, 2.0))
    rows.append(trial("m", size, seed, 1.9, flops=15_000.0))
    if seed == 0:
      rows.append(trial("NTP at FLOPs of m", size, seed, 1.5, tokens=1500))
  gains = gains_at(rows, FLOPS)
  assert (gains["bound"] == EXACT).all()
  assert (gains["n"] == 1).all()
  np.testing.assert_allclose(gains["mean"], 1.5 - 1.9)
  fit = slopes(paired_gains(pd.DataFrame(rows))).set_index("comparison")
  assert fit.loc[FLOPS, "n"] == 1
  assert fit.loc[TOKENS, "n"] == 2


def planted(slope, noise=0.002, seeds=3):
  """Pairs whose gain is on a line in log10 of the size, with noise."""
  rng = np.random.default_rng(2)
  rows = []
  for size, seed in itertools.product(SIZES, range(seeds)):
    gain = slope * np.log10(size / SIZES[0]) - 0.01 + rng.normal(0.0, noise)
    ntp = 2.0 + seed
    rows += [trial(NTP, size, seed, ntp), trial("m", size, seed, ntp - gain)]
  return paired_gains(pd.DataFrame(rows))


def test_planted_slope_is_recovered():
  fit = slopes(planted(slope=0.02)).set_index("comparison").loc[TOKENS]
  assert fit["n"] == 3
  assert 0 < fit["low"] < 0.02 < fit["high"] < 0.04


def test_slope_of_one_seed_or_one_size_has_no_interval():
  one = slopes(planted(slope=0.02, noise=0.0, seeds=1))
  assert one["slope"].iloc[0] == pytest.approx(0.02) and one["low"].isna().all()
  pairs = planted(slope=0.02)
  assert slopes(pairs[pairs["size"] == SIZES[0]]).empty


def test_learning_rates_are_compared_on_shared_seeds():
  base = {"status": "finished", "copy": "", "weight_decay": 0.1}
  losses = {  # (method, rate, seed); rate 1 is the chosen one.
    (NTP, 1.0, 0): 2.0, (NTP, 1.0, 1): 2.1, (NTP, 1.0, 2): 2.5, (NTP, 2.0, 2): 2.4,
    ("m", 1.0, 0): 2.01, ("m", 1.0, 1): 2.12, ("m", 1.0, 2): 2.53,
    (NTP, 3.0, 7): 1.0,
  }
  rows = [
    trial(method, 1e6, seed, 0.0, learning_rate=rate, chosen=rate == 1.0, **base)
    | {"trial": str((method, rate, seed))}
    for method, rate, seed in losses
  ]
  metrics = pd.DataFrame(
    [{"trial": str(k), "metric": "main_loss", "mean": v} for k, v in losses.items()]
  )
  rates = gains_lib.learning_rates(pd.DataFrame(rows), metrics)
  other = rates[rates["learning_rate"] == 2.0].iloc[0]
  # Worse than the mean of the chosen rate, but better on the seed that both have.
  assert other["shared"] == 1
  assert other["excess"] == pytest.approx(-0.1)
  # The spread of the paired differences 0.01, 0.02, 0.03, not of the losses.
  assert other["noise"] == pytest.approx(4.302653 * 0.01)
  elsewhere = rates[rates["learning_rate"] == 3.0].iloc[0]
  assert elsewhere["shared"] == 0
  assert np.isnan(elsewhere["excess"])
