"""Runs that begin with the trunk of another run, or with all its parameters."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

import mtp_jax
from launch import trials
from mtp_jax import train
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import ConfigError, with_overrides
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.lm import deployed
from mtp_jax.pack import fit_pack
from mtp_jax.records import likelihood_of
from mtp_jax.run import Run
from mtp_jax.saved_model import check_source
from tests.common import GPT2, MINIMAL, assert_trees_close
from tests.tiny_runs import run_config, write_texts
from tests.untrained_runs import save_run

TINY = {
  "data.seq_len": 16, "train.num_steps": 4, "train.eval_every": 0,
  "train.diagnostics_every": 0, "checkpoint.every_steps": 2, "eval.num_rows": 8,
  "eval.line_prompts": 0, "eval.function_prompts": 0, "eval.max_new_tokens": 8,
}
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


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


@pytest.mark.slow
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
  run = Run(source_config, source, read_only=True)
  params = mtp_jax.load(source, mesh=run.mesh).params
  of_source = likelihood_of(run, params, run.corpus)
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
  run = Run(own, tmp_path / "run")
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
  run = Run(medusa_on(config, source, **plain), tmp_path / "run")
  with contextlib.closing(run.checkpointer), jax.set_mesh(run.mesh):
    state, progress, origin = run.start(run.loader())
  expected = without_predictors(mtp_jax.load(source).params)
  assert_trees_close(state.params, expected, rtol=0, atol=0)
  assert (int(state.step), progress) == (0, None)
  assert origin["trunk_from"]["path"] == str(source) and origin["start_from"] is None


# Kind of predictor, what the source has, and what the run has that begins with it.
STARTS = {
  "longer rows, another mesh and text": (
    "sequential", {},
    MESH | {"data.seq_len": 32, "data.seed": 3, "mtp.weight": 0.9, "seed": 5},
  ),
  "shorter rows with learned positions": (
    "sequential", GPT2 | MINIMAL,
    {"data.seq_len": 8, "optimizer.kind": "muon", "train.freeze_trunk": True},
  ),
  "heads and a shorter trunk": ("parallel", {"mtp.arm": "shortened"}, {}),
  "a drafter with a vocabulary of its own": (
    "eagle3", {"mtp.unembed": "own", "mtp.draft_vocab": 40}, MESH
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STARTS)
def test_a_run_starts_from_all_parameters_of_another(case, config, tmp_path):
  kind, of_source, of_run = STARTS[case]
  own = with_overrides(
    config, {"mtp.kind": kind, "mtp.depth": 1, "trunk.num_layers": 3} | of_source
  )
  source = save_run(tmp_path / "source", own)
  expected = mtp_jax.load(source).params
  new = with_overrides(own, of_run | {"train.start_from": str(source)})
  check_source(new, tmp_path / "run")
  run = Run(new, tmp_path / "run")
  with contextlib.closing(run.checkpointer), jax.set_mesh(run.mesh):
    state, progress, origin = run.start(run.loader())
    fresh = run.programs.init(np.int32(0))
  if "position_embed" in expected:
    expected["position_embed"]["embedding"] = (
      expected["position_embed"]["embedding"][: new.data.seq_len]
    )
  assert_trees_close(state.params, expected, rtol=0, atol=0)
  for leaf, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(run.programs.shardings), strict=True
  ):
    assert leaf.sharding == sharding
  assert (int(state.step), progress) == (0, None)
  assert_trees_close(state.opt_state, fresh.opt_state, rtol=0, atol=0)
  record = {"path": str(source), "step": 0, "commit": ""}
  assert origin == {"trunk_from": None, "start_from": record}


@pytest.mark.slow
def test_a_started_run_trains_and_goes_on_without_its_source(config, tmp_path):
  """All of it, of modules without an output norm: training, evaluation with drafts."""
  own = with_overrides(config, GPT2 | MINIMAL | {
    "mtp.kind": "sequential", "mtp.depth": 2, "optimizer.learning_rate": 1e-30,
    "eval.middle_prompts": 2,
  })
  source, run = save_run(tmp_path / "source", own), tmp_path / "run"
  (source / "run.json").write_text(json.dumps({"commit": "of the source"}))
  expected = mtp_jax.load(source)
  new = with_overrides(own, {"train.start_from": str(source)})
  result = train.fit(new, run, progress=False)
  # Steps this small change nothing: what was trained are the parameters of the source.
  found = mtp_jax.load(run)
  assert found.step == 4
  assert_trees_close(found.params, expected.params, rtol=0, atol=0)
  assert result["sampled_tokens_per_round"]["mean"] >= 1
  ids = [1, 2, 3]
  np.testing.assert_array_equal(found.logits(ids, 1), expected.logits(ids, 1))
  record = {"path": str(source), "step": 0, "commit": "of the source"}
  assert json.loads((run / "run.json").read_text())["start_from"] == record

  shutil.rmtree(source)
  shutil.rmtree(run / "checkpoints/4")
  (run / "DONE").unlink()
  resumed = train.fit(new, run, progress=False)
  assert resumed["depth_loss"] == result["depth_loss"]
  written = json.loads((run / "run.json").read_text())
  assert (written["trunk_from"], written["start_from"]) == (None, record)


@pytest.mark.slow
def test_runs_of_a_pack_start_from_other_runs(config, sources, tmp_path):
  source, own = sources["sequential"]
  shared = {"mesh.data": 1, "optimizer.learning_rate": 1e-30, "eval.num_rows": 8}
  starts = {
    "start": {"train.start_from": str(source)},
    "trunk": {"train.trunk_from": str(source)},
  }
  configs = [with_overrides(own, shared | start) for start in starts.values()]
  folders = [tmp_path / name for name in starts]
  for result in fit_pack(configs, folders):
    assert not isinstance(result, Exception), result
  expected = mtp_jax.load(source).params
  whole, trunk = (mtp_jax.load(folder).params for folder in folders)
  assert_trees_close(whole, expected, rtol=0, atol=0)
  assert_trees_close(
    without_predictors(trunk), without_predictors(expected), rtol=0, atol=0
  )
  with pytest.raises(AssertionError):
    assert_trees_close(trunk["mtp"], expected["mtp"], rtol=0, atol=1e-3)
  kept = [json.loads((folder / "run.json").read_text()) for folder in folders]
  assert [x["start_from"] is None for x in kept] == [False, True]
  assert [x["trunk_from"] is None for x in kept] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["train.start_from", "train.trunk_from"])
def test_the_newest_whole_checkpoint_is_taken(key, config, sources, tmp_path):
  source, own = sources["sequential"]
  copy = shutil.copytree(source, tmp_path / "source")
  damaged = shutil.copytree(copy / "checkpoints/0", copy / "checkpoints/5")
  (damaged / "state" / "manifest.ocdbt").write_bytes(b"")
  expected = without_predictors(mtp_jax.load(source).params)
  run = Run(with_overrides(own, {key: str(copy)}), tmp_path / "run")
  with contextlib.closing(run.checkpointer), jax.set_mesh(run.mesh):
    with pytest.warns(UserWarning, match="5 is damaged .* Trying the one before it"):
      state, _, origin = run.start(run.loader())
    assert_trees_close(without_predictors(state.params), expected, rtol=0, atol=0)
    assert origin[key.removeprefix("train.")]["step"] == 0
    shutil.rmtree(copy / "checkpoints/0")
    with pytest.raises(CheckpointError, match=r"checkpoints/5 is damaged"):
      run.start(run.loader())


def test_other_predictors_are_refused_by_key(config, sources, tmp_path):
  source, own = sources["sequential"]
  start = {"train.start_from": str(source)}
  other = {"mtp.kind": "linear", "mtp.depth": 2, "trunk.norm_eps": 1e-5}
  with pytest.raises(ConfigError) as caught:
    train.fit(with_overrides(own, start | other), tmp_path / "run", progress=False)
  assert str(caught.value) == (
    "train.start_from must be a run with the trunk, the extra predictors and the "
    f"vocabulary of this config, got {str(source)!r}:\n"
    "  trunk.norm_eps: 1e-06 there, 1e-05 here\n"
    "  mtp.kind: 'sequential' there, 'linear' here\n  mtp.depth: 1 there, 2 here\n"
    "train.trunk_from takes over a trunk without its extra predictors."
  )
  assert not (tmp_path / "run").exists()
  check_source(with_overrides(own, other | {
    "train.trunk_from": str(source), "trunk.norm_eps": 1e-6
  }), tmp_path / "run")
  for key, value, there in (
    ("mtp.out_norm", "none", "own"), ("mtp.hidden", "trunk", "chained"),
    ("mtp.share_modules", True, False), ("trunk.rope_theta", 1e6, 1e4),
  ):
    with pytest.raises(ConfigError, match=rf"\n  {key}: {there!r} there, {value!r} h"):
      check_source(with_overrides(own, start | {key: value}), tmp_path / "run")
  # What no parameter depends on may differ.
  check_source(with_overrides(own, start | {
    "mtp.weight": 0.7, "optimizer.kind": "muon", "optimizer.schedule": "wsd",
    "train.num_steps": 9, "data.seq_len": 64, "mtp.objective": "kl",
  }), tmp_path / "run")


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
  values["train"]["gone"] = 1
  (old / "config.json").write_text(json.dumps(values))
  rule = "train.trunk_from must be a run folder with a finished checkpoint"
  for folder, message in (
    (tmp_path / "none", f"{rule}, got {str(tmp_path / 'none')!r}: there is no "),
    (empty, f"{rule}, got {str(empty)!r}: it has none yet."),
    (
      old, f"{rule} of this version, got {str(old)!r}: {old}/config.json must be the "
      "config of a run, as training wrote it: train.gone: unknown ",
    ),
  ):
    with pytest.raises(ConfigError) as caught:
      train.fit(medusa_on(config, folder), tmp_path / "run", progress=False)
    assert str(caught.value).startswith(message)
  assert not (tmp_path / "run").exists()
  other = {"trunk.num_layers": 3, "trunk.embed_dim": 32, "tokenizer.vocab_size": 272}
  with pytest.raises(ConfigError) as caught:
    check_source(medusa_on(config, source, **other), tmp_path / "run")
  assert str(caught.value) == (
    "train.trunk_from must be a run whose deployed model has the trunk and the "
    f"vocabulary of this config, got {str(source)!r}:\n"
    "  trunk.num_layers: 2 there, 3 here\n  trunk.embed_dim: 16 there, 32 here\n"
    "  tokenizer.vocab_size: 264 there, 272 here"
  )
  longer = {"data.seq_len": 32}
  check_source(medusa_on(config, source, **longer), tmp_path / "run")
  with pytest.raises(ConfigError, match=r"\n  data.seq_len: 16 there, 32 here"):
    check_source(medusa_on(config, source, **GPT2 | longer), tmp_path / "run")
  # Learned positions are cut.
  with pytest.raises(ConfigError) as caught:
    check_source(
      medusa_on(config, source, **GPT2 | {"data.seq_len": 8}), tmp_path / "run"
    )
  assert "data.seq_len" not in str(caught.value)


def test_another_tokenizer_is_refused(config, sources, tmp_path):
  source, _ = sources["sequential"]
  bpe = medusa_on(config, source, **{"tokenizer.kind": "bpe"})
  with pytest.raises(ConfigError, match=r"with the tokenizer of this one, got .* set "):
    train.fit(bpe, tmp_path / "run", progress=False)


def test_weights_from_elsewhere_and_from_a_run_exclude_each_other(config, tmp_path):
  for name in ("trunk_from", "start_from"):
    with pytest.raises(ConfigError, match=rf"^train\.{name} must be '' where the "):
      train.start_run(
        with_overrides(config, {f"train.{name}": "runs/x"}), tmp_path / "run",
        lambda mesh: {},
      )
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_has_begun_needs_its_source_no_more(config, sources, tmp_path):
  source = shutil.copytree(sources["sequential"][0], tmp_path / "source")
  begun = medusa_on(
    config, source, **{"train.freeze_trunk": True, "mtp.markov_rank": 8}
  )
  result = train.fit(begun, tmp_path / "run", progress=False)
  shutil.rmtree(source)
  run = shutil.move(tmp_path / "run", tmp_path / "moved")
  check_source(begun, run)
  assert train.evaluate_run(begun, run)["main_loss"] == result["main_loss"]
  again = train.fit(begun, run, progress=False)
  assert again["main_loss"] == result["main_loss"]


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
