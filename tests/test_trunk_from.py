"""Predictors that are trained after the fact, on the trunk of another run."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

import mtp_jax
from launch import trials
from mtp_jax import train
from mtp_jax.config import ConfigError, with_overrides
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.model.lm import deployed
from mtp_jax.saved_model import check_trunk
from tests.common import GPT2, assert_trees_close
from tests.tiny_runs import run_config, write_texts
from tests.untrained_runs import save_run

TINY = {
  "data.seq_len": 16, "train.num_steps": 4, "train.eval_every": 0,
  "train.diagnostics_every": 0, "checkpoint.every_steps": 2, "eval.num_rows": 8,
  "eval.line_prompts": 0, "eval.function_prompts": 0, "eval.max_new_tokens": 8,
}
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """All of it takes far longer to compile than to run."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return run_config(write_texts(tmp_path_factory.mktemp("corpus") / "texts"), TINY)


@pytest.fixture(scope="module")
def sources(config, tmp_path_factory):
  """Returns the folders of runs by kind of predictor, and their configs."""
  folders = {}
  for kind in ("parallel", "sequential"):
    folder = tmp_path_factory.mktemp("sources") / kind
    own = with_overrides(config, {"mtp.kind": kind, "mtp.depth": 1})
    save_run(folder, own)
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())
    (folder / "run.json").write_text(json.dumps({"commit": f"that of {kind}"}))
    folders[kind] = folder, own
  return folders


def medusa_on(config, source, **more):
  values = {"mtp.kind": "medusa", "mtp.depth": 2, "train.trunk_from": str(source)}
  return with_overrides(config, values | more)


def without_predictors(params):
  return {name: tree for name, tree in params.items() if name != "mtp"}


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_a_frozen_trunk_is_the_deployed_model_of_its_source(
  kind, config, sources, tmp_path
):
  source, source_config = sources[kind]
  frozen = medusa_on(config, source, **MESH | {"train.freeze_trunk": True})
  result = train.fit(frozen, tmp_path / "run", progress=False)

  before = mtp_jax.load(source)
  expected, _ = deployed(before.params, before.config)
  found = mtp_jax.load(tmp_path / "run")
  assert found.step == 4
  assert_trees_close(without_predictors(found.params), expected, rtol=0, atol=0)
  assert all(np.any(x) for x in jax.tree.leaves(found.params["mtp"]))
  # On another mesh, and the layer of a parallel head in another loop: it may round.
  run = train._Run(source_config, source, read_only=True)
  params = mtp_jax.load(source, mesh=run.mesh).params
  of_source = run.likelihood(params, run.corpus)
  assert result["main_loss"]["mean"] == pytest.approx(
    of_source["main_loss"]["mean"], rel=1e-6
  )
  record = {"path": str(source), "step": 0, "commit": f"that of {kind}"}
  assert json.loads((tmp_path / "run/run.json").read_text())["trunk_from"] == record

  # It goes on from its own checkpoint when the source is not there any more.
  copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints/4")
  (copy / "DONE").unlink()
  moved = with_overrides(frozen, {"train.trunk_from": "no/longer/there"})
  resumed = train.fit(moved, copy, progress=False)
  assert resumed["depth_loss"] == result["depth_loss"]
  assert_trees_close(mtp_jax.load(copy).params, found.params, rtol=0, atol=0)
  assert json.loads((copy / "run.json").read_text())["trunk_from"] == record


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_own_output_matrices_begin_as_those_of_the_source(
  kind, config, sources, tmp_path
):
  source, _ = sources[kind]
  own = medusa_on(config, source, **MESH | {"mtp.unembed": "own"})
  run = train._Run(own, tmp_path / "run")
  with contextlib.closing(run.checkpointer), jax.set_mesh(run.mesh):
    state, _, _ = run.start(run.loader())
  kernel = mtp_jax.load(source).params["unembed"]["kernel"]
  np.testing.assert_array_equal(state.params["mtp"]["unembed"], [kernel, kernel])
  assert state.params["mtp"]["unembed"].sharding == (
    run.programs.shardings.params["mtp"]["unembed"]
  )


