"""Verdicts follow from the numbers; a ladder that is no evidence has its reason."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from mtp_jax.analysis.checks import check_ladder
from mtp_jax.analysis.gains import (
  BETTER,
  BOUND,
  CLOCK,
  EQUAL,
  FLOPS,
  LOWER,
  NO_EFFECT,
  NO_SPREAD,
  NO_TREND,
  ONE_PAIR,
  ROUGH_CLOCK,
  TOKENS,
  UPPER,
  WORSE,
  analyse,
  effect,
  rough_clocks,
  trend,
)
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.report import in_short, method_table, trend_table
from mtp_jax.analysis.runs import load
from tests.synthetic_runs import (
  BEST_RATE,
  WIDTHS,
  World,
  trial_config,
  write_ladder,
  write_trial,
)

METHOD = "sequential D=1"
GROWS = World(gain={("sequential", 1): (-0.02, 0.04)})


def ladder_of(root, world=GROWS, **how):
  write_ladder(root, world, **how)
  return analyse(load(root))


def words_of(ladder):
  tables = (method_table(ladder).to_string(), trend_table(ladder).to_string())
  return "\n".join([*in_short(ladder), *tables])


def gain_row(low, high, bound="", is_rough=False):
  return pd.Series({
    "mean": (low + high) / 2, "low": low, "high": high, "bound": bound,
    "is_rough": is_rough, "metric": "main_loss",
  })


@pytest.mark.parametrize(
  "low, high, bound, word",
  [
    (0.01, 0.03, "", BETTER),
    (-0.03, -0.01, "", WORSE),
    (-0.01, 0.02, "", NO_EFFECT),
    (np.nan, np.nan, "", ONE_PAIR),
    (0.01, 0.03, UPPER, BOUND),  # At most that much better: nothing follows.
    (-0.03, -0.01, UPPER, WORSE),  # At most so good, which is worse.
    (0.01, 0.03, LOWER, BETTER),
    (-0.03, -0.01, LOWER, BOUND),
    (-0.01, 0.02, LOWER, BOUND),
    (-0.009, 0.009, "", EQUAL),
    (0.001, 0.009, "", EQUAL),  # A difference, and smaller than 0.01 nats.
    (-0.009, 0.009, UPPER, BOUND),
    (0.015625, 0.015625, "", NO_SPREAD),
    (0.0, 0.0, "", NO_EFFECT),
  ],
)
def test_effect(low, high, bound, word):
  assert effect(gain_row(low, high, bound)) == word


def test_a_clock_that_cannot_carry_a_verdict_has_none():
  assert effect(gain_row(0.01, 0.03, is_rough=True)) == ROUGH_CLOCK
  assert effect(gain_row(np.nan, np.nan, is_rough=True)) == ONE_PAIR


@pytest.mark.parametrize(
  "slope, low, high, means, words",
  [
    (0.02, 0.01, 0.03, (-0.01, 0.01), "gain grows"),
    (0.02, 0.01, 0.03, (-0.03, -0.01), "disadvantage shrinks"),
    (-0.02, -0.03, -0.01, (0.03, 0.01), "gain shrinks"),
    (-0.02, -0.03, -0.01, (-0.01, -0.03), "disadvantage grows"),
    (0.02, -0.01, 0.05, (-0.01, 0.01), "no trend found"),
    (0.02, np.nan, np.nan, (-0.01, 0.01), NO_TREND),
  ],
)
def test_trend(slope, low, high, means, words):
  row = pd.Series({"slope": slope, "low": low, "high": high})
  gains = pd.DataFrame({"mean": means, "size": (1e6, 1e7), "is_rough": False})
  assert trend(row, gains) == words


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
  return ladder_of(tmp_path_factory.mktemp("growing"))


def test_a_tuned_ladder_counts_and_its_planted_gain_is_found(growing):
  check = check_ladder(growing)
  assert check.ladder == ()
  assert check.counts(METHOD)
  words = words_of(growing)
  assert "This ladder counts as evidence about size." in words
  shown = method_table(growing).set_index(["method", "size"])["gain, equal tokens"]
  verdicts = [shown[METHOD, size].split(": ")[1] for size in ("13k", "49k", "190k")]
  assert verdicts == [WORSE, EQUAL, BETTER]
  assert f"{METHOD} " in words and "in larger models: " in words
  fits = trend_table(growing).set_index("equal")
  assert fits.loc[TOKENS, "verdict"] == "gain grows"
  slopes = growing.slopes[growing.slopes["metric"] == "main_loss"]
  slope = slopes[slopes["comparison"] == TOKENS].iloc[0]
  # 0.04 per factor of ten in width squared; parameters grow a little slower.
  assert slope["slope"] == pytest.approx(0.04, rel=0.1)


def test_equal_flops_costs_the_planted_worth_of_longer_training(growing):
  gains = growing.gains[growing.gains["metric"] == "main_loss"]
  at = gains.set_index(["comparison", "size"])
  trials = growing.trials[growing.trials["arm"] == "flops"]
  for size, cell in trials[trials["chosen"]].groupby("size"):
    worth = 0.3 * np.log10(cell["num_steps"].iloc[0] / 100)
    cost = at.loc[(TOKENS, size), "mean"] - at.loc[(FLOPS, size), "mean"]
    assert cost == pytest.approx(worth, abs=0.003)
    assert at.loc[(FLOPS, size), "bound"] == ""


def test_no_effect_is_said(tmp_path):
  world = World(gain={("sequential", 1): (0.0, 0.0)})
  words = words_of(ladder_of(tmp_path / "equal", world))
  assert f"{METHOD} changed the next-token loss by less than 0.01 nats (" in words
  words = words_of(
    ladder_of(tmp_path / "noisy", dataclasses.replace(world, trial_noise=0.05))
  )
  assert f"{METHOD} showed no effect on the next-token loss (undecided" in words


def test_worse_is_said(tmp_path):
  words = words_of(ladder_of(tmp_path, World(gain={("sequential", 1): (-0.1, 0.0)})))
  assert f"{METHOD} raised the next-token loss by 0.1 nats" in words


def test_learning_rate_at_the_edge_does_not_count(tmp_path):
  ladder = ladder_of(tmp_path, rates=(BEST_RATE / 2, BEST_RATE / 4))
  check = check_ladder(ladder)
  assert not check.counts(METHOD)
  (reason,) = check.ladder
  assert reason.startswith("NTP: no higher learning rate was tried at 13k, 49k, 190k")
  assert "used 0.001, tried 0.00025, 0.0005, 0.001" in reason
  words = words_of(ladder)
  assert "gain grows" in words  # In the table, and called no evidence.
  assert "This ladder does not count as evidence about size" in words


def test_a_better_rate_that_was_not_used_does_not_count(tmp_path):
  world = dataclasses.replace(GROWS, best_rate=2 * BEST_RATE)
  check = check_ladder(ladder_of(tmp_path, world))
  (reason,) = check.ladder
  assert "the learning rate used is not the best of those tried" in reason
  assert "the loss at 0.002 is lower than at 0.001 by" in reason
  (reason,) = check.methods[METHOD]
  assert "another learning rate is better beyond seed noise" in reason


def test_a_far_neighbour_does_not_count(tmp_path):
  ladder = ladder_of(tmp_path, rates=(BEST_RATE / 10, 10 * BEST_RATE))
  (reason,) = check_ladder(ladder).ladder
  assert "more than 4 times away" in reason


def test_larger_models_that_are_not_better_do_not_count(tmp_path):
  world = dataclasses.replace(GROWS, size_step=0.0)
  check = check_ladder(ladder_of(tmp_path, world))
  assert not check.counts(METHOD)
  assert len(check.ladder) == len(WIDTHS) - 1
  assert "is not better than at 13k" in check.ladder[0]
  assert "beyond seed noise" in check.ladder[0]


def test_larger_models_have_to_be_better_beyond_seed_noise(tmp_path):
  world = dataclasses.replace(GROWS, size_step=0.1)
  ladder = ladder_of(tmp_path, world)
  ntp = ladder.levels[ladder.levels["metric"] == "main_loss"]
  ntp = ntp[ntp["method"] == "NTP"].sort_values("size")
  assert (ntp["mean"].diff().dropna() < 0).all()  # Better each time, by the means.
  assert any("beyond seed noise" in reason for reason in check_ladder(ladder).ladder)


def test_one_seed_does_not_count_and_has_no_interval(tmp_path):
  ladder = ladder_of(tmp_path, seeds=(0,))
  assert not check_ladder(ladder).counts(METHOD)
  assert ladder.gains["low"].isna().all()
  words = words_of(ladder)
  assert ONE_PAIR in words and "nan" not in words
  assert any("share 1 seed(s)" in reason for reason in check_ladder(ladder).ladder)


def test_an_arm_whose_rate_was_not_checked_does_not_count(tmp_path):
  world = World(gain={("sequential", 1): (0.0, 0.04), ("parallel", 1): (0.0, 0.04)})
  write_ladder(tmp_path, world)
  for seed in (0, 1, 2):  # A second weight, at one learning rate.
    for width in WIDTHS:
      config = trial_config(width, "parallel", 1, seed, overrides={"mtp.weight": 1.0})
      write_trial(tmp_path, world, config)
  ladder = analyse(load(tmp_path))
  check = check_ladder(ladder)
  assert check.counts("parallel D=1 λ=0.3")
  assert not check.counts("parallel D=1 λ=1")
  (reason,) = check.methods["parallel D=1 λ=1"]
  assert "no lower and no higher learning rate was tried" in reason
  counts = "counts as evidence about size for parallel D=1 λ=0.3, sequential D=1 only."
  assert counts in words_of(ladder)


def test_one_size_is_no_ladder(tmp_path):
  words = words_of(ladder_of(tmp_path, widths=(16,)))
  assert "One size a method: no evidence of how gains change with size." in words
  assert "counts as evidence" not in words


def test_without_longer_ntp_runs_equal_flops_is_only_a_bound(tmp_path):
  rows = method_table(ladder_of(tmp_path, arms=("added",)))
  gains = rows[rows["method"] == METHOD].set_index("size")["gain, equal FLOPs"]
  assert all(gain.startswith("at most") for gain in gains)
  assert gains["13k"].endswith(WORSE) and gains["190k"].endswith(BOUND)


def test_a_rough_clock_gives_no_verdict(tmp_path):
  """Equal runs differ by a factor of two, the method and NTP by less: no word on it."""
  write_ladder(tmp_path, GROWS)
  slow = dataclasses.replace(GROWS, speed=GROWS.speed / 2)
  write_trial(tmp_path, slow, trial_config(16, "sequential", 1, 9))
  write_trial(tmp_path, slow, trial_config(16, seed=9))
  ladder = analyse(load(tmp_path))
  clocks = rough_clocks(ladder.trials).set_index("size")
  small = clocks.index.min()
  assert clocks["is_rough"].to_dict() == {size: size == small for size in clocks.index}
  assert clocks.loc[small, "spread"] == pytest.approx(1.0)
  assert clocks.loc[small, "difference"] < 1.0
  rows = method_table(ladder)
  shown = rows[rows["method"] == METHOD].set_index("size")["gain, equal wall clock"]
  assert {x: ROUGH_CLOCK in y for x, y in shown.items()} == {
    size_text(size): size == small for size in clocks.index
  }
  assert trend_table(ladder).set_index("equal").loc[CLOCK, "verdict"] == ROUGH_CLOCK
  words = words_of(ladder)
  assert "Wall clock has no verdict for 1 of 3 methods and sizes" in words
  assert "by up to 100%" in words
  at = ladder.gains.set_index(["comparison", "size"])["is_rough"]
  assert not at[TOKENS].any() and not at[FLOPS].any()


def test_a_clock_carries_differences_larger_than_its_spread(tmp_path):
  """Equal runs differ by 5 %, the method and NTP by far more."""
  write_ladder(tmp_path, GROWS)
  slow = dataclasses.replace(GROWS, speed=GROWS.speed / 1.05)
  for kind, depth in (("sequential", 1), ("none", 0)):
    write_trial(tmp_path, slow, trial_config(16, kind, depth, 9))
  ladder = analyse(load(tmp_path))
  assert rough_clocks(ladder.trials)["spread"].max() == pytest.approx(0.05)
  assert not ladder.gains["is_rough"].any()
  assert ROUGH_CLOCK not in words_of(ladder)


def test_one_run_of_each_cannot_tell_how_rough_the_clock_is(tmp_path):
  ladder = ladder_of(tmp_path, seeds=(0,), arms=("added",))
  clocks = rough_clocks(ladder.trials)
  assert clocks["is_rough"].all() and clocks["spread"].isna().all()


def test_an_even_clock_is_not_called_rough(growing):
  assert "Wall clock has no verdict" not in words_of(growing)


def test_rates_tried_on_other_seeds_only_are_no_check(tmp_path):
  write_ladder(tmp_path, GROWS, rates=())
  for width in WIDTHS:
    for kind, depth in (("none", 0), ("sequential", 1)):
      for rate in (BEST_RATE / 2, BEST_RATE * 2):
        write_trial(tmp_path, GROWS, trial_config(width, kind, depth, 9, rate))
  (reason,) = check_ladder(analyse(load(tmp_path))).ladder
  assert "no lower and no higher learning rate was tried" in reason


@pytest.mark.parametrize(
  "kinds, words",
  [
    ([("none", 0)], "no MTP trial to compare"),
    ([("sequential", 1)], "no finished NTP trial"),
    ([], "No trial is finished"),
  ],
)
def test_what_cannot_be_compared_is_said(tmp_path, kinds, words):
  write_trial(tmp_path, GROWS, trial_config(32, seed=9), finished=False)
  for kind, depth in kinds:
    write_trial(tmp_path, GROWS, trial_config(16, kind, depth))
  assert words in words_of(analyse(load(tmp_path)))
