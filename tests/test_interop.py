"""Model folders out and back in: every bit, every layout, and every refusal.

Parity with other implementations is in test_interop_parity.
"""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtp_jax import accounting, interop
from mtp_jax.config import difference, with_overrides
from mtp_jax.interop import InteropError, exporting, tensor_files
from mtp_jax.lm import deployed
from mtp_jax.sharding import logical_axes, make_mesh, tree_shardings
from tests import common
from tests.hf_folders import (
  CASES,
  DEEPSEEK,
  assert_same_bits,
  config_of,
  one_device,
  write,
)


@pytest.fixture(scope="module", autouse=True)
def shapes_are_found_once():
  with pytest.MonkeyPatch.context() as patch:
    cached = functools.cache(accounting.abstract_params)
    patch.setattr(accounting, "abstract_params", cached)
    yield


def load(folder, config=None, mesh=None):
  """Returns the parameters of a folder, and the config that its own words lead to."""
  found = interop.read_model(folder)
  if config is None:
    config = with_overrides(common.tiny_config(), found.overrides)
  return interop.load_params(found, config, mesh or one_device()), config


def all_tensors(folder):
  tensors = {}
  for file in folder.glob("*.safetensors"):
    tensors |= load_file(file)
  return tensors


def rewrite(folder, change):
  """Applies `change` to the dict of the tensors of a folder with one file."""
  file = folder / "model.safetensors"
  tensors = load_file(file)
  save_file(change(tensors) or tensors, file)


