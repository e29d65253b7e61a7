"""The warp against an independent oracle, one token at a time in NumPy."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mtp_jax.decode.warp import Warp, check_warp, warp

V = 6
HALVES = st.integers(-8, 8).map(lambda n: n / 2)  # Coarse, so that ties are common.


@functools.cache
def program():
  return jax.jit(warp)


def log_probs_of(probs, **cuts):
  """Returns what `warp` makes of the logarithms of probabilities, in float64."""
  with jax.enable_x64(True), np.errstate(divide="ignore"):
    return np.asarray(program()(np.log(np.float64(probs)), Warp(**cuts)))


def kept(probs, **cuts):
  return np.flatnonzero(log_probs_of(probs, **cuts) > -np.inf).tolist()


def oracle(logits_V, settings):
  """Returns `(log_probs_V, margin)`: how near any decision was to the other one."""
  logits = [x / settings.temperature for x in logits_V]
  top = max(logits)
  weights = [np.exp(x - top) for x in logits]
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
  if settings.top_k is not None:
    order = order[: settings.top_k]
  margin = np.inf
  if settings.top_p is not None:
    total, mass, nucleus = sum(weights[i] for i in order), 0.0, []
    for i in order:
      nucleus.append(i)
      mass += weights[i] / total
      margin = min(margin, abs(mass - settings.top_p))
      if mass >= settings.top_p:
        break
    order = nucleus
  if settings.min_p is not None:
    margin = min(margin, *(abs(weights[i] - settings.min_p) for i in order))
    order = [i for i in order if weights[i] >= settings.min_p]
  total = sum(weights[i] for i in order)
  result = np.full(len(logits), -np.inf)
  with np.errstate(divide="ignore"):
    result[order] = [np.log(weights[i] / total) for i in order]
  return result, margin


@given(
  rows=hnp.arrays(np.float64, (2, V), elements=HALVES | st.just(-np.inf)),
  temperature=st.floats(0.3, 3),
  top_k=st.none() | st.integers(1, V + 2),
  top_p=st.none() | st.floats(0.01, 0.999),
  min_p=st.none() | st.floats(0.001, 0.99),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_oracle(rows, temperature, top_k, top_p, min_p):
  assume(np.isfinite(rows).any(1).all())
  cuts = Warp(temperature, top_k, top_p, min_p)
  expected, margins = zip(*(oracle(row, cuts) for row in rows), strict=True)
  assume(min(margins) > 1e-9)
  with jax.enable_x64(True):
    found = np.asarray(program()(rows, cuts))
  assert found.dtype == np.float64
  np.testing.assert_allclose(found, expected, 1e-12, 1e-12)


def test_temperature_comes_before_top_p():
  probs = [0.6, 0.3, 0.1]
  assert kept(probs, temperature=1.0, top_p=0.55) == [0]
  assert kept(probs, temperature=2.0, top_p=0.55) == [0, 1]


def test_top_p_is_of_what_top_k_left():
  probs = [0.4, 0.3, 0.2, 0.1]
  assert kept(probs, temperature=1.0, top_p=0.65) == [0, 1]
  # Renormalised, the two are 4/7 and 3/7.
  assert kept(probs, temperature=1.0, top_k=2, top_p=0.55) == [0]


def test_top_p_comes_before_min_p():
  probs = [0.4, 0.3, 0.2, 0.1]
  # After min-p = 0.6 (of the first two) the first alone would have mass 4/7.
  assert kept(probs, temperature=1.0, top_p=0.55, min_p=0.6) == [0, 1]
  np.testing.assert_allclose(
    np.exp(log_probs_of(probs, temperature=1.0, top_p=0.9, min_p=0.6)),
    [4 / 7, 3 / 7, 0, 0],
  )


def test_ties_go_to_lower_ids():
  probs = [0.1, 0.3, 0.1, 0.3, 0.1, 0.1]
  expected = {1: [1], 2: [1, 3], 3: [0, 1, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4]}
  for top_k, ids in expected.items():
    assert kept(probs, temperature=1.0, top_k=top_k) == ids
  assert kept(probs, temperature=1.0, top_p=0.65) == [0, 1, 3]


def test_bounds_that_are_met_exactly():
  assert kept([0.25] * 4, temperature=1.0, top_p=0.5) == [0, 1]  # Mass 0.5 reaches 0.5.
  assert kept([1, 0.5, 0.25], temperature=1.0, min_p=0.5) == [0, 1]


def test_the_first_always_stays():
  probs = [0.2, 0.5, 0.3]
  assert kept(probs, temperature=1.0, top_p=1e-6) == [1]
  assert kept(probs, temperature=1.0, top_k=1, top_p=1e-6, min_p=0.999) == [1]


@pytest.mark.parametrize("scale", [1.0, 1e9])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_extremes_in_float32(temperature, scale):
  rng = np.random.default_rng(0)
  logits = (scale * rng.standard_normal((3, 4, V))).astype(np.float32)
  logits[0, 0, 1:] = -np.inf
  logits[1] = -scale
  for cuts in ({}, {"top_k": 3, "top_p": 0.9, "min_p": 0.01}):
    found = np.asarray(program()(logits, Warp(np.float32(temperature), **cuts)))
    assert found.dtype == np.float32 and not np.isnan(found).any()
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, 1e-6)
    assert (found[0, 0] == [0, *[-np.inf] * (V - 1)]).all()
  if temperature == 1e-3:  # Nothing but the most likely token is left.
    assert (np.exp(found[2]).max(-1) > 1 - 1e-6).all()
    np.testing.assert_array_equal(found[2].argmax(-1), logits[2].argmax(-1))


def test_all_off_is_log_softmax_and_compiles_no_sort():
  logits = np.random.default_rng(0).standard_normal((2, 3, V)).astype(np.float32)
  expected = jax.nn.log_softmax(logits)
  for cuts in (
    check_warp(1.0, top_p=1.0, min_p=0.0),
    Warp(1.0, top_k=V + 5),
    Warp(1.0, top_p=1.0),
    Warp(1.0, min_p=0.0),
  ):
    np.testing.assert_allclose(program()(logits, cuts), expected, 1e-6)
  assert "sort" not in str(jax.make_jaxpr(warp)(logits, Warp(1.0, min_p=0.1)))
  assert "sort" in str(jax.make_jaxpr(warp)(logits, Warp(1.0, top_k=3)))


def test_top_p_of_1_keeps_a_tail_that_sums_cannot_see():
  logits = np.float32([0, -60, -70, -80])
  found = program()(logits, Warp(np.float32(1), top_p=np.float32(1)))
  np.testing.assert_array_equal(found, logits)


def test_bfloat16_logits_give_float32():
  logits = jax.numpy.bfloat16([[1.0, 2.0, 3.0]])
  assert program()(logits, Warp(1.0)).dtype == np.float32


def test_a_temperature_for_every_sequence():
  logits = np.random.default_rng(0).standard_normal((2, 3, V)).astype(np.float32)
  cuts = {"top_k": 4, "top_p": 0.8, "min_p": 0.05}
  each = np.float32([0.5, 2.0])
  found = program()(logits, Warp(each[:, None, None], **cuts))
  for row, temperature, expected in zip(found, each, logits, strict=True):
    np.testing.assert_allclose(row, program()(expected, Warp(temperature, **cuts)))


def test_other_values_share_one_program():
  traces = []

  @jax.jit
  def counted(logits, cuts):
    traces.append(1)
    return warp(logits, cuts)

  for numbers in ((0.7, 3, 0.9, 0.1), (1, 50, 0.5, 0.2), (2.5, 1, 0.1, 0.9)):
    counted(np.zeros((1, V), np.float32), check_warp(*numbers))
  assert len(traces) == 1


@pytest.mark.parametrize(
  "key, value, rule",
  [
    ("temperature", 0, "rule='greedy'"),
    ("temperature", -1.0, "positive and finite"),
    ("temperature", float("nan"), "positive and finite"),
    ("temperature", float("inf"), "positive and finite"),
    ("temperature", 1e-50, "positive and finite"),
    ("temperature", "1", "positive and finite"),
    ("top_k", 0, "an integer of at least 1"),
    ("top_k", -3, "an integer of at least 1"),
    ("top_k", 2.0, "an integer of at least 1"),
    ("top_k", True, "an integer of at least 1"),
    ("top_k", 2**31, "an integer of at least 1"),
    ("top_p", 0.0, r"in \(0, 1\]"),
    ("top_p", 1.5, r"in \(0, 1\]"),
    ("top_p", float("nan"), r"in \(0, 1\]"),
    ("min_p", -0.1, r"in \[0, 1\)"),
    ("min_p", 1.0, r"in \[0, 1\)"),
    ("min_p", float("nan"), r"in \[0, 1\)"),
  ],
)
def test_bad_numbers_are_refused_by_name_rule_and_value(key, value, rule):
  with pytest.raises(ValueError, match=rf"^{key} must be .*, got ") as error:
    check_warp(**({"temperature": 1.0} | {key: value}))
  error.match(rule)
  error.match(f"got {value!r}")