def test_next_token_prediction_and_the_tokenizer_of_the_source_are_taken_up(
  config, sources, tmp_path
):
  source, _ = sources["sequential"]
  plain = {
    "mtp.kind": "none", "mtp.depth": 0,
    "tokenizer.kind": "file", "tokenizer.path": str(source / "tokenizer.json"),
  }
  run = train._Run(medusa_on(config, source, **plain), tmp_path / "run")
  with contextlib.closing(run.checkpointer), jax.set_mesh(run.mesh):
    state, progress, record = run.start(run.loader())
  expected = without_predictors(mtp_jax.load(source).params)
  assert_trees_close(state.params, expected, rtol=0, atol=0)
  assert (int(state.step), progress["seconds"], record["path"]) == (0, 0.0, str(source))


def test_what_is_no_source_is_refused_before_anything_is_written(
  config, sources, tmp_path
):
  source, _ = sources["parallel"]
  empty = tmp_path / "empty"
  empty.mkdir()
  shutil.copy(source / "config.json", empty)
  old = tmp_path / "old"
  shutil.copytree(source, old)
  values = json.loads((old / "config.json").read_text())
  del values["train"]["trunk_from"]
  (old / "config.json").write_text(json.dumps(values))
  rule = "train.trunk_from must be a run folder with a finished checkpoint"
  for folder, message in (
    (tmp_path / "none", f"{rule}, got {str(tmp_path / 'none')!r}: there is no "),
    (empty, f"{rule}, got {str(empty)!r}: it has none yet."),
    (old, f"{rule} of this version, got {str(old)!r}: train.trunk_from: missing key."),
  ):
    with pytest.raises(ConfigError) as caught:
      train.fit(medusa_on(config, folder), tmp_path / "run", progress=False)
    assert str(caught.value).startswith(message)
  assert not (tmp_path / "run").exists()
  other = {"trunk.num_layers": 3, "trunk.embed_dim": 32, "tokenizer.vocab_size": 272}
  with pytest.raises(ConfigError) as caught:
    check_trunk(medusa_on(config, source, **other), tmp_path / "run")
  assert str(caught.value) == (
    "train.trunk_from must be a run whose deployed model has the trunk and the "
    f"vocabulary of this config, got {str(source)!r}:\n"
    "  trunk.num_layers: 2 there, 3 here\n  trunk.embed_dim: 16 there, 32 here\n"
    "  tokenizer.vocab_size: 264 there, 272 here"
  )
  longer = {"data.seq_len": 32}
  check_trunk(medusa_on(config, source, **longer), tmp_path / "run")
  with pytest.raises(ConfigError, match=r"\n  data.seq_len: 16 there, 32 here"):
    check_trunk(medusa_on(config, source, **GPT2 | longer), tmp_path / "run")


def test_another_tokenizer_is_refused(config, sources, tmp_path):
  source, _ = sources["sequential"]
  bpe = medusa_on(config, source, **{"tokenizer.kind": "bpe"})
  with pytest.raises(ConfigError, match=r"with the tokenizer of this one, got .* set "):
    train.fit(bpe, tmp_path / "run", progress=False)


def test_weights_from_elsewhere_and_from_a_run_exclude_each_other(config, tmp_path):
  with pytest.raises(ConfigError, match=r"^train\.trunk_from must be '' where the "):
    train.start_run(medusa_on(config, "runs/x"), tmp_path / "run", lambda mesh: {})
  assert not (tmp_path / "run").exists()


def test_a_sweep_looks_for_the_sources_before_its_first_trial(
  config, sources, tmp_path
):
  source, _ = sources["sequential"]
  swept = [
    {"name": "a", "train.trunk_from": str(source)},
    {"name": "b", "train.trunk_from": str(tmp_path / "none")},
  ]
  planned = trials.plan(medusa_on(config, ""), {}, swept, tmp_path)
  trials.check_folders(planned[:1])
  with pytest.raises(ConfigError, match=r"^b: train\.trunk_from must be a run folder"):
    trials.check_folders(planned)