def edit_config(folder, **values):
  """Sets keys of config.json; None removes."""
  file = folder / "config.json"
  stated = json.loads(file.read_text()) | values
  file.write_text(json.dumps({k: v for k, v in stated.items() if v is not None}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Returns copies of folders, written once per case."""
  written = {}

  def copy(case, to):
    if case not in written:
      written[case] = tmp_path_factory.mktemp("written") / case
      write(case, written[case])
    shutil.copytree(written[case], to)
    return to

  return copy


# Round trips


@pytest.mark.parametrize("case", CASES)
def test_what_comes_back_is_what_went_out(tmp_path, case):
  params = write(case, tmp_path / "out")
  loaded, config = load(tmp_path / "out")
  if case == "mimo-no-biases-tied":  # The layout has biases, so now we have too.
    for block in (params["trunk"]["blocks"], params["mtp"]["modules"]["block"]):
      for name, like in (("query", 4), ("key", 2), ("value", 2)):
        shape = (*block["attention_norm"]["scale"].shape[:1], like, 4)
        block["attention"][f"{name}_bias"] = np.zeros(shape, np.float32)
  assert_same_bits(loaded, params)
  interop.export_params(loaded, config, tmp_path / "again", CASES[case][0])
  for name in ("model.safetensors", "config.json", "mtp_contract.json"):
    first, second = tmp_path / "out" / name, tmp_path / "again" / name
    assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("without", ["nothing", "rope_parameters", "rope_scaling"])
def test_config_json_says_what_the_model_is(tmp_path, folders, case, without):
  """Either of the keys for rotary settings will do."""
  folder = folders(case, tmp_path / "out")
  edit_config(folder, **{without: None})
  if without == "rope_scaling":
    edit_config(folder, rope_theta=None)
  found = interop.read_model(folder)
  described = with_overrides(common.tiny_config(), found.overrides)
  expected = config_of(case, {"trunk.qkv_bias": True} if "mimo" in case else None)
  assert difference(described, expected) == {}
  assert found.has_mtp == CASES[case][2]
  assert found.max_length == (48 if expected.trunk.rope_scaling.factor == 8 else 16)


@pytest.mark.parametrize("case", ["gpt2", "deepseek"])
def test_shards_hold_what_one_file_does(tmp_path, case):
  write(case, tmp_path / "one")
  write(case, tmp_path / "many", max_shard_bytes=3000)
  shards = list((tmp_path / "many").glob("*.safetensors"))
  index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
  assert len(shards) > 3
  assert {file.name for file in shards} == set(index["weight_map"].values())
  tensors = all_tensors(tmp_path / "one")
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
  # A shard is larger only where a single tensor is.
  assert all(
    sum(t.nbytes for t in held.values()) <= 3000 or len(held) == 1
    for held in map(load_file, shards)
  )
  assert_same_bits(all_tensors(tmp_path / "many"), tensors)
  assert_same_bits(load(tmp_path / "many")[0], load(tmp_path / "one")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
  "axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "fsdp": 2}]
)
@pytest.mark.parametrize("case", ["gpt2", "deepseek"])
def test_eight_devices_hold_what_one_does_in_the_layout_of_training(
  tmp_path, case, axes
):
  if case == "gpt2" and "expert" in axes:
    axes = {"data": 2, "tensor": 4}
  params = write(case, tmp_path / "out")
  config = config_of(case, {f"mesh.{axis}": size for axis, size in axes.items()})
  mesh = make_mesh(config.mesh, jax.devices())
  loaded, _ = load(tmp_path / "out", config, mesh)
  layout = tree_shardings(mesh, logical_axes(accounting.abstract_params(config)))
  assert jax.tree.map(lambda x: x.sharding, loaded) == layout
  assert_same_bits(loaded, params)
  interop.export_params(loaded, config, tmp_path / "again", CASES[case][0])
  assert_same_bits(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "out"))


def test_a_device_reads_only_its_own_part(tmp_path, monkeypatch):
  write("deepseek", tmp_path / "out")
  config = config_of("deepseek", {"mesh.expert": 4, "mesh.fsdp": 2})
  opened = []
  original = tensor_files.StoredTensor.open

  def counting(self):
    opened.append(self)
    return original(self)

  found = interop.read_model(tmp_path / "out")
  monkeypatch.setattr(tensor_files.StoredTensor, "open", counting)
  interop.load_params(found, config, make_mesh(config.mesh, jax.devices()))
  # Each expert is on one of four shards, of which each is split in two over `fsdp`.
  times = {t: opened.count(t) for n, t in found.tensors.items() if ".experts.1." in n}
  assert set(times.values()) == {2}


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_other_dtypes_become_float32(tmp_path, dtype):
  params = write("gpt2", tmp_path / "out")
  rewrite(tmp_path / "out", lambda t: {name: x.astype(dtype) for name, x in t.items()})
  narrowed = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
  assert_same_bits(load(tmp_path / "out")[0], narrowed)


def test_bfloat16_is_written_but_for_the_balancing_bias(tmp_path):
  params = write("deepseek", tmp_path / "out", dtype="bfloat16")
  tensors = all_tensors(tmp_path / "out")
  wide = {name for name, x in tensors.items() if x.dtype == np.float32}
  assert wide == {name for name in tensors if name.endswith("score_correction_bias")}
  assert {x.dtype for name, x in tensors.items() if name not in wide} == {
    np.dtype(jnp.bfloat16)
  }
  loaded, _ = load(tmp_path / "out")
  block, written = loaded["trunk"]["blocks"], params["trunk"]["blocks"]
  assert_same_bits(block["moe"]["bias"], written["moe"]["bias"])
  router = written["moe"]["router"].astype(jnp.bfloat16).astype(np.float32)
  assert_same_bits(block["moe"]["router"], router)


@pytest.mark.parametrize("case, layers", [
  ("deepseek", "model.layers.[34]."), ("mimo", "model.mtp_layers."),
])
def test_tuned_layers_go_back_into_the_shards_and_nothing_else_changes(
  tmp_path, case, layers
):
  original, out = tmp_path / "original", tmp_path / "out"
  write(case, original, dtype="bfloat16", max_shard_bytes=3000)
  (original / "LICENSE").write_text("theirs")
  params, config = load(original)
  tuned = params | {"mtp": jax.tree.map(lambda x: x + 1, params["mtp"])}
  written = interop.stitch(tuned, config, original, out)
  assert {x.name for x in out.iterdir()} == {x.name for x in original.iterdir()}
  for file in original.iterdir():
    if file.suffix != ".safetensors":
      assert (out / file.name).read_bytes() == file.read_bytes(), file.name
  before, after = all_tensors(original), all_tensors(out)
  assert before.keys() == after.keys()
  changed = {
    name for name, x in before.items() if x.tobytes() != after[name].tobytes()
  }
  assert changed == set(written)
  copies = "embed_tokens.weight", "shared_head.head.weight"
  assert changed == {
    name for name in before if re.match(layers, name) and not name.endswith(copies)
  }
  narrowed = jax.tree.map(
    lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), tuned["mtp"]
  )
  found = load(out)[0]["mtp"]
  if case == "deepseek":  # The bias of the router stays float32.
    for tree in (found, narrowed):
      del tree["modules"]["block"]["moe"]["bias"]
  assert_same_bits(found, narrowed)

  moved = tuned | {"final_norm": jax.tree.map(lambda x: 2 * x, params["final_norm"])}
  with pytest.raises(InteropError, match=r"model\.norm\.weight differs from the trunk"):
    interop.stitch(moved, config, original, tmp_path / "no")
  with pytest.raises(InteropError, match="is not empty"):
    interop.stitch(tuned, config, original, out)
  assert not (tmp_path / "no").exists()
  write("llama", tmp_path / "llama")
  with pytest.raises(InteropError, match="has no MTP layers that could be replaced"):
    interop.stitch(tuned, config, tmp_path / "llama", tmp_path / "no")


# What the files of others look like


def test_old_gpt2_files_have_other_names_and_masks(tmp_path):
  params = write("gpt2", tmp_path / "out")

  def age(tensors):
    tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    mask = np.ones((1, 1, 16, 16), np.float32)
    return tensors | {"h.0.attn.bias": mask, "h.0.attn.masked_bias": mask[0, 0, 0]}

  rewrite(tmp_path / "out", age)
  edit_config(tmp_path / "out", n_inner=None)
  file = tmp_path / "out" / "config.json"
  with pytest.raises(InteropError, match=r"mlp.c_fc.weight is \[16, 24\]"):
    load(tmp_path / "out")
  file.write_text(json.dumps(json.loads(file.read_text()) | {"n_inner": 24}))
  assert_same_bits(load(tmp_path / "out")[0], params)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
  write("llama", tmp_path / "out")
  rewrite(
    tmp_path / "out", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}
  )
  load(tmp_path / "out")
  rewrite(
    tmp_path / "out",
    lambda t: t | {"lm_head.weight": 2 * t["model.embed_tokens.weight"]},
  )
  with pytest.raises(InteropError, match=r"lm_head.weight must equal model.embed_tok"):
    load(tmp_path / "out")


def test_files_may_lack_the_mtp_layers_that_config_json_counts(tmp_path):
  params = write("deepseek", tmp_path / "out")
  layers = ("model.layers.3.", "model.layers.4.")
  rewrite(
    tmp_path / "out",
    lambda t: {name: x for name, x in t.items() if not name.startswith(layers)},
  )
  found = interop.read_model(tmp_path / "out")
  assert found.has_mtp == 0 and "mtp.depth" not in found.overrides
  trunk = {name: tree for name, tree in params.items() if name != "mtp"}
  # New modules are the caller's; there are none of them in the folder.
  assert_same_bits(load(tmp_path / "out", config_of("deepseek"))[0], trunk)


def test_the_copies_for_other_engines_may_be_absent_but_not_differ(tmp_path):
  params = write("deepseek", tmp_path / "out")
  name = "model.layers.4.shared_head.head.weight"
  whole = all_tensors(tmp_path / "out")
  np.testing.assert_array_equal(whole[name], whole["lm_head.weight"])
  embedding = whole["model.embed_tokens.weight"]
  np.testing.assert_array_equal(whole["model.layers.3.embed_tokens.weight"], embedding)
  rewrite(tmp_path / "out", lambda t: {k: v for k, v in t.items() if k != name})
  assert_same_bits(load(tmp_path / "out")[0], params)
  changed = whole["lm_head.weight"].copy()
  changed[7, 3] += 1
  rewrite(tmp_path / "out", lambda t: t | {name: changed})
  with pytest.raises(InteropError, match=rf"{name} must equal lm_head.weight"):
    load(tmp_path / "out")


# What is written beside the tensors


def test_the_contract_states_the_order_of_the_file(tmp_path):
  for case, order in (("deepseek", ["embedding", "hidden"]), ("mimo", None)):
    write(case, tmp_path / case)
    stated = json.loads((tmp_path / case / "mtp_contract.json").read_text())
    assert stated["concat_order"] == (order or ["hidden", "embedding"])
    assert stated["kind"] == "sequential" and stated["position_offset"] == 0
    file = tmp_path / case / "mtp_contract.json"
    file.write_text(json.dumps(stated | {"concat_order": stated["concat_order"][::-1]}))
    with pytest.raises(InteropError, match="concat_order is"):
      interop.read_model(tmp_path / case)


def test_token_ids_are_written_as_they_are_given(tmp_path):
  for i, ids in enumerate([(3, 4), (None, [4, 5])]):
    write("llama", tmp_path / f"{i}", token_ids=ids)
    stated = json.loads((tmp_path / f"{i}" / "config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"]) == ids


CAME = {
  "max_position_embeddings": 256, "eos_token_id": [3, 4], "initializer_range": 0.1,
  "auto_map": {"AutoConfig": "configuration.Model"},
}


@pytest.mark.parametrize("case", [x for x in CASES if "gpt2" not in x and x != "qwen3"])
def test_config_json_goes_out_as_it_came_in(tmp_path, folders, case):
  edit_config(folders(case, tmp_path / "came"), **CAME)
  found = interop.read_model(tmp_path / "came")
  params, config = load(tmp_path / "came")

  def out(name, config, layout=CASES[case][0], **how):
    how = how or {"model_folder": found.files}
    interop.export_params(params, config, tmp_path / name, layout, **how)
    return json.loads((tmp_path / name / "config.json").read_text())

  came = found.files["config.json"]
  assert out("again", config) == {k: x for k, x in came.items() if k != "auto_map"}
  # Another model than it describes: what our config says, but for its tokens.
  other = with_overrides(config, {"trunk.rope_theta": 777.0})
  changed = out("other", other)
  assert changed["rope_theta"] == 777.0 and changed["eos_token_id"] == [3, 4]
  # Its texts are as long as they were; those of a scaling that it has no more are not.
  assert changed["max_position_embeddings"] == 256
  scaling = config.trunk.rope_scaling
  if scaling.kind in ("llama3", "yarn"):
    plain = with_overrides(config, {"trunk.rope_scaling.kind": "none"})
    longest = max(scaling.original_length, config.data.seq_len)
    assert out("plain", plain)["max_position_embeddings"] == longest
  longer = with_overrides(config, {"data.seq_len": 512})
  assert out("longer", longer)["max_position_embeddings"] == 512


def test_a_trunk_alone_in_another_layout_keeps_its_positions_and_tokens(
  tmp_path, folders
):
  edit_config(folders("mimo", tmp_path / "came"), **CAME)
  found = interop.read_model(tmp_path / "came")
  params, config = load(tmp_path / "came")
  interop.export_params(
    params, config, tmp_path / "out", "qwen2", trunk_only=True,
    model_folder=found.files,
  )
  stated = json.loads((tmp_path / "out" / "config.json").read_text())
  assert stated["model_type"] == "qwen2" and stated["max_position_embeddings"] == 256
  assert stated["eos_token_id"] == [3, 4]


@pytest.mark.parametrize("case, key", [
  ("mimo", "attention_bias"), ("qwen2", "attention_bias"), ("qwen2", "mlp_bias"),
  ("qwen3", "mlp_bias"), ("deepseek", "mlp_bias"), ("llama", "use_sliding_window"),
])
def test_keys_that_decide_nothing_for_a_family_may_be_anything(
  tmp_path, folders, case, key
):
  folder = folders(case, tmp_path / "out")
  for value in (True, False):
    edit_config(folder, **{key: value})
    assert interop.read_model(folder).overrides["trunk.qkv_bias"] == (
      case in ("qwen2", "mimo")
    )


@pytest.mark.parametrize("case", ["llama", "qwen3", "deepseek"])
def test_biases_that_a_family_has_by_choice_are_refused(tmp_path, folders, case):
  folder = folders(case, tmp_path / "out")
  edit_config(folder, attention_bias=True)
  with pytest.raises(InteropError, match="attention_bias is True; supported: False"):
    interop.read_model(folder)


@pytest.mark.parametrize("kind, depth", common.KINDS)
def test_the_trunk_of_any_kind_can_be_written_alone(tmp_path, kind, depth):
  config = common.tiny_config(kind, depth)
  params = common.random_params(config)
  interop.export_params(params, config, tmp_path / "out", "llama", trunk_only=True)
  loaded, found = load(tmp_path / "out")
  expected, expected_config = deployed(params, config)
  assert_same_bits(loaded, expected)
  assert found.trunk == expected_config.trunk
  contract = json.loads((tmp_path / "out" / "mtp_contract.json").read_text())
  assert contract == {"kind": "none", "depth": 0}


LAYOUTS = (
  "gpt2", "llama", "qwen2", "qwen3", "deepseek_v3", "mimo", "glm4_moe",
  *interop.DRAFTERS,
)


@pytest.mark.parametrize(
  "kind, depth, overrides, possible, with_trunk_only",
  [
    ("none", 0, {}, "llama glm4_moe", "llama glm4_moe"),
    ("sequential", 1, {}, "mimo glm4_moe", "llama glm4_moe"),
    ("sequential", 2, {}, "glm4_moe", "llama glm4_moe"),
    ("linear", 1, {}, "", "llama glm4_moe"),
    ("parallel", 1, {}, "", "llama glm4_moe"),
    ("parallel", 1, {"mtp.markov_rank": 6}, "", "llama glm4_moe"),
    ("peagle", 1, {"trunk.num_layers": 8}, "peagle", "llama glm4_moe"),
    ("peagle", 1, {"trunk.qk_norm": True}, "", "qwen3 glm4_moe"),
    ("dflash", 1, {}, "", "llama glm4_moe"),
    ("dflash", 1, {"mtp.one_mask": True}, "", "llama glm4_moe"),
    (
      "dflash", 1, {"mtp.one_mask": True, "trunk.qk_norm": True}, "dflash",
      "qwen3 glm4_moe",
    ),
    ("top", 1, {"mtp.unembed": "own"}, "", "llama glm4_moe"),
    ("medusa", 1, {}, "medusa", "llama glm4_moe"),
    ("medusa", 1, common.GPT2, "medusa", "gpt2"),
    ("medusa", 1, {"mtp.markov_rank": 6}, "", "llama glm4_moe"),
    ("eagle", 1, {}, "eagle", "llama glm4_moe"),
    ("eagle3", 1, {}, "eagle3", "llama glm4_moe"),
    ("eagle3", 1, {"mtp.fc_norm": True}, "", "llama glm4_moe"),
    ("eagle3", 1, {"mtp.norm_output": True}, "", "llama glm4_moe"),
    ("sequential", 1, common.GPT2, "", "gpt2"),
    ("sequential", 1, {"trunk.qkv_bias": True}, "mimo glm4_moe", "qwen2 glm4_moe"),
    ("sequential", 1, {"trunk.qk_norm": True}, "glm4_moe", "qwen3 glm4_moe"),
    (
      "none", 0, {"trunk.qkv_bias": True, "trunk.qk_norm": True}, "glm4_moe",
      "glm4_moe",
    ),
    ("sequential", 2, {"trunk.rope_fraction": 0.5}, "glm4_moe", "glm4_moe"),
    ("eagle", 1, {"trunk.rope_fraction": 0.5}, "", "glm4_moe"),
    ("sequential", 3, DEEPSEEK, "deepseek_v3", "deepseek_v3"),
    ("parallel", 1, DEEPSEEK, "", "deepseek_v3"),
    ("sequential", 1, DEEPSEEK | {"mtp.dense_blocks": True}, "", "deepseek_v3"),
    ("sequential", 2, DEEPSEEK | common.INPUTS["trunk"], "", "deepseek_v3"),
    ("sequential", 1, common.INPUTS["before"], "", "llama glm4_moe"),
    ("sequential", 1, common.INPUTS["own"], "", "llama glm4_moe"),
    ("sequential", 1, common.MINIMAL, "", "llama glm4_moe"),
    ("sequential", 2, DEEPSEEK | common.INPUTS["bare"], "", "deepseek_v3"),
    # As the trunk's.
    ("sequential", 1, {"mtp.norm": "rms"}, "mimo glm4_moe", "llama glm4_moe"),
    ("sequential", 1, common.GPT2 | {"mtp.norm": "rms"}, "", "gpt2"),
    ("none", 0, DEEPSEEK | {"trunk.moe.num_shared": 0}, "", ""),
    ("sequential", 2, {"trunk.moe.num_experts": 8}, "glm4_moe", "glm4_moe"),
    ("none", 0, common.EXPERTS | {"trunk.moe.num_shared": 0}, "", ""),
    (
      "none", 0, {"trunk.attention_dim": 8, "trunk.qkv_bias": True}, "glm4_moe",
      "glm4_moe",
    ),
    ("none", 0, common.GPT2 | {"trunk.attention_dim": 8}, "", ""),
    (
      "none", 0, {"trunk.rope_scaling.kind": "yarn"}, "llama glm4_moe",
      "llama glm4_moe",
    ),
    (
      "none", 0, {"trunk.rope_scaling.kind": "yarn", "trunk.rope_scaling.mscale": 0.5},
      "", "",
    ),
    (
      "none", 0, {"trunk.num_heads": 3, "trunk.num_kv_heads": 3,
      "trunk.attention_dim": 24}, "glm4_moe", "glm4_moe",
    ),
  ],
)  # fmt: skip
def test_layouts_of_a_config(kind, depth, overrides, possible, with_trunk_only):
  config = common.tiny_config(kind, depth, overrides)
  for trunk_only, expected in ((False, possible), (True, with_trunk_only)):
    obstacles = interop.layouts_for(config, trunk_only)
    assert tuple(obstacles) == LAYOUTS
    found = [layout for layout, obstacle in obstacles.items() if not obstacle]
    assert found == expected.split()


@pytest.mark.parametrize("name, obstacle", [
  ("shifted", "mtp.hidden must be 'chained' in this layout, got 'trunk_shifted'"),
  ("bare", "mtp.out_norm must be 'own' in this layout, got 'none'"),
])
def test_a_refused_layout_names_what_modules_start_from_and_end_in(name, obstacle):
  config = common.tiny_config("sequential", 1, common.INPUTS[name])
  assert interop.layouts_for(config)["mimo"] == obstacle


# Refusals: of what is written ...


@pytest.mark.parametrize(
  "kind, depth, overrides, layout, words",
  [
    ("parallel", 1, {}, "llama", "only mtp-jax generate runs parallel heads"),
    ("peagle", 1, {}, "llama", "the layout 'peagle' has .* Possible: peagle"),
    ("dflash", 1, {}, "llama", "the layout 'dflash' has .* Possible: none"),
    ("top", 1, {"mtp.unembed": "own"}, "llama", "prediction drafts nothing"),
    ("linear", 1, {}, "llama", "medusa or eagle3 predictors trained on that trunk"),
    ("medusa", 1, {}, "llama", "the trunk alone. Possible: medusa"),
    ("eagle3", 1, {}, "llama", "the layout 'eagle3' has .* Possible: eagle3"),
    ("sequential", 1, {}, "llama", "no place for MTP modules.*Possible: mimo, glm4"),
    ("sequential", 2, {}, "mimo", "exactly one sequential module.*Possible: glm4_moe"),
    ("none", 0, {}, "gpt2", "the trunk is of kind 'llama'"),
    ("none", 0, {}, "qwen3", "trunk.qk_norm must be False and True in this layout"),
    ("none", 0, {"trunk.moe.num_experts": 8}, "llama", "experts exist in the layouts"),
    ("none", 0, {}, "deepseek_v3", "this layout has latent attention"),
    ("none", 0, {}, "mistral", "layout must be one of 'gpt2', .*got 'mistral'"),
  ],
)
def test_what_has_no_portable_target_says_so(
  tmp_path, kind, depth, overrides, layout, words
):
  config = common.tiny_config(kind, depth, overrides)
  with pytest.raises(InteropError, match=words):
    interop.export_params({}, config, tmp_path / "out", layout)
  assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(tmp_path):
  (tmp_path / "out").mkdir()
  write("llama", tmp_path / "out")
  with pytest.raises(InteropError, match="is not empty"):
    write("llama", tmp_path / "out")
  with pytest.raises(InteropError, match="does not exist"):
    write("llama", tmp_path / "missing" / "out")
  with pytest.raises(InteropError, match="is a file"):
    write("llama", tmp_path / "out" / "config.json")
  with pytest.raises(InteropError, match="float32 or bfloat16, got 'int8'"):
    write("llama", tmp_path / "new", dtype="int8")
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parameters_of_another_config_are_refused(tmp_path):
  config = config_of("llama")
  params = common.random_params(config)
  params["trunk"]["blocks"]["mlp"]["up"] = np.zeros((3, 16, 25), np.float32)
  with pytest.raises(InteropError, match=r"up' has shape \[3, 16, 25\].*\[3, 16, 24\]"):
    interop.export_params(params, config, tmp_path / "out", "llama")
  del params["trunk"]["blocks"]["mlp"]["up"]
  with pytest.raises(InteropError, match="lacks 'trunk/blocks/mlp/up'"):
    interop.export_params(params, config, tmp_path / "out", "llama")
  assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
  def fail(file, value):
    assert (file.parent / "model.safetensors").exists()
    raise OSError("no space left")

  monkeypatch.setattr(exporting, "write_json", fail)
  with pytest.raises(OSError, match="no space left"):
    write("llama", tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


# ... and of what is read


ROPE = {"rope_theta": 1e4}


@pytest.mark.parametrize(
  "case, values, words",
  [
    ("llama", {"architectures": ["MistralForCausalLM"]},
     r"architectures is \['MistralForCausalLM'\]; supported: GPT2LMHeadModel, Llama"),
    ("llama", {"architectures": None, "model_type": "gemma2"},
     "model_type is 'gemma2'; supported: gpt2, llama, qwen2"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    ("llama", {"attention_bias": True}, "attention_bias is True; supported: False"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"hidden_size": "16"}, "hidden_size is '16'; supported: int"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("glm", {"rope_parameters": ROPE | {"partial_rotary_factor": 1.5}},
     "rope_parameters.partial_rotary_factor is 1.5; supported: more than 0"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}},
     "quantization_config is {'quant_method': 'fp8'}; supported: None"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]},
     "layer_types is .*sliding_attention.*supported: 'full_attention' for every"),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}},
     "rope_parameters.rope_type is 'dynamic'; supported: default, linear, llama3, ya"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}},
     "rope_scaling.type is 'longrope'"),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}},
     "rope_parameters.factor is missing"),
    ("llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
     "rope_parameters.partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": ROPE | {"mrope_section": [2, 2]}},
     "rope_parameters.mrope_section is .*supported: for kind 'default': nothing"),
    ("qwen3", {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2.0,
      "attention_factor": 3.0}}, "attention_factor is 3.0; supported: .*1.069"),
    ("qwen3", {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2.0,
      "truncate": False}}, "truncate is False"),
    ("deepseek", {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2.0,
      "mscale_all_dim": 1.0}}, "rope_parameters.mscale is None"),
    ("deepseek", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("deepseek", {"topk_method": "group_limited_greedy"}, "topk_method is"),
    ("deepseek", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("deepseek", {"rope_interleave": False}, "rope_interleave is False"),
    ("deepseek", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
    ("deepseek", {"n_shared_experts": 0}, "n_shared_experts is 0"),
    ("deepseek", {"num_nextn_predict_layers": 1},
     "is 1, but the files have MTP layers model.layers.3, model.layers.4"),
    ("mimo", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True"),
  ],
)  # fmt: skip
def test_other_models_are_refused_by_key(tmp_path, folders, case, values, words):
  folder = folders(case, tmp_path / "out")
  edit_config(folder, **values)
  with pytest.raises(InteropError, match=f"config.json: .*{words}"):
    interop.read_model(folder)


def drop(name):
  return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def put(name, shape):
  return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
  "case, change, words",
  [
    ("llama", drop("model.norm.weight"), "lacks tensors: model.norm.weight"),
    ("llama", put("model.layers.3.mlp.up_proj.weight", (24, 16)),
     "has unknown tensors: model.layers.3.mlp.up_proj.weight"),
    ("llama", put("model.layers.1.mlp.up_proj.weight", (16, 24)),
     r"layers.1.mlp.up_proj.weight is \[16, 24\], expected \[24, 16\]"),
    ("qwen2", drop("lm_head.weight"), "lacks tensors: lm_head.weight"),
    ("deepseek", drop("model.layers.2.mlp.experts.7.down_proj.weight"),
     "lacks tensors: model.layers.2.mlp.experts.7.down_proj.weight"),
    ("deepseek", drop("model.layers.4.eh_proj.weight"), "layers.4.eh_proj.weight"),
    ("mimo", put("model.mtp_layers.0.input_proj.weight", (16, 16)),
     r"input_proj.weight is \[16, 16\], expected \[16, 32\]"),
    ("llama", lambda t: t | {"model.norm.weight": np.zeros(16, np.int8)},
     "'model.norm.weight' has dtype I8; supported: F32, F16, BF16, F64"),
  ],
)  # fmt: skip
def test_tensors_are_refused_by_name_before_they_are_read(
  tmp_path, folders, monkeypatch, case, change, words
):
  folder = folders(case, tmp_path / "out")
  rewrite(folder, change)
  monkeypatch.setattr(tensor_files.StoredTensor, "open", None)
  with pytest.raises(InteropError, match=words):
    load(folder)


def test_damaged_files_are_refused(tmp_path, folders):
  folder = folders("llama", tmp_path / "out")
  file = folder / "model.safetensors"
  whole = file.read_bytes()
  for content in (whole[:-4], whole[:20], b"", b"version https://git-lfs.github.com"):
    file.write_bytes(content)
    with pytest.raises(InteropError, match="is not a whole safetensors file"):
      interop.read_model(folder)
  file.unlink()
  with pytest.raises(InteropError, match=r"neither model.safetensors nor"):
    interop.read_model(folder)
  (folder / "config.json").write_text("{")
  with pytest.raises(InteropError, match=r"config.json cannot be read"):
    interop.read_model(folder)
  (folder / "config.json").write_text("[]")
  with pytest.raises(InteropError, match="must hold an object, got list"):
    interop.read_model(folder)
  with pytest.raises(InteropError, match=r"config.json cannot be read"):
    interop.read_model(tmp_path / "nowhere")


def test_an_index_that_is_wrong_is_refused(tmp_path):
  write("llama", tmp_path / "out", max_shard_bytes=9000)
  file = tmp_path / "out" / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  name, shard = next(iter(index["weight_map"].items()))

  def refused(weight_map, words):
    file.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InteropError, match=words):
      interop.read_model(tmp_path / "out")

  right = index["weight_map"]
  other = next(s for s in right.values() if s != shard)
  refused({}, "weight_map must name the file of every tensor")
  refused(right | {name: "model-9.safetensors"}, "names the file 'model-9.safetensors'")
  refused(right | {name: f"../out/{shard}"}, r"names the file '../out/")
  refused(right | {name: other}, f"has {name!r} in {other!r}, but it is in {shard!r}")
  refused(right | {"more": shard}, "have a tensor 'more' that the files lack")
  refused({k: v for k, v in right.items() if k != name}, f"a tensor {name!r} that")
  (tmp_path / "out" / shard).unlink()
  refused(right, f"names the file {shard!r}, which is not in")


@pytest.mark.parametrize(
  "case, kind, depth, overrides, words",
  [
    ("llama", "none", 0, {"trunk.norm_eps": 0.1}, "trunk.norm_eps must be 1e-06"),
    ("llama", "none", 0, {"trunk.num_layers": 2}, "trunk.num_layers must be 3"),
    ("llama", "parallel", 1, {}, "leave a trunk of 2 layers.*with mtp.kind 'none'"),
    ("deepseek", "sequential", 1, {}, "has 2 MTP layer.*got mtp.depth 1"),
    ("deepseek", "sequential", 2, {"mtp.dense_blocks": True}, "dense_blocks True"),
    (
      "deepseek", "sequential", 2, {"mtp.fed": "none"},
      "has MTP layers, and mtp.fed must be 'true' in this layout, got 'none'",
    ),
    (
      "deepseek", "sequential", 2, common.INPUTS["bare"],
      "has MTP layers, and mtp.out_norm must be 'own' in this layout, got 'none'",
    ),
  ],
)
def test_a_config_of_another_model_is_refused(
  tmp_path, folders, case, kind, depth, overrides, words
):
  folder = folders(case, tmp_path / "out")
  config = common.tiny_config(kind, depth, CASES[case][3] | overrides)
  with pytest.raises(InteropError, match=words):
    load(folder, config)


def test_a_longer_context_is_allowed(tmp_path, folders):
  folder = folders("qwen3", tmp_path / "out")
  stretched = {"trunk.rope_scaling.factor": 16.0, "trunk.rope_theta": 1e6}
  load(folder, config_of("qwen3", stretched))


def test_learned_positions_are_cut_to_the_rows(tmp_path, folders):
  folder = folders("gpt2", tmp_path / "out")
  params, config = load(folder, config_of("gpt2", {"data.seq_len": 6}))
  expected = common.random_params(config_of("gpt2"))
  whole_PD = expected["position_embed"]["embedding"]
  assert whole_PD.shape == (16, 16)
  expected["position_embed"]["embedding"] = whole_PD[:6]
  assert_same_bits(params, expected)
  interop.export_params(params, config, tmp_path / "again", "gpt2")
  assert json.loads((tmp_path / "again/config.json").read_text())["n_positions"] == 6
  assert_same_bits(load(tmp_path / "again")[0], expected)
  with pytest.raises(InteropError, match=r"wpe.weight is \[16, 16\], expected \[20, 1"):
    load(folder, config_of("gpt2", {"data.seq_len": 20}))


@pytest.mark.parametrize("kind, depth", [("none", 0), ("linear", 1)])
def test_the_trunk_is_loaded_without_modules_that_are_not_wanted(
  tmp_path, folders, kind, depth
):
  folder = folders("deepseek", tmp_path / "out")
  params, _ = load(folder, common.tiny_config(kind, depth, DEEPSEEK))
  expected = common.random_params(config_of("deepseek"))
  del expected["mtp"]
  assert_same_bits(params, expected)
