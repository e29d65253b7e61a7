"""A kind of predictor that only this file has is trained, drafts, and is loaded.

It needs what README.md promises: one module with its functions, and one row.
"""

import ast
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import mtp_jax
from mtp_jax import accounting, predictors, train
from mtp_jax.config import MtpConfig, TrunkConfig
from mtp_jax.config_rules import validate
from mtp_jax.model.layers import partitioned
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.predictors.linear import heads_on_one_state
from mtp_jax.predictors.weights import layers
from tests.common import tiny_config
from tests.tiny_runs import read_metrics, run_config, write_texts


class Gains(nn.Module):
  """Scales the trunk's normed state by one vector a depth."""

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given):
    hidden_BTD = given.final_norm(given.residual_BTD)
    shape = (self.mtp.depth, self.trunk.embed_dim)
    ones = partitioned(nn.initializers.ones, "depths", "norm")
    gains_KD = self.param("gains", ones, shape).astype(hidden_BTD.dtype)
    heads_KBTD = hidden_BTD * gains_KD[:, None, None]
    return jnp.concatenate([hidden_BTD[None], heads_KBTD]), None


LARGE = {"tokenizer.vocab_size": 260, "data.seq_len": 128}  # Enough for a run.
KINDS = frozenset(predictors.KINDS)
TOY = Kind(
  module=Gains,
  flops=lambda config: 7.0 * config.mtp.depth,
  unstack=lambda params, mtp: layers(params["gains"], mtp.depth),
  drafter=lambda trunk, mtp, num_drafts: heads_on_one_state(
    trunk, num_drafts, jnp.multiply
  ),
)


@pytest.fixture
def row(monkeypatch):
  monkeypatch.setitem(predictors.KINDS, "toy", TOY)


def test_a_kind_of_one_file_and_one_row_trains_drafts_and_loads(row, tmp_path):
  config = run_config(write_texts(tmp_path / "texts"), {
    "mtp.kind": "toy", "train.num_steps": 3, "train.eval_every": 0,
    "train.diagnostics_every": 1, "train.log_every": 1, "checkpoint.every_steps": 3,
    # It learns to repeat a byte, so that drafts are accepted.
    "optimizer.learning_rate": 0.3, "optimizer.warmup_fraction": 0.0,
  })
  train.fit(config, tmp_path / "run", progress=False)
  losses = np.array([x["loss"] for x in read_metrics(tmp_path / "run", "train")])
  assert losses.shape == (3, 3) and np.all(np.isfinite(losses))

  model = mtp_jax.load(tmp_path / "run")
  assert (model.config.mtp.kind, model.step) == ("toy", 3)
  gains_KD = np.asarray(model.params["mtp"]["gains"])
  assert gains_KD.shape == (2, 16) and np.all(gains_KD != 1)  # All were trained.
  hidden_MTD = model.hidden("def f0(x):\n")
  expected_KTD = hidden_MTD[0] * gains_KD[:, None]
  np.testing.assert_allclose(hidden_MTD[1:], expected_KTD, rtol=1e-5)
  drafted, plain = (
    model.generate("def f", 24, num_drafts=k, stop=[]) for k in (2, 0)
  )
  np.testing.assert_array_equal(drafted.tokens, plain.tokens)
  assert len(plain.tokens) == 24 and np.any(drafted.source > 0)  # Some were drafts.


def test_what_follows_from_the_row_alone(row):
  config = tiny_config("toy", 3, LARGE)
  validate(config)
  ntp = accounting.count(tiny_config(overrides=LARGE))
  found = accounting.count(config)
  assert (found.deployed, found.total) == (ntp.total, ntp.total + 3 * 16)
  logits = 2 * 16 * config.tokenizer.vocab_size
  flops = found.train_flops_per_token - ntp.train_flops_per_token
  assert flops == 3 * (3 * logits + 7.0 * 3)
  contract = predictors.contract(config)
  assert contract["kind"] == "toy"
  assert contract["hidden_source"] == "trunk output after its final norm"


def test_no_code_asks_which_kind_it_is():
  """No comparison with a kind's name, but in the files that are made of kinds.

  These are the kinds themselves, the layouts of other programs, the PyTorch model that
  writes some kinds once more, and the claims, which name the arms of an experiment.
  """
  root, asked = Path(predictors.__file__).parents[2], []
  homes = (
    "mtp_jax/predictors/", "mtp_jax/interop/", "mtp_jax/analysis/claims/",
    "launch/benchmarks/torch_peer.py",
  )
  for path in sorted([*root.glob("mtp_jax/**/*.py"), *root.glob("launch/**/*.py")]):
    name = path.relative_to(root).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.Compare) or name.startswith(homes):
        continue
      values = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
      # Other settings have values of these names too.
      is_of_kind = "mtp.kind" in ast.unparse(node) or ast.unparse(node.left) == "kind"
      if values & (KINDS - ({"none", "linear"} if not is_of_kind else set())):
        asked.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
  assert not asked, "\n".join(asked)
