"""Targets and masks: written out by hand, and against a double loop."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.targets import future_targets, shifted_tokens
from tests.common import batch_of


def test_two_packed_documents_depth_0_to_3_written_out():
  # Documents a = 10 11 12 13, b = 20 21 22 23 24; the row ends inside b.
  tokens = [[10, 11, 12, 13, 20, 21, 22, 23, 24, 30, 31]]
  segments = [[1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]]
  batch = batch_of(tokens, segments, length=7)
  targets_MBT, mask_MBT = future_targets(batch, depth=3)
  expected = [
    [11, 12, 13, None, 21, 22, 23],
    [12, 13, None, None, 22, 23, 24],
    [13, None, None, None, 23, 24, None],
    [None, None, None, None, 24, None, None],
  ]
  for m, row in enumerate(expected):
    assert mask_MBT[m, 0].tolist() == [x is not None for x in row]
    pairs = zip(targets_MBT[m, 0], row, strict=True)
    found = [None if x is None else int(t) for t, x in pairs]
    assert found == row


def test_depths_0_to_3_scored_from_the_answer_written_out():
  # Question 10 11 12 with answer 13 14 15, then question 20 with answer 21 22.
  tokens = [[10, 11, 12, 13, 14, 15, 20, 21, 22, 30, 31, 32, 33]]
  segments = [[1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
  scored = [[0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0]]
  batch = batch_of(tokens, segments, length=9, scored=scored)
  whole = [
    [None, None, 13, 14, 15, None, 21, 22, None],
    [None, 13, 14, 15, None, None, 22, None, None],
    [13, 14, 15, None, None, None, None, None, None],
    [14, 15, None, None, None, None, None, None, None],
  ]
  from_answer = [
    whole[0],
    [None, None, 14, 15, None, None, 22, None, None],
    [None, None, 15, None, None, None, None, None, None],
    [None] * 9,
  ]
  for score_from, expected in (("start", whole), ("answer", from_answer)):
    targets_MBT, mask_MBT = future_targets(batch, 3, score_from)
    pairs = zip(targets_MBT[:, 0].tolist(), mask_MBT[:, 0].tolist(), strict=True)
    assert [
      [t if m else None for t, m in zip(*row, strict=True)] for row in pairs
    ] == expected


def test_padding_is_neither_source_nor_target():
  batch = batch_of([[1, 2, 0, 0, 0, 0]], [[1, 1, 0, 0, 0, 0]], length=4)
  _, mask_MBT = future_targets(batch, depth=1)
  assert mask_MBT[:, 0].tolist() == [[True, False, False, False], [False] * 4]


def test_documents_of_one_token_have_no_target():
  batch = batch_of([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]], length=3)
  assert not future_targets(batch, depth=1)[1].any()


@settings(deadline=None, max_examples=60)
@given(
  lengths=st.lists(st.integers(1, 6), min_size=1, max_size=12),
  # Few shapes: each one is compiled.
  length=st.sampled_from([1, 4, 9]),
  depth=st.sampled_from([0, 1, 4]),
  padding=st.integers(0, 5),
  # None: every token is scored.
  scored=st.none() | st.lists(st.booleans(), min_size=14, max_size=14),
  score_from=st.sampled_from(["start", "answer"]),
)
def test_equals_a_double_loop(lengths, length, depth, padding, scored, score_from):
  total = length + 1 + depth
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:total]
  segments = np.zeros(total, int)
  segments[: len(ids)] = ids
  segments[total - padding :] = 0 if padding else segments[total - padding :]
  tokens = np.arange(100, 100 + total)
  is_scored = np.array(scored or [True] * total)[:total]
  rows = None if scored is None else is_scored[None]
  batch = batch_of(tokens[None], segments[None], length, rows)
  targets_MBT, mask_MBT = jax.device_get(future_targets(batch, depth, score_from))
  for m in range(1 + depth):
    for i in range(length):
      valid = segments[i] != 0 and segments[i] == segments[i + 1 + m]
      valid &= is_scored[i + 1 + m]
      valid &= m == 0 or score_from == "start" or is_scored[i + 1]
      assert mask_MBT[m, 0, i] == valid
      if valid:
        assert targets_MBT[m, 0, i] == tokens[i + 1 + m]


def test_shifted_tokens_reads_past_the_row():
  batch = batch_of([[1, 2, 3, 4, 5]], [[1, 1, 2, 2, 2]], length=3)
  tokens, segments = shifted_tokens(batch, 2)
  assert tokens.tolist() == [[3, 4, 5]] and segments.tolist() == [[2, 2, 2]]


def test_too_few_tokens_after_the_row_is_refused():
  batch = batch_of([[1, 2, 3]], [[1, 1, 1]], length=2)
  with pytest.raises(ValueError, match=r"next_tokens must hold at least.*3.*got 1"):
    future_targets(batch, depth=2)
