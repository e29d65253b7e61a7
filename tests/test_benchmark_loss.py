"""The loss benchmark: its contestants and its arithmetic."""

import importlib.util
import json
import sys
import types

import jax
import numpy as np
import pytest

from launch.benchmarks import harness, loss
from tests import common

pytest_plugins = ("tests.commands",)


@pytest.fixture
def torch_settings():
  torch = pytest.importorskip("torch", reason="the benchmark's peer needs torch")
  before = torch.get_float32_matmul_precision(), torch.get_num_threads()
  yield
  torch.set_float32_matmul_precision(before[0])
  torch.set_num_threads(before[1])


@pytest.fixture
def tokamax(monkeypatch):
  """Where tokamax is missing, a function of its signature takes its place."""

  def linear_softmax_cross_entropy_loss(
    x, labels, weights, *, reduction="sum", precision=None, implementation=None
  ):
    assert x.ndim == weights.ndim == 2 and labels.shape == x.shape[:1]
    assert reduction == "sum" and precision is implementation is None
    log_probs = jax.nn.log_softmax(x @ weights)
    return -(jax.nn.one_hot(labels, weights.shape[1]) * log_probs).sum()

  if importlib.util.find_spec("tokamax") is None:
    package = types.SimpleNamespace(
      linear_softmax_cross_entropy_loss=linear_softmax_cross_entropy_loss
    )
    monkeypatch.setitem(sys.modules, "tokamax", package)


def expected_step(inputs):
  """Returns `(total, d_hidden, d_unembed)` in float64, position by position."""
  hidden, unembed = np.float64(inputs.hidden_MBTD), np.float64(inputs.unembed_DV)
  total, d_hidden, d_unembed = 0.0, np.zeros_like(hidden), np.zeros_like(unembed)
  for m, b, t in np.ndindex(inputs.targets_MBT.shape):
    coefficient, target = inputs.coefficients_M[m], inputs.targets_MBT[m, b, t]
    probs = np.exp(hidden[m, b, t] @ unembed)
    probs /= probs.sum()
    total -= coefficient * np.log(probs[target])
    probs[target] -= 1
    d_hidden[m, b, t] = coefficient * unembed @ probs
    d_unembed += coefficient * np.outer(hidden[m, b, t], probs)
  return total, d_hidden, d_unembed


@pytest.mark.parametrize("name", common.mostly_slow(loss.NAMES, loss.OURS))
def test_all_contestants_compute_the_same(name, request):
  request.getfixturevalue("torch_settings" if name in harness.TORCH else "tokamax")
  config = common.tiny_config("sequential", 3)
  step, facts = loss.build_step(config, name)
  step()
  total, (d_hidden, d_unembed) = step()  # Nothing is left over from a step before.
  expected = expected_step(loss.make_inputs(config))
  np.testing.assert_allclose(total, expected[0], rtol=1e-6)
  for found, exact in zip((d_hidden, d_unembed), expected[1:], strict=True):
    found = np.stack(found) if isinstance(found, list) else np.asarray(found)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * exact.max())
  sizes = [np.size(x) for x in expected[1:]]
  assert facts["least_memory"] == 2 * 4 * sum(sizes)
  assert ("temporaries" in facts) == (name not in harness.TORCH)


def test_depths_count_as_in_training():
  config = common.tiny_config("sequential", 3, {"mtp.weight": 0.3})
  inputs = loss.make_inputs(config)
  tokens = inputs.targets_MBT[0].size
  np.testing.assert_allclose(inputs.coefficients_M * tokens, [1, 0.1, 0.1, 0.1], 1e-6)


@pytest.mark.parametrize("depth", [0, 2])
def test_needed_products_are_those_that_the_compiler_counts(depth):
  kind = "sequential" if depth else "none"
  config = common.tiny_config(kind, depth, common.COUNTABLE)
  hidden, unembed, targets, coefficients = loss.make_inputs(config)
  program = jax.jit(jax.value_and_grad(loss.plain_loss, (0, 1)))
  arguments = (list(hidden), unembed, list(targets), coefficients)
  counted = program.lower(*arguments).compile().cost_analysis()["flops"]
  # The rest is softmax and sums, a few operations per logit and not 6 d.
  assert 1 <= counted / loss.needed_flops(config) < 1.03


@pytest.mark.slow
def test_a_quick_run_measures_all(command, tmp_path):
  result = command("launch.benchmark", "loss", "--preset=quick", f"--output={tmp_path}")
  assert result.code == 0, result.output
  record = json.loads((tmp_path / "loss-quick.json").read_text())
  assert [row["D"] for row in record["rows"]] == [0, 1]
  for row in record["rows"]:
    for name in ("floor", "ours", "plain JAX"):
      seconds = row["contestants"][name]["seconds"]
      assert len(seconds) == 2 and all(s > 0 for steps in seconds for s in steps)
    for name in ("torch eager", "tokamax"):
      figures = row["contestants"][name]
      assert "seconds" in figures or figures["error"].startswith("ModuleNotFoundError")
  assert record["versions"].keys() == {"python", "jax", "torch", "tokamax"}
