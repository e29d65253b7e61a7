"""Model folders made to hurt: each gets one message with key, rule and value, soon."""

import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtp_jax import interop
from mtp_jax.config import with_overrides
from mtp_jax.data.sources import DataError
from mtp_jax.data.tokenizers import load_tokenizer
from tests import common
from tests.hf_folders import one_device, write, write_tokenizer

DEEP = "[" * 100_000 + "]" * 100_000
ROPE = {"rope_theta": 1e4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("written")
  for case in ("gpt2", "llama", "qwen3", "deepseek", "mimo"):
    write(case, folder / case, max_shard_bytes=9000)
  return folder


@pytest.fixture
def copy(folders, tmp_path):
  """Returns a function that copies a folder by links; what is changed is replaced."""

  def copied(case):
    target = tmp_path / case
    target.mkdir()
    for file in (folders / case).iterdir():
      (target / file.name).symlink_to(file)  # As the cache of the hub has them.
    return target

  return copied


def refused(folder, words, read=interop.read_model, error=interop.InteropError):
  """Checks that a folder is refused in these words, shortly and at once."""
  start = time.process_time()
  with pytest.raises(error, match=words) as found:
    read(folder)
  assert time.process_time() - start < 1
  message = str(found.value)
  assert len(message) < 1000 and len(message.splitlines()) == 1, message


def replace(file, content):
  file.unlink(missing_ok=True)
  file.write_text(content)


def test_links_are_followed(copy):
  found = interop.read_model(copy("deepseek"))
  config = with_overrides(common.tiny_config(), found.overrides)
  interop.load_params(found, config, one_device())


SIZES = {
  "gpt2": ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
  "llama": (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
  ),
  "deepseek": (
    "vocab_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "n_shared_experts", "n_group", "topk_group", "num_hidden_layers",
  ),
}


@pytest.mark.parametrize(
  "case, key", [(case, key) for case, keys in SIZES.items() for key in keys]
)
def test_absurd_sizes(copy, case, key):
  folder = copy(case)
  file = folder / "config.json"
  values = json.loads(file.read_text())
  for value in ("-1", "0", "1000000000", str(10**30), "9" * 5000, "1e400", "NaN",
                "-Infinity", "true", '"8"', "[8]", "{}", "8.0", DEEP[:20] + DEEP[-20:]):
    text = json.dumps(values | {key: "HERE"}).replace('"HERE"', value)
    replace(file, text)
    refused(folder, rf"config.json: .*\b{key}")


@pytest.mark.parametrize("case, values", [
  ("gpt2", {"layer_norm_epsilon": "1e400"}),
  ("gpt2", {"layer_norm_epsilon": "1" + "0" * 400}),
  ("gpt2", {"layer_norm_epsilon": "NaN"}),
  ("llama", {"rms_norm_eps": "-1"}),
  ("llama", {"rms_norm_eps": '"small"'}),
  ("llama", {"rms_norm_eps": "true"}),
  ("llama", {"max_position_embeddings": "0"}),
  ("llama", {"max_position_embeddings": str(10**30)}),
  ("llama", {"tie_word_embeddings": "1"}),
  ("llama", {"tie_word_embeddings": '"no"'}),
  ("llama", {"layer_types": '"full_attention"'}),
  ("llama", {"architectures": "7"}),
  ("llama", {"architectures": "[]"}),
  ("llama", {"architectures": '[["LlamaForCausalLM"]]'}),
  ("llama", {"architectures": '["' + "x" * 5000 + '"]'}),
  ("llama", {"hidden_act": '{"name": "silu"}'}),
  ("llama", {"rope_parameters": "[1]"}),
  ("deepseek", {"q_lora_rank": "-3"}),
  ("deepseek", {"first_k_dense_replace": str(10**30)}),
  ("deepseek", {"routed_scaling_factor": "Infinity"}),
  ("deepseek", {"num_nextn_predict_layers": "1000000000"}),
  ("mimo", {"num_nextn_predict_layers": "-1"}),
  ("mimo", {"num_nextn_predict_layers": "1e300"}),
])  # fmt: skip
def test_absurd_values(copy, case, values):
  folder = copy(case)
  file = folder / "config.json"
  (key,), (value,) = values.keys(), values.values()
  text = json.dumps(json.loads(file.read_text()) | {key: "HERE"})
  replace(file, text.replace('"HERE"', value))
  refused(folder, rf"config.json: {key}")


@pytest.mark.parametrize("key, value", [
  ("rope_theta", "1e400"), ("rope_theta", "-5"), ("rope_theta", "true"),
  ("factor", "NaN"), ("factor", '"2"'), ("original_max_position_embeddings", "0"),
  ("original_max_position_embeddings", str(10**30)), ("beta_fast", "Infinity"),
  ("mscale", "-7"), ("rope_type", "7"), ("rope_type", '"' + "y" * 5000 + '"'),
  ("truncate", "3"),
])
def test_absurd_rotary_settings(copy, key, value):
  folder = copy("qwen3")
  file = folder / "config.json"
  values = json.loads(file.read_text())
  values["rope_parameters"] = ROPE | {"rope_type": "yarn", "factor": 2.0, key: "HERE"}
  replace(file, json.dumps(values).replace('"HERE"', value))
  refused(folder, rf"config.json: rope_parameters.{key}")


@pytest.mark.parametrize("content, words", [
  (DEEP, "nested too deeply"),
  ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
  ("[]", "must hold an object, got list"),
  ("null", "must hold an object"),
  ("{" + " " * (64 << 20) + "}", "must have at most 67108864 bytes"),
  ('{"n_layer": ', "config.json cannot be read"),
  ('{"n_layer": ' + "-" * 5000, "config.json cannot be read"),
  ("\ufeff{}", "config.json cannot be read"),
])  # fmt: skip
def test_json_that_is_none(copy, content, words):
  folder = copy("gpt2")
  for name in ("config.json", "model.safetensors.index.json"):
    if name == "config.json":
      replace(folder / name, content)
      refused(folder, words)
      replace(folder / name, "{}")
      refused(folder, "config.json: model_type is None; supported: gpt2")
  folder.joinpath("config.json").unlink()
  folder.joinpath("config.json").symlink_to(folder / "config.json")  # Round and round.
  refused(folder, "config.json cannot be read")
  folder.joinpath("config.json").unlink()
  os.mkfifo(folder / "config.json")  # To read it would wait for ever.
  refused(folder, "config.json cannot be read: it is no file")


@pytest.mark.parametrize("name", [
  "x" * 5000, "../gpt2/model-00001-of-00002.safetensors", "/etc/passwd", "..", ".", "",
  "a/b", "a\0b", "nowhere.safetensors", "config.json/..",
])
def test_shards_that_are_none_of_the_folder(copy, name):
  folder = copy("gpt2")
  file = folder / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  first = next(iter(index["weight_map"]))
  index["weight_map"][first] = name
  replace(file, json.dumps(index))
  refused(folder, "index.json names the file .* which is not in ")


@pytest.mark.parametrize("index", [
  {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a" * 5000: 3}},
  {"weight_map": {"a": None}}, {"weight_map": {"a": ["b"]}}, {"weight_map": "x"},
])
def test_an_index_of_other_things(copy, index):
  folder = copy("gpt2")
  replace(folder / "model.safetensors.index.json", json.dumps(index))
  refused(folder, "weight_map must name|index.json names the file")


def test_shards_that_are_no_files(copy):
  folder = copy("gpt2")
  shard = sorted(folder.glob("*.safetensors"))[0]
  header = shard.read_bytes()
  for content in (
    b"", b"\xff" * 8, b"\x08" + b"\0" * 7 + b"{}", header[:9],
    header[: len(header) // 2], (1 << 62).to_bytes(8, "little") + b"{}",
    len(DEEP).to_bytes(8, "little") + DEEP.encode(),
  ):
    shard.unlink()
    shard.write_bytes(content)
    refused(folder, f"{shard.name} is not a whole safetensors file")
  shard.unlink()
  shard.mkdir()
  refused(folder, "names the file .* which is not in")
  shard.rmdir()
  os.mkfifo(shard)
  refused(folder, "names the file .* which is not in")
  shard.unlink()
  refused(folder, "names the file .* which is not in")


def test_values_that_are_not_finite_are_named(copy):
  folder = copy("deepseek")
  config = with_overrides(
    common.tiny_config(), interop.read_model(folder).overrides
  )
  name, other = "model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"
  shards = {file: load_file(file) for file in folder.glob("*.safetensors")}
  for wanted, value in ((name, np.nan), (other, np.inf)):
    (shard,) = (file for file, tensors in shards.items() if wanted in tensors)
    shards[shard][wanted].reshape(-1)[2] = value
    shard.unlink()
    save_file(shards[shard], shard)
  with pytest.warns(UserWarning) as found:
    interop.load_params(interop.read_model(folder), config, one_device())
  messages = sorted(str(x.message) for x in found)
  assert len(messages) == 2
  assert all(x.endswith(" has values that are not finite.") for x in messages)
  assert any(f": {name} " in x for x in messages)
  assert any(f": {other} " in x for x in messages)


@pytest.mark.parametrize("name, content, words", [
  ("generation_config.json", DEEP, "nested too deeply"),
  ("tokenizer_config.json", "[]", "must hold an object"),
  ("special_tokens_map.json", '{"a": ', "cannot be read"),
  ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id must be null, a"),
  ("config.json", '{"model_type": "gpt2", "eos_token_id": [[1]]}', "eos_token_id must"),
  ("tokenizer.json", DEEP, "must hold a Hugging Face tokenizer"),
  ("tokenizer.json", '{"model": 3}', "must hold a Hugging Face tokenizer"),
])
def test_files_of_a_tokenizer(tmp_path, name, content, words):
  write_tokenizer("gpt2", tmp_path)
  (tmp_path / name).write_text(content)
  refused(tmp_path / "tokenizer.json", words, load_tokenizer, DataError)


def test_ids_without_end(tmp_path):
  write_tokenizer("gpt2", tmp_path)
  file = tmp_path / "tokenizer.json"
  values = json.loads(file.read_text())
  values["model"]["vocab"]["zz"] = 4_000_000_000
  file.write_text(json.dumps(values))
  refused(file, "must have token ids below 4194304", load_tokenizer, DataError)


@pytest.mark.parametrize("section, values", [
  ("model", {"continuing_subword_prefix": "########"}),
  ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
  ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
  ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
  ("post_processor", {
    "type": "TemplateProcessing", "pair": [], "special_tokens": {},
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
  }),
  ("model", {"type": "Unigram", "unk_id": None, "vocab": []}),
])  # fmt: skip
def test_tokenizers_on_which_the_library_panics(tmp_path, section, values):
  """It raises what is no Exception: a panic of the language that it is written in."""
  write_tokenizer("gpt2", tmp_path)
  file = tmp_path / "tokenizer.json"
  content = json.loads(file.read_text())
  content[section] = (content[section] or {}) | values
  file.write_text(json.dumps(content))
  refused(file, "must ", load_tokenizer, DataError)
