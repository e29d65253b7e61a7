"""Latent attention, experts and MTP together: trained, decoded, written and read back.

What each part does on its own is tested where it lives.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtp_jax
from mtp_jax import interop
from mtp_jax.config import with_overrides
from mtp_jax.data.tokenizers import ByteTokenizer, save_tokenizer
from mtp_jax.sharding import make_mesh
from mtp_jax.train import fit
from tests.common import EXPERTS, LATENT
from tests.tiny_runs import read_metrics, run_config, without_wall_clock, write_texts

STEPS = 6
MODEL = LATENT | EXPERTS | {
  "trunk.num_layers": 2,
  "trunk.remat": "none",
  "trunk.moe.bias_rate": 0.01,
  "trunk.moe.balance_weight": 0.01,
  "train.num_steps": STEPS,
  "train.log_every": 1,
  "train.eval_every": 0,
  "train.diagnostics_every": 0,
  "eval.line_prompts": 0,
  "eval.function_prompts": 0,
  "checkpoint.every_steps": 3,
  "mesh.data": 1,
}
MESH = {"mesh.data": 2, "mesh.expert": 4}
TEXT = "def f1(x):\n  total = x"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  texts = write_texts(tmp_path_factory.mktemp("deepseek") / "texts")
  return run_config(texts, MODEL)


def one_device_mesh(sizes, devices=None):
  del devices
  return make_mesh(sizes, jax.devices()[:1])


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  """Returns the folder of a finished run on one device."""
  folder = tmp_path_factory.mktemp("one") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("mtp_jax.run.make_mesh", one_device_mesh)
    patch.setattr("jax.device_count", lambda: 1)
    fit(config, folder, progress=False)
  return folder


@pytest.fixture(scope="module")
def model(run):
  return mtp_jax.load(run)


@pytest.mark.slow
def test_experts_are_logged_and_the_log_adds_up(run):
  records = read_metrics(run, "train")
  assert len(records) == STEPS
  for record in records:
    total = sum(record["weighted_loss"]) + record["balance_loss"]
    np.testing.assert_allclose(record["loss_total"], total, rtol=1e-5)
    assert record["dropped"] == 0 and record["balance_loss"] > 0
    for part, layers in (("trunk", 1), ("mtp", 2)):  # The first layer is dense.
      assert np.shape(record["load"][part]) == (layers, 8)
      np.testing.assert_allclose(np.sum(record["load"][part], axis=1), 1, rtol=1e-5)
      assert record["violation"][part] > 0
  assert records[-1]["loss"][0] < records[0]["loss"][0]


@pytest.mark.slow
def test_eight_devices_train_the_same_model(config, run, tmp_path):
  folder = tmp_path / "run"
  fit(with_overrides(config, MESH), folder, progress=False)
  pairs = zip(read_metrics(folder), read_metrics(run), strict=True)
  for found, expected in pairs:
    found, expected = map(without_wall_clock, (found, expected))
    assert found.keys() == expected.keys()
    leaves, wanted = map(jax.tree.leaves, (found, expected))
    for a, b in zip(leaves, wanted, strict=True):
      assert a == b or a == pytest.approx(b, rel=2e-3, abs=2e-4), (found, expected)


@pytest.mark.slow
def test_the_bias_is_in_the_checkpoint_and_moved_by_gamma(model):
  trunk, mtp = model.params["trunk"], model.params["mtp"]
  for part in (trunk["blocks"], mtp["modules"]["block"]):
    steps = np.asarray(part["moe"]["bias"]) / 0.01
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert np.abs(steps).max() >= 1


@pytest.mark.slow
def test_its_own_module_drafts_the_text_of_plain_decoding(model):
  drafted = model.generate(TEXT, 24)
  assert drafted.acceptance["num_drafts"] == 2
  plain = model.generate(TEXT, 24, num_drafts=0)
  np.testing.assert_array_equal(drafted.tokens, plain.tokens)
  ids = model.encode(TEXT)
  # And of a whole forward pass, every token of it.
  logits_TV = model.logits(np.append(ids, plain.tokens[:-1]))
  expected = jnp.argmax(logits_TV[len(ids) - 1 :], axis=-1)
  np.testing.assert_array_equal(plain.tokens, expected)


@pytest.mark.slow
def test_out_to_the_deepseek_layout_and_back(model, tmp_path):
  folder = tmp_path / "out"
  interop.export_params(model.params, model.config, folder, "deepseek_v3")
  save_tokenizer(ByteTokenizer(), folder / "tokenizer.json")
  found = interop.read_model(folder)
  assert with_overrides(model.config, found.overrides) == model.config
  params = interop.load_params(found, model.config, model.mesh)
  jax.tree.map(np.testing.assert_array_equal, params, model.params)
