"""Acceptance figures on rounds written out by hand, and their intervals."""

import json

import numpy as np
import pytest
from scipy import stats

from mtp_jax.decode import acceptance
from mtp_jax.decode.generate import Completion


def completion(rounds, num_drafts=2, cut=0, prefill=True):
  """Of rounds given by drafts emitted; the last `cut` are without an own token."""
  emitted = np.array(rounds, int)
  number = np.arange(1, 1 + num_drafts)
  accepted = (emitted[:, None] >= number).sum(axis=0)
  # Draft k is reached where k - 1 were emitted; a round that was cut ends there.
  ends = np.arange(len(emitted)) >= len(emitted) - cut
  reached = (emitted[:, None] >= number - ~ends[:, None]).sum(axis=0)
  tokens = int(prefill) + emitted.sum() + len(emitted) - cut
  histogram = np.bincount(emitted, minlength=1 + num_drafts)
  return Completion(
    np.zeros(tokens, np.int32), np.zeros(tokens, np.int8), bool(cut), len(emitted),
    reached, accepted, histogram,
  )


def test_figures_of_rounds_written_out():
  # Prompt 1: rounds that emit 2, 0, 1 drafts and an own token each; prompt 2: 2 and,
  # ended by a stop token that was draft 1, 1 without an own token.
  found = acceptance.summarize([completion([2, 0, 1]), completion([2, 1], cut=1)])
  assert found["tokens"] == 2 + (3 + 1 + 2) + (3 + 1)
  assert found["rounds"] == 5 and found["num_prompts"] == 2 and found["num_drafts"] == 2
  assert found["tau"]["mean"] == 10 / 5
  assert [x["mean"] for x in found["survival"]] == [4 / 5, 2 / 5]
  # Draft 2 could be emitted in the rounds that emitted draft 1, but not after the stop.
  assert [x["mean"] for x in found["conditional"]] == [4 / 5, 2 / 3]
  assert found["accepted_per_drafted"]["mean"] == 6 / 10
  assert found["histogram"] == [1, 2, 2]
  assert found["definitions"].keys() > {"tau", "survival", "conditional"}
  json.dumps(found)


def test_plain_decoding_and_a_sequence_that_the_prefill_ended():
  plain = acceptance.summarize([completion([0, 0, 0], num_drafts=0)])
  assert plain["tau"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
  assert plain["survival"] == plain["conditional"] == []
  assert plain["accepted_per_drafted"]["mean"] is None
  assert plain["histogram"] == [3]
  ended = acceptance.summarize([completion([])])
  assert ended["tokens"] == 1 and ended["rounds"] == 0
  assert ended["tau"] == {"mean": None, "low": None, "high": None}


def test_intervals_are_those_of_scipy_and_repeat():
  rng = np.random.default_rng(1)
  completions = [
    completion(rng.binomial(3, rng.uniform(0.2, 0.9), rng.integers(5, 30)), 3)
    for _ in range(24)
  ]
  found = acceptance.summarize(completions, num_resamples=4000)
  assert found == acceptance.summarize(completions, num_resamples=4000)
  tokens = np.array([len(c.tokens) - 1 for c in completions])
  rounds = np.array([c.rounds for c in completions])
  expected = stats.bootstrap(
    (tokens, rounds), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True,
    vectorized=True, method="percentile", n_resamples=4000, rng=2,
  ).confidence_interval
  width = expected.high - expected.low
  np.testing.assert_allclose(
    [found["tau"]["low"], found["tau"]["high"]], expected, atol=0.1 * width
  )
  assert found["tau"]["low"] < found["tau"]["mean"] < found["tau"]["high"]


def test_a_resample_without_a_reached_draft_is_left_out():
  # Draft 2 is reached by one prompt of four: a third of the resamples miss it.
  completions = [completion([2])] + [completion([0])] * 3
  found = acceptance.summarize(completions)["conditional"][1]
  assert found == {"mean": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize("completions, number", [
  ([], "0 with []"), ([completion([1], 1), completion([1], 2)], "2 with [1, 2]"),
])
def test_completions_must_fit_together(completions, number):
  with pytest.raises(ValueError, match="one number of drafts") as error:
    acceptance.summarize(completions)
  assert number in str(error.value)
