"""Weights of the depths over training, against values worked out by hand."""

import dataclasses

import numpy as np
import pytest

from mtp_jax.depth_weights import depth_weights, lambda_at
from tests.common import tiny_config


def weights(progress, depth=2, **overrides):
  mtp = dataclasses.replace(tiny_config("sequential", depth).mtp, **overrides)
  weights_M, scale = depth_weights(mtp, np.float32(0.3), np.float32(progress))
  return np.asarray(weights_M), float(scale)


def test_mean_divides_lambda_by_depth_and_sum_does_not():
  np.testing.assert_allclose(weights(0.5, weighting="mean")[0], [1, 0.15, 0.15], 1e-6)
  np.testing.assert_allclose(weights(0.5, weighting="sum")[0], [1, 0.3, 0.3], 1e-6)


def test_relative_weights_multiply():
  found = weights(0.5, weighting="sum", depth_weights=(1.0, 0.5))[0]
  np.testing.assert_allclose(found, [1, 0.3, 0.15], 1e-6)


def test_depth_0_has_the_main_loss_alone():
  assert weights(0.5, depth=0)[0].tolist() == [1]


@pytest.mark.parametrize(
  "schedule, expected",
  [
    ("constant", [0.3, 0.3, 0.3, 0.3]),
    ("piecewise", [0.3, 0.3, 0.1, 0.1]),
    ("linear", [0.3, 0.25, 0.2, 0.1]),
    ("anneal", [0.3, 0.15, 0.0, 0.0]),
  ],
)
def test_schedules(schedule, expected):
  config = dataclasses.replace(
    tiny_config("sequential", 1).mtp,
    schedule=schedule,
    schedule_fraction=0.5,
    final_weight=0.1,
  )
  found = [float(lambda_at(config, 0.3, np.float32(p))) for p in (0, 0.25, 0.5, 1)]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_curricula_switch_depths_on_and_off_one_by_one():
  active = lambda p, kind: (weights(p, curriculum=kind)[0] > 0).tolist()  # noqa: E731
  forward = [active(p, "forward") for p in (0.0, 0.4, 0.7, 1.0)]
  backward = [active(p, "reverse") for p in (0.0, 0.4, 0.7, 1.0)]
  stages = [[True, False, False], [True, True, False], [True, True, True]]
  assert forward == [*stages, stages[-1]]
  assert backward == [*stages[::-1], stages[0]]
