"""Predictors in folders of their own: every bit back, the forward pass of the programs
whose layouts they are, and every refusal.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mtp_jax
from mtp_jax import accounting, interop
from mtp_jax.config import with_overrides
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.interop import InteropError
from mtp_jax.lm import MtpLm, draft_tokens, unembed_matrix
from mtp_jax.predictors import vocabulary
from tests import common, numpy_models
from tests.hf_folders import LINEAR, TIED, assert_same_bits, one_device
from tests.untrained_runs import save_run

pytest_plugins = ("tests.commands",)

T = 7
SMALL = {"data.seq_len": 12, "data.batch_size": 1}
DEEP = {"trunk.num_layers": 8}  # With the published streams of EAGLE-3.
OWN = {"mtp.unembed": "own"}
MASKED = {"mtp.one_mask": True, "trunk.qk_norm": True}
BEGIN = 3  # In whose place the files of P-EAGLE and DFlash have the mask.
# Name -> kind of predictor, layout of the trunk, overrides.
CASES = {
  "medusa": ("medusa", "llama", OWN),
  "medusa-shared": ("medusa", "llama", {}),
  "medusa-shared-tied": ("medusa", "qwen2", TIED | {"trunk.qkv_bias": True}),
  "eagle": ("eagle", "llama", {}),
  "eagle-biases-tied": ("eagle", "qwen2", TIED | LINEAR | {"trunk.qkv_bias": True}),
  "eagle-no-bias": ("eagle", "llama", {"mtp.fc_bias": False}),
  "eagle3": ("eagle3", "llama", DEEP | OWN | {"trunk.attention_dim": 24}),
  "eagle3-shallow": ("eagle3", "llama", OWN),
  "eagle3-reduced": ("eagle3", "llama", OWN | {"mtp.draft_vocab": 30}),
  "eagle3-shared": ("eagle3", "llama", DEEP | {"mtp.mlp_dim": 20}),
  "eagle3-shared-tied": ("eagle3", "llama", DEEP | TIED),
  "peagle": ("peagle", "llama", DEEP | {"trunk.attention_dim": 24}),
  "peagle-reduced-tied": ("peagle", "llama", TIED | OWN | {"mtp.draft_vocab": 30}),
  "dflash": ("dflash", "qwen3", MASKED | {"mtp.mlp_dim": 20}),
  "dflash-reduced": ("dflash", "qwen3", MASKED | OWN | DEEP | {"mtp.draft_vocab": 30}),
}
FILES = {"medusa": "medusa_lm_head.safetensors"}


@pytest.fixture(scope="module", autouse=True)
def shapes_are_found_once():
  with pytest.MonkeyPatch.context() as patch:
    cached = functools.cache(accounting.abstract_params)
    patch.setattr(accounting, "abstract_params", cached)
    yield


def config_of(case, overrides=None):
  kind, _, values = CASES[case]
  return common.tiny_config(kind, 3, SMALL | values | (overrides or {}))


def write(case, folder, **options):
  """Writes random predictors; returns all parameters and the config."""
  config = config_of(case)
  params = common.random_params(config)
  if config.mtp.draft_vocab:
    ids = np.random.default_rng(0).permutation(common.VOCAB)[: config.mtp.draft_vocab]
    params["mtp"]["draft_tokens"] = np.sort(ids).astype(np.float32)
  options = {"token_ids": (BEGIN, 4)} | options
  interop.export_params(params, config, folder, config.mtp.kind, **options)
  return params, config


def read(folder, params, config):
  trunk = {name: tree for name, tree in params.items() if name != "mtp"}
  return interop.read_drafter(folder, config, trunk, one_device())


def rewrite(folder, change):
  """Applies `change` to the dict of the tensors of a folder."""
  (file,) = folder.glob("*.safetensors")
  save_file(change(load_file(file)), file)


@pytest.mark.parametrize("case", CASES)
def test_what_comes_back_is_what_went_out(tmp_path, case):
  params, config = write(case, tmp_path / "out")
  found = read(tmp_path / "out", params, config)
  assert_same_bits(found, params["mtp"])
  file = FILES.get(config.mtp.kind, "model.safetensors")
  names = {"config.json", "mtp_contract.json", file}
  assert {path.name for path in (tmp_path / "out").iterdir()} == names
  again = params | {"mtp": found}
  how = {"token_ids": (BEGIN, 4)}
  interop.export_params(again, config, tmp_path / "again", config.mtp.kind, **how)
  for name in names:
    first, second = tmp_path / "out" / name, tmp_path / "again" / name
    assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.parametrize("case", CASES)
def test_the_published_forward_pass_on_the_files_gives_our_logits(tmp_path, case):
  params, config = write(case, tmp_path / "drafter")
  layout, depth = CASES[case][1], config.mtp.depth
  interop.export_params(params, config, tmp_path / "trunk", layout, trunk_only=True)
  draws = np.random.default_rng(0)
  tokens = draws.integers(BEGIN + 1, common.VOCAB, (1, T + 1 + depth))
  folders = tmp_path / "trunk", tmp_path / "drafter"
  if config.mtp.kind == "medusa":
    theirs = numpy_models.medusa_logits(*folders, tokens[0, :T])
  elif config.mtp.kind == "dflash":
    theirs = numpy_models.dflash_logits(*folders, tokens[0], T)
  else:
    theirs = numpy_models.eagle_logits(*folders, tokens[0], T, depth)
  batch = common.batch_of(tokens, np.ones_like(tokens), T)
  hidden_MTD = jax.jit(MtpLm(config).apply)({"params": params}, batch)[:, 0]
  for m in range(1 + depth):
    ours = np.asarray(hidden_MTD[m] @ unembed_matrix(params, config, m))
    if m and config.mtp.draft_vocab:
      ids = draft_tokens(params, config)
      ours = vocabulary.scatter(ours, ids, common.VOCAB)
    # At the last rows a depth reads tokens after the row, here and there.
    np.testing.assert_allclose(ours, theirs[m], atol=2e-4, err_msg=f"depth {m}")


@pytest.mark.parametrize("case", ["medusa", "eagle", "eagle3", "peagle", "dflash"])
def test_precision_of_the_file_is_that_of_the_comparison(tmp_path, case):
  params, config = write(case, tmp_path / "out", dtype="bfloat16")
  found = read(tmp_path / "out", params, config)
  narrowed = jax.tree.map(
    lambda x: x.astype(jax.numpy.bfloat16).astype(np.float32), params["mtp"]
  )
  assert_same_bits(found, narrowed)


@pytest.mark.parametrize("case, name", [
  ("medusa-shared", "1.1.weight"), ("eagle", "embed_tokens.weight"),
  ("eagle3-shared", "lm_head.weight"), ("dflash", "lm_head.weight"),
])
def test_what_is_of_the_trunk_may_be_absent_but_not_differ(tmp_path, case, name):
  params, config = write(case, tmp_path / "out")

  def change(tensors):
    tensors[name][3, 2] += 1
    return tensors

  rewrite(tmp_path / "out", change)
  with pytest.raises(InteropError, match=rf"{name} must be \w+/\w+ of the trunk"):
    read(tmp_path / "out", params, config)
  rewrite(tmp_path / "out", lambda t: {k: v for k, v in t.items() if k != name})
  assert_same_bits(read(tmp_path / "out", params, config), params["mtp"])


def test_embeddings_beside_an_eagle3_drafter_must_be_the_trunks(tmp_path):
  params, config = write("eagle3", tmp_path / "out")
  table = params["embed"]["embedding"]
  rewrite(tmp_path / "out", lambda t: t | {"embed_tokens.weight": table})
  assert_same_bits(read(tmp_path / "out", params, config), params["mtp"])
  rewrite(tmp_path / "out", lambda t: t | {"embed_tokens.weight": 2 * table})
  with pytest.raises(InteropError, match=r"embed_tokens.weight must be embed/embedd"):
    read(tmp_path / "out", params, config)


@pytest.mark.parametrize("case", ["peagle", "dflash"])
def test_the_mask_is_the_embedding_of_one_token(tmp_path, case):
  params, config = write(case, tmp_path / "out")
  values = json.loads((tmp_path / "out/config.json").read_text())
  table = load_file(tmp_path / "out/model.safetensors")["embed_tokens.weight"]
  mask = params["mtp"]["mask_embedding" if case == "peagle" else "masks"].reshape(-1)
  assert values["mask_token_id"] == BEGIN
  np.testing.assert_array_equal(table[BEGIN], mask)
  others = np.arange(common.VOCAB) != BEGIN
  np.testing.assert_array_equal(table[others], params["embed"]["embedding"][others])

  def change(tensors):
    tensors["embed_tokens.weight"][BEGIN + 1] += 1
    return tensors

  rewrite(tmp_path / "out", change)
  with pytest.raises(InteropError, match=r"embed_tokens.weight must be embed/embedd"):
    read(tmp_path / "out", params, config)
  rewrite(
    tmp_path / "out",
    lambda t: {k: v for k, v in t.items() if k != "embed_tokens.weight"},
  )
  with pytest.raises(InteropError, match=r"lacks tensors: embed_tokens.weight"):
    read(tmp_path / "out", params, config)


@pytest.mark.parametrize("begin, size, expected", [
  (256, 258, 256),  # The begin of a text.
  (None, 264, 263),  # An id without a token.
  (None, 258, "tokenizer.vocab_size must be above its 258 tokens, got 258"),
])
def test_the_mask_takes_the_place_of_a_token_that_no_text_has(
  tmp_path, begin, size, expected
):
  config = config_of("peagle", {"tokenizer.vocab_size": size})
  tokenizer = ByteTokenizer()
  tokenizer.bos_id = begin
  params = common.random_params(config)
  write_it = lambda: interop.export_params(  # noqa: E731
    params, config, tmp_path / "out", "peagle", tokenizer=tokenizer
  )
  if isinstance(expected, str):
    with pytest.raises(InteropError, match=expected):
      write_it()
    assert list(tmp_path.iterdir()) == []
    return
  write_it()
  values = json.loads((tmp_path / "out/config.json").read_text())
  assert values["mask_token_id"] == expected


@pytest.mark.parametrize("case, values, words", [
  ("peagle", {"mask_token_id": 40}, "mask_token_id must be a token of the 40, got 40."),
  ("dflash", {"mask_token_id": None}, "mask_token_id must be a token .* got None."),
  ("dflash", {"block_size": 8}, "block_size must be 4 .* got 8."),
  ("peagle", {"norm_before_residual": True}, "norm_before_residual must be False .*"),
  ("eagle3", {"norm_before_residual": True}, "norm_before_residual must be False .*"),
  (
    "dflash", {"transformer_layer_config": {"num_hidden_layers": 5}},
    "num_hidden_layers must be 2 .* got 5.",
  ),
  (
    "peagle", {"transformer_layer_config": {"rope_parameters": {"rope_theta": 5e5}}},
    "rope_theta must be 10000.0 .* got 500000.0.",
  ),
  ("medusa", {"medusa_num_heads": 2}, "medusa_num_heads must be 3 .* got 2."),
  ("medusa", {"medusa_num_layers": 2}, "medusa_num_layers must be 1 .* got 2."),
  ("eagle", {"bias": False}, "bias must be True .* got False."),
  ("eagle-no-bias", {"bias": None}, "bias must be False .* got None."),
  ("eagle", {"num_hidden_layers": 2}, "num_hidden_layers must be 1 .* got 2."),
  ("eagle", {"rope_theta": 5e5}, "rope_theta must be 10000.0 .* got 500000.0."),
  ("eagle3", {"draft_vocab_size": 30}, "draft_vocab_size must be 40 .* got 30."),
  (
    "eagle3-shallow", {"eagle_aux_hidden_state_layer_ids": [1, 2, 2]},
    r"eagle_aux_hidden_state_layer_ids must be \[1, 2, 3\] .* got \[1, 2, 2\].",
  ),
])
def test_other_predictors_are_refused_by_key(tmp_path, case, values, words):
  params, config = write(case, tmp_path / "out")
  file = tmp_path / "out/config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | values))
  with pytest.raises(InteropError, match=f"config.json: {words}"):
    read(tmp_path / "out", params, config)


def test_a_reduced_vocabulary_is_offsets_and_a_mask(tmp_path):
  params, config = write("eagle3-reduced", tmp_path / "out", dtype="bfloat16")
  tensors = load_file(tmp_path / "out/model.safetensors")
  ids = params["mtp"]["draft_tokens"].astype(int)
  assert tensors["d2t"].dtype == np.int64 and tensors["t2d"].dtype == bool
  np.testing.assert_array_equal(tensors["d2t"] + np.arange(30), ids)
  np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), ids)
  assert tensors["lm_head.weight"].shape[0] == 30

  def changed(name, value, words):
    rewrite(tmp_path / "out", lambda t: tensors | {name: value(tensors[name])})
    with pytest.raises(InteropError, match=words):
      read(tmp_path / "out", params, config)

  changed("t2d", lambda x: x[::-1].copy(), "d2t and t2d must name the same tokens")
  changed("d2t", lambda x: x + 40, "d2t must name different tokens of the vocabulary")
  changed("d2t", lambda x: 0 * x - np.arange(30), "must name different tokens")
  changed("d2t", lambda x: x.astype(np.float32), "'d2t' has dtype F32; supported: I64")


def test_layers_that_are_not_stated_are_the_published_ones(tmp_path):
  for case in ("eagle3", "eagle3-shallow"):
    params, config = write(case, tmp_path / case)
    file = tmp_path / case / "config.json"
    values = json.loads(file.read_text())
    taps = values.pop("eagle_aux_hidden_state_layer_ids")
    assert taps == ([2, 4, 5] if case == "eagle3" else [1, 2, 3])
    file.write_text(json.dumps(values))
    if case == "eagle3":
      assert_same_bits(read(tmp_path / case, params, config), params["mtp"])
    else:
      with pytest.raises(InteropError, match=r"must be \[1, 2, 3\]"):
        read(tmp_path / case, params, config)


def test_vllm_is_told_of_the_biases_of_medusa_heads(tmp_path):
  write("medusa", tmp_path / "out")
  assert json.loads((tmp_path / "out/config.json").read_text())["medusa_fc_bias"]


def test_published_folders_of_heads_say_less(tmp_path):
  params, config = write("medusa-shared", tmp_path / "out")
  published = {"medusa_num_heads": 3, "medusa_num_layers": 1}
  (tmp_path / "out/config.json").write_text(json.dumps(published))
  assert_same_bits(read(tmp_path / "out", params, config), params["mtp"])


def test_folders_that_do_not_fit_are_refused(tmp_path):
  params, config = write("medusa", tmp_path / "out")
  other = common.tiny_config("linear", 3, SMALL)
  with pytest.raises(InteropError, match=r"mtp.kind must be one of .* got 'linear'"):
    read(tmp_path / "out", params, other)
  none = with_overrides(config, {"mtp.depth": 0, "mtp.unembed": "shared"})
  with pytest.raises(InteropError, match=r"be read .*: the layout holds predictors"):
    read(tmp_path / "out", params, none)
  rewrite(tmp_path / "out", lambda t: {k: v for k, v in t.items() if k[0] != "2"})
  with pytest.raises(InteropError, match=r"lacks tensors: 2.0.linear.bias, 2.0.linear"):
    read(tmp_path / "out", params, config)
  (tmp_path / "out/medusa_lm_head.safetensors").unlink()
  with pytest.raises(InteropError, match="is not a whole safetensors file"):
    read(tmp_path / "out", params, config)


@pytest.mark.parametrize("kind, layout, overrides, words", [
  ("medusa", "llama", {}, "the layout 'medusa' has the extra predictors, this one the"),
  ("eagle", "medusa", {}, "the layout holds predictors of mtp.kind 'medusa'"),
  ("sequential", "eagle", {}, "the layout holds predictors of mtp.kind 'eagle'"),
  ("eagle", "eagle", common.GPT2, "the drafter's layer is Llama's, but trunk.kind is"),
  ("eagle", "eagle", {"trunk.qk_norm": True}, "qk_norm must be False in this layout"),
  ("eagle", "eagle", {"trunk.attention_dim": 24}, "trunk.attention_dim must be trunk"),
  ("eagle", "eagle", {"trunk.rope_scaling.kind": "yarn"}, "must be 'none' or 'linear'"),
  ("eagle3", "eagle3", DEEP | {"trunk.qkv_bias": True}, "trunk.qkv_bias must be False"),
  ("peagle", "peagle", {"trunk.qk_norm": True}, "qk_norm must be False .* got True"),
  ("dflash", "dflash", {}, "trunk.qk_norm must be True in this layout, got False"),
  ("dflash", "dflash", {"trunk.qk_norm": True}, "mtp.one_mask must be True in this"),
  ("dflash", "dflash", MASKED | {"trunk.qkv_bias": True}, "qkv_bias must be False"),
  ("dflash", "dflash", common.GPT2, "layer is Qwen3's, but trunk.kind is 'gpt2'"),
])
def test_what_has_no_place_says_so(tmp_path, kind, layout, overrides, words):
  config = common.tiny_config(kind, 2, overrides)
  with pytest.raises(InteropError, match=words):
    interop.export_params({}, config, tmp_path / "out", layout)
  obstacles = interop.layouts_for(config, trunk_only=True)
  assert obstacles["medusa"] == "the layout has no trunk"
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case, order", [
  ("medusa", None), ("eagle", ["embedding", "hidden"]),
  ("eagle3", ["embedding", "hidden"]), ("peagle", ["embedding", "hidden"]),
  ("dflash", None),
])
def test_the_contract_and_config_json_say_what_a_reader_needs(tmp_path, case, order):
  _, config = write(case, tmp_path / "out", base_model="trunks/a", token_ids=(3, 4))
  stated = json.loads((tmp_path / "out/mtp_contract.json").read_text())
  assert (stated["kind"], stated["depth"]) == (case, 3)
  assert stated.get("concat_order") == order
  assert stated["unembedding_shared"] == (config.mtp.unembed == "shared")
  values = json.loads((tmp_path / "out/config.json").read_text())
  assert values["base_model_name_or_path"] == "trunks/a"
  if case in ("eagle3", "peagle", "dflash"):
    named = values["speculators_config"]
    assert named["verifier"]["name_or_path"] == "trunks/a"
    assert named["algorithm"] == values["speculators_model_type"] == case
    values = values["transformer_layer_config"]
  assert (values["bos_token_id"], values["eos_token_id"]) == (3, 4)


def test_commands_write_trunk_and_heads_and_put_them_together(command, tmp_path):
  values = {"tokenizer.vocab_size": 264, "data.seq_len": 64, "mesh.data": -1}
  config = config_of("medusa", values)
  params = common.random_params(config)
  run = save_run(tmp_path / "run", config, params)
  workdir, heads = f"--workdir={run}", tmp_path / "heads"
  listed = command("launch.export", workdir)
  assert "\nmedusa       yes\n" in listed.output
  refused = command("launch.export", workdir, "--layout=medusa", f"--output={heads}")
  assert refused.code == 2
  assert "--base_model is required with --layout=medusa." in refused.output
  trunk = tmp_path / "trunk"
  assert command(
    "launch.export", workdir, "--layout=llama", "--trunk_only", f"--output={trunk}"
  ).code == 0
  assert command(
    "launch.export", workdir, "--layout=medusa", f"--output={heads}",
    f"--base_model={trunk}",
  ).code == 0

  new = tmp_path / "new"
  arguments = (
    f"--from={trunk}", f"--drafter={heads}", f"--workdir={new}",
    "--config.mtp.kind=medusa", "--config.mtp.unembed=own", "--config.data.seq_len=64",
    "--config.tokenizer.kind=bytes", "--config.data.source=language_reference",
    "--config.eval.max_new_tokens=8", "--compilation_cache=",
  )
  refused = command("launch.import_hf", *arguments, "--config.mtp.depth=2")
  assert refused.code == 2
  assert "medusa_num_heads must be 2 for predictors of this model" in refused.output
  assert not new.exists()
  result = command("launch.import_hf", *arguments, "--config.mtp.depth=3")
  assert result.code == 0, result.output
  assert_same_bits(mtp_jax.load(new).params, params)
