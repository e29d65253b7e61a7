"""The loss benchmark: its contestants, its arithmetic, its table, its refusals."""

import importlib.util
import json
import sys
import types

import jax
import numpy as np
import pytest

from launch import benchmark
from launch.benchmarks import loss
from tests import common


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


@pytest.mark.parametrize("name", [
  pytest.param(x, marks=[pytest.mark.slow] * (x == "torch.compile")) for x in loss.NAMES
])
def test_all_contestants_compute_the_same(name, request):
  request.getfixturevalue("torch_settings" if name in loss.TORCH else "tokamax")
  config = common.tiny_config("sequential", 3)
  step, ready = loss.build_step(config, name)
  step()
  total, (d_hidden, d_unembed) = step()  # Nothing is left over from a step before.
  expected = expected_step(loss.make_inputs(config))
  np.testing.assert_allclose(total, expected[0], rtol=1e-6)
  for found, exact in zip((d_hidden, d_unembed), expected[1:], strict=True):
    found = np.stack(found) if isinstance(found, list) else np.asarray(found)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * exact.max())
  sizes = [np.size(x) for x in expected[1:]]
  assert ready.least_memory == 2 * 4 * sum(sizes)
  assert (ready.temporaries is None) == (name in loss.TORCH)


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


def test_ratios_are_formed_within_rounds_against_floor_and_peers():
  row = {
    "vocab": 264, "embed_dim": 8, "depth": 1, "block_tokens": 32, "flops": 50.0,
    "hardware": "device", "contestants": {
      # 100 operations in 4 ms: the row's 50 need 2 ms.
      "floor": {"hardware": "device", "flops": 100.0, "seconds": _seconds(4e-3)},
      "ours": _figures(3e-3, 4_000_000, 1_000_000),
      "plain JAX": _figures(6e-3, 8_000_000, 10_000_000),
      "torch eager": _figures(2e-3, 5_000_000, None),
      "torch.compile": {"error": "Failed: no compiler"},
      "tokamax": {"error": "ModuleNotFoundError: No module named 'tokamax'"},
    },
  }
  lone = {"contestants": {"ours": row["contestants"]["ours"]}, "vocab": 11}
  table = loss.markdown(_record([row, row | lone]))
  assert (
    "| V | d | D | floor ms | ours ms | plain JAX ms | torch eager ms | torch.compile "
    "ms | tokamax ms | ours / floor | ours / plain JAX | ours / torch eager | ours / "
    "torch.compile | ours / tokamax |"
  ) in table
  assert (
    "| 264 | 8 | 1 | 2.0 | 3.0 | 6.0 | 2.0 | - | - | 1.50 [1.50, 1.50] | "
    "0.50 [0.50, 0.50] | 1.50 [1.50, 1.50] | - | - |"
  ) in table
  assert "| 11 | 8 | 1 | - | 3.0 | - | - | - | - | - | - | - | - | - |" in table
  assert (
    "| V | d | D | floor | ours | plain JAX | torch eager | torch.compile | tokamax | "
    "ours (XLA) | plain JAX (XLA) | tokamax (XLA) | ours / floor | ours / plain JAX | "
    "ours / torch eager | ours / torch.compile | ours / tokamax | "
    "ours / plain JAX (XLA) | ours / tokamax (XLA) |"
  ) in table
  assert (
    "| 264 | 8 | 1 | 2 | 4 | 8 | 5 | - | - | 1 | 10 | - | 2.00 | 0.50 | 0.80 | - | - | "
    "0.10 | - |"
  ) in table
  for text in (
    "- V=264, d=8, D=1, torch.compile: Failed: no compiler",
    "- V=264, d=8, D=1, tokamax: ModuleNotFoundError: No module named 'tokamax'",
    "`loss.block_tokens` = 32",
  ):
    assert text in table


def test_flags_come_before_the_preset(tmp_path, monkeypatch):
  measured = []

  def measure(args, config, say):
    measured.append(config)
    return {"hardware": "A GPU", "contestants": {}} | dict.fromkeys(
      ("vocab", "embed_dim", "depth", "block_tokens", "flops"), 0
    )

  monkeypatch.setattr(loss, "_measure", measure)
  flags = ["--preset=gpu", "--depths", "2", "--vocabs=300", "--block_tokens=512"]
  benchmark.main(["loss", *flags, "--output", str(tmp_path)])
  assert [
    (c.trunk.embed_dim, c.tokenizer.vocab_size, c.mtp.depth, c.loss.block_tokens)
    for c in measured
  ] == [(1024, 300, 2, 512), (2048, 300, 2, 512)]
  assert all(c.data.batch_size * c.data.seq_len == 16384 for c in measured)
  assert json.loads((tmp_path / "loss-a-gpu.json").read_text())["settings"]["rounds"]


@pytest.mark.parametrize("flags, message", [
  (["--rounds=0"], "--rounds must be at least 1, got 0."),
  (["--steps_per_round=0"], "--steps_per_round must be at least 1, got 0."),
  (["--block_tokens=-1"], "loss.block_tokens must be at least 0, got -1."),
  (["--depths=-1"], "mtp.depth must be at least 0, got -1."),
  (["--contestants=liger"], "invalid choice: 'liger'"),
  (["--contestants=plain JAX"], "--contestants must have 'ours', got ['plain JAX']."),
])
def test_bad_settings_are_refused(flags, message, capsys):
  with pytest.raises(SystemExit) as error:
    benchmark.main(["loss", *flags])
  assert error.value.code == 2
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_quick_run_writes_table_and_figures(tmp_path, capsys):
  benchmark.main(["loss", "--quick", "--output", str(tmp_path)])
  assert "left] V=264 d=64 D=1 ours: round 2" in capsys.readouterr().out
  record = json.loads((tmp_path / "loss-quick.json").read_text())
  assert [row["depth"] for row in record["rows"]] == [0, 1]
  for row in record["rows"]:
    for name in ("floor", "ours", "plain JAX"):
      seconds = row["contestants"][name]["seconds"]
      assert len(seconds) == 2 and all(s > 0 for steps in seconds for s in steps)
    for name in {"torch eager", "tokamax"}:
      figures = row["contestants"][name]
      assert "seconds" in figures or figures["error"].startswith("ModuleNotFoundError")
  assert (tmp_path / "loss-quick.md").read_text() == loss.markdown(record)
  assert record["versions"].keys() == {"python", "jax", "torch", "tokamax"}


def _seconds(step):
  # The second round was disturbed: all are ten times slower.
  return [[factor * step] * 2 for factor in (1, 10, 1)]


def _figures(step, peak_memory, temporaries):
  return {
    "hardware": "device", "least_memory": 2_000_000, "peak_memory": peak_memory,
    "temporaries": temporaries, "seconds": _seconds(step),
  }


def _record(rows):
  settings = {
    "contestants": list(loss.NAMES), "seq_len": 8, "batch_size": 1, "rounds": 3,
    "steps_per_round": 2, "huge_pages": True,
  }
  return {
    "command": "c", "date": "d", "commit": "0", "hardware": "h", "versions": {},
    "settings": settings, "rows": rows,
  }
