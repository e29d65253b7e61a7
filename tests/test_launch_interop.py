"""Weights in, training on, weights out: the commands, as a nanoGPT user would go."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import mtp_jax
from launch import import_hf
from mtp_jax import interop
from mtp_jax.config import ConfigError, with_overrides
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.predictors import contract
from tests import hf_folders, tiny_runs
from tests.common import random_params, tiny_config
from tests.untrained_runs import save_run

pytest_plugins = ("tests.commands",)

torch = pytest.importorskip("torch", reason="the weights come from transformers")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 264, 48
TEXT = "def f(x):\n  return x"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
  """Returns a folder with the weights of a small GPT-2, and the model."""
  torch.manual_seed(0)
  config = transformers.GPT2Config(
    vocab_size=VOCAB, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2
  )
  model = transformers.GPT2LMHeadModel(config).eval()
  folder = tmp_path_factory.mktemp("gpt2") / "weights"
  model.save_pretrained(folder)
  return folder, model


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
  """Returns what a run needs besides weights: text, few steps, a shared cache."""
  texts = tiny_runs.write_texts(tmp_path_factory.mktemp("texts") / "texts")
  values = {
    "tokenizer.kind": "bytes",
    "data.source": "files", "data.path": str(texts), "data.batch_size": 4,
    "data.validation_fraction": 0.3, "data.test_fraction": 0.1,
    "train.num_steps": 3, "train.log_every": 1, "train.diagnostics_every": 0,
    "eval.num_rows": 4, "eval.batch_size": 4, "eval.line_prompts": 1,
    "eval.function_prompts": 1, "eval.max_new_tokens": 8,
  }
  cache = tmp_path_factory.mktemp("cache")
  return (
    *(f"--config.{key}={value}" for key, value in values.items()),
    f"--compilation_cache={cache}",
  )


def hf_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()


@pytest.mark.slow
def test_gpt2_gets_a_module_trains_on_and_goes_back_out(command, gpt2, flags, tmp_path):
  folder, theirs = gpt2
  run = tmp_path / "run"
  result = command(
    "launch.import_hf", f"--from={folder}", f"--workdir={run}", *flags,
    "--config.train.freeze_trunk=True",
  )
  assert result.code == 0, result.output
  assert "gpt2 weights at step 0, mtp.kind 'sequential', depth 1" in result.output

  start = mtp_jax.load(run)
  ids = start.encode(TEXT)
  assert start.step == 0 and start.config.data.seq_len == LENGTH
  np.testing.assert_allclose(start.logits(ids), hf_logits(theirs, ids), atol=1e-4)

  result = command("launch.train", f"--workdir={run}", flags[-1])
  assert result.code == 0 and (run / "DONE").exists(), result.output
  trained = mtp_jax.load(run)
  assert trained.step == 3
  # A frozen trunk: the same next-token logits, another module.
  np.testing.assert_array_equal(trained.logits(ids), start.logits(ids))
  depth_1 = trained.logits(ids, depth=1)[:-1]
  assert not np.allclose(depth_1, start.logits(ids, depth=1)[:-1])

  result = command("launch.export", f"--workdir={run}")
  assert result.code == 0 and "gpt2" in result.output
  refused = command(
    "launch.export", f"--workdir={run}", "--layout=gpt2", f"--output={tmp_path / 'no'}"
  )
  assert refused.code == 2 and not (tmp_path / "no").exists()
  out = tmp_path / "out"
  result = command(
    "launch.export", f"--workdir={run}", "--layout=gpt2", "--trunk_only",
    f"--output={out}",
  )
  assert result.code == 0, result.output
  assert json.loads((out / "mtp_contract.json").read_text())
  assert (out / "tokenizer.json").exists()
  again = transformers.GPT2LMHeadModel.from_pretrained(out).state_dict()
  for name, tensor in theirs.state_dict().items():
    assert torch.equal(again[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("case, layers", [("deepseek", (3, 4)), ("glm", (3, 4, 5))])
def test_published_mtp_layers_are_tuned_and_go_back_into_their_shards(
  command, flags, tmp_path, case, layers
):
  original, run, out = tmp_path / "original", tmp_path / "run", tmp_path / "out"
  config = hf_folders.config_of(
    case, {"tokenizer.vocab_size": VOCAB, "data.seq_len": LENGTH}
  )
  interop.export_params(
    random_params(config), config, original, hf_folders.CASES[case][0],
    dtype="bfloat16", max_shard_bytes=9000, tokenizer=ByteTokenizer(),
  )
  result = command(
    "launch.import_hf", f"--from={original}", f"--workdir={run}", *flags,
    "--config.train.freeze_trunk=True", "--config.mtp.objective=kl",
    f"--config.mtp.depth={len(layers)}",
  )
  assert result.code == 0, result.output
  assert command("launch.train", f"--workdir={run}", flags[-1]).code == 0
  result = command("launch.export", f"--workdir={run}", f"--stitch={original}",
                   f"--output={out}")
  assert result.code == 0, result.output

  before, after = hashes(original), hashes(out)
  assert before.keys() == after.keys()
  changed = {name for name in before if before[name] != after[name]}
  of_module = re.compile(rf"model\.layers\.({'|'.join(map(str, layers))})\.")
  assert changed and all(map(of_module.match, changed))
  # Every layer was tuned; its copies of the embedding and the output matrix stay.
  for layer in layers:
    assert f"model.layers.{layer}.eh_proj.weight" in changed
    assert f"model.layers.{layer}.embed_tokens.weight" not in changed
  for file in original.iterdir():
    same = (out / file.name).read_bytes() == file.read_bytes()
    assert same or file.suffix == ".safetensors", file.name
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert index["weight_map"] == {name: shard for name, (shard, _) in after.items()}
  stated = json.loads((out / "config.json").read_text())
  assert stated["num_nextn_predict_layers"] == len(layers)
  # The folder has the modules of the run, in its own precision.
  found = interop.read_model(out)
  trained = mtp_jax.load(run)
  read = interop.load_params(found, trained.config, trained.mesh)
  ours, theirs = trained.params["mtp"]["modules"], read["mtp"]["modules"]
  np.testing.assert_array_equal(
    ours["projection"].astype("bfloat16").astype("float32"), theirs["projection"]
  )


def hashes(folder):
  """Returns shard and hash of every tensor of a folder."""
  return {
    name: (file.name, hashlib.sha256(tensor.tobytes()).hexdigest())
    for file in folder.glob("*.safetensors")
    for name, tensor in load_file(file).items()
  }


@pytest.mark.slow
def test_an_unfrozen_trunk_moves(command, gpt2, flags, tmp_path):
  folder, theirs = gpt2
  run = tmp_path / "run"
  assert command(
    "launch.import_hf", f"--from={folder}", f"--workdir={run}", *flags
  ).code == 0
  assert command("launch.train", f"--workdir={run}", flags[-1]).code == 0
  model = mtp_jax.load(run)
  ids = model.encode(TEXT)
  assert not np.allclose(model.logits(ids), hf_logits(theirs, ids), atol=1e-4)


def test_shorter_rows_have_the_first_of_the_positions(command, gpt2, flags, tmp_path):
  folder, theirs = gpt2
  run, out = tmp_path / "run", tmp_path / "out"
  result = command(
    "launch.import_hf", f"--from={folder}", f"--workdir={run}", *flags,
    "--config.data.seq_len=24",
  )
  assert result.code == 0, result.output
  start = mtp_jax.load(run)
  ids = start.encode(TEXT)
  assert len(ids) == 21 and start.config.data.seq_len == 24
  np.testing.assert_allclose(start.logits(ids), hf_logits(theirs, ids), atol=1e-4)
  assert contract(start.config)["positions"] == {"kind": "learned", "count": 24}
  result = command(
    "launch.export", f"--workdir={run}", "--layout=gpt2", "--trunk_only",
    f"--output={out}",
  )
  assert result.code == 0, result.output
  again = transformers.GPT2LMHeadModel.from_pretrained(out).eval()
  assert again.config.n_positions == 24
  written = json.loads((out / "tokenizer_config.json").read_text())
  assert written["model_max_length"] == 24
  np.testing.assert_array_equal(hf_logits(again, ids), hf_logits(theirs, ids))


def hf_model(family="llama", max_length=16, **rope):
  """Returns what `interop.read_model` says of a folder without MTP layers."""
  config = tiny_config(overrides={"trunk.kind": family} if family == "gpt2" else None)
  decided = {
    f"trunk.{key}": getattr(config.trunk, key)
    for key in ("kind", "num_layers", "embed_dim", "rope_theta")
  }
  if family == "gpt2":
    del decided["trunk.rope_theta"]
    decided |= {"data.seq_len": max_length, "trunk.num_kv_heads": 4}
  decided |= {f"trunk.rope_scaling.{key}": x for key, x in rope.items()}
  return interop.HfModel(
    Path("folder"), family, decided, 0, max_length, Path("tokenizer.json"), {}, {}
  )


def combined(model, **overrides):
  overrides = {key.replace("__", "."): value for key, value in overrides.items()}
  config = tiny_config(overrides=overrides)
  return import_hf.combine(config, overrides, model)


LLAMA3 = {
  "kind": "llama3", "factor": 8.0, "original_length": 6, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
}


def test_rows_and_rotary_embedding_may_be_others_than_the_folder_has():
  none = hf_model(kind="none")
  assert combined(none).trunk.rope_theta == 1e4
  longer = combined(none, trunk__rope_theta=1e6, data__seq_len=64)
  assert (longer.trunk.rope_theta, longer.data.seq_len) == (1e6, 64)
  assert contract(longer)["positions"]["theta"] == 1e6
  # Stretched from the texts of the folder, unless another length is named.
  yarn = {"trunk__rope_scaling__kind": "yarn", "trunk__rope_scaling__factor": 4.0}
  scaling = combined(none, data__seq_len=64, **yarn).trunk.rope_scaling
  assert (scaling.kind, scaling.factor, scaling.original_length) == ("yarn", 4.0, 16)
  scaling = combined(none, trunk__rope_scaling__original_length=8, **yarn)
  assert scaling.trunk.rope_scaling.original_length == 8

  llama3 = hf_model(max_length=48, **LLAMA3)
  found = combined(llama3, trunk__rope_scaling__factor=16.0, data__seq_len=96)
  assert dataclasses.asdict(found.trunk.rope_scaling).items() >= (
    LLAMA3 | {"factor": 16.0}
  ).items()
  assert contract(found)["positions"]["scaling"]["factor"] == 16.0
  # Nothing is left of a scaling that another one replaces.
  plain = combined(llama3, trunk__rope_scaling__kind="none")
  assert plain.trunk.rope_scaling == tiny_config().trunk.rope_scaling

  assert combined(hf_model("gpt2", 64)).data.seq_len == 64
  assert combined(hf_model("gpt2", 64), data__seq_len=32).data.seq_len == 32


def test_completions_of_the_evaluation_fit_into_the_rows_of_the_folder():
  limits = {"line_prompts": 1, "function_prompts": 0, "middle_prompts": 0}
  given = {f"eval.{key}": value for key, value in limits.items()}
  default = tiny_config(overrides=given | {"eval.max_new_tokens": 64})
  found = import_hf.combine(default, given, hf_model("gpt2", 64))
  assert (found.data.seq_len, found.eval.max_new_tokens) == (64, 32)
  shorter = with_overrides(default, {"data.seq_len": 24})
  found = import_hf.combine(shorter, {"data.seq_len": 24}, hf_model("gpt2", 64))
  assert (found.data.seq_len, found.eval.max_new_tokens) == (24, 12)
  # What was asked for is checked as it is.
  found = import_hf.combine(default, {"eval.max_new_tokens": 64}, hf_model("gpt2", 64))
  assert found.eval.max_new_tokens == 64


@pytest.mark.parametrize("model, overrides, message", [
  (
    hf_model(kind="none"), {"data__seq_len": 64},
    r"data.seq_len must be at most 16, the positions of folder \(or set trunk\.rope_",
  ),
  (
    hf_model("gpt2"), {"data__seq_len": 64},
    r"data.seq_len must be at most 16, the positions of folder, got 64\.",
  ),
  (hf_model(), {"trunk__embed_dim": 32}, r"trunk.embed_dim must be 16, as folder has "),
])
def test_what_the_folder_decides(model, overrides, message):
  with pytest.raises(ConfigError, match=message):
    combined(model, **overrides)


BAD = {
  "another width": (
    ["--config.trunk.embed_dim=32"],
    "trunk.embed_dim must be 16, as {folder} has it, got 32.",
  ),
  "more positions than there are": (
    ["--config.data.seq_len=64"], "data.seq_len must be",
  ),
  "unknown key": (
    ["--config.train.steps=3"], "train.steps: unknown key; did you mean",
  ),
  "section": (
    ["--config.trunk={}"], "trunk is a section; set one of its keys",
  ),
  "broken rule": (
    ["--config.mtp.depth=48"], "mtp.depth must be less than data.seq_len (48), got 48.",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(
  command, gpt2, flags, tmp_path, name
):
  arguments, message = BAD[name]
  run = tmp_path / "run"
  result = command(
    "launch.import_hf", f"--from={gpt2[0]}", f"--workdir={run}", *flags, *arguments
  )
  assert result.code == 2
  assert result.output.startswith(f"error: {message.format(folder=gpt2[0])}")
  assert not result.touched_backend and not run.exists()


def test_a_folder_without_tokenizer_or_weights(command, gpt2, flags, tmp_path):
  run = f"--workdir={tmp_path / 'run'}"
  no_tokenizer = [flag for flag in flags if "tokenizer" not in flag]
  result = command("launch.import_hf", f"--from={gpt2[0]}", run, *no_tokenizer)
  assert result.code == 2 and "has no tokenizer.json; name one" in result.output
  result = command("launch.import_hf", f"--from={tmp_path}", run, *flags)
  assert result.code == 2 and "config.json" in result.output
  assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(command, gpt2, flags, tmp_path):
  config = tiny_runs.run_config(tmp_path, {"trunk.num_layers": 1, "mtp.depth": 1})
  run = save_run(tmp_path / "run", config)
  result = command("launch.import_hf", f"--from={gpt2[0]}", f"--workdir={run}", *flags)
  assert result.code == 2 and "holds a run already; name a new folder" in result.output
