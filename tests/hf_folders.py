"""Small models of every layout, and folders in which they are written."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, processors

from mtp_jax import interop
from mtp_jax.data import subword_tokenizer
from mtp_jax.sharding import make_mesh
from tests import common

# With four rotated dims, pairs to halves would be its own inverse.
LATENT = common.LATENT | {"trunk.latent.rope_dim": 6}
DEEPSEEK = LATENT | common.EXPERTS
LLAMA3 = {
  "trunk.rope_scaling.kind": "llama3",
  "trunk.rope_scaling.factor": 8.0,
  "trunk.rope_scaling.original_length": 6,
}
LINEAR = {"trunk.rope_scaling.kind": "linear", "trunk.rope_scaling.factor": 2.0}
YARN = LLAMA3 | {
  "trunk.rope_scaling.kind": "yarn",
  "trunk.rope_scaling.mscale": 0.7,
  "trunk.rope_scaling.mscale_all_dim": 1.2,
}
TIED = {"trunk.tie_embeddings": True}
DIRECT = {"trunk.latent.query_rank": 0, "trunk.moe.dense_layers": 0}
# Name -> layout, and kind, depth and overrides of a config that can be written in it.
CASES = {
  "gpt2": ("gpt2", "none", 0, common.GPT2),
  "llama": ("llama", "none", 0, LLAMA3 | TIED | {"trunk.attention_dim": 24}),
  "qwen2": ("qwen2", "none", 0, LINEAR | {"trunk.qkv_bias": True}),
  "qwen3": ("qwen3", "none", 0, YARN | {"trunk.qk_norm": True}),
  "deepseek-trunk": ("deepseek_v3", "none", 0, DEEPSEEK | YARN | DIRECT),
  "deepseek": ("deepseek_v3", "sequential", 2, DEEPSEEK),
  "deepseek-dense-tied": ("deepseek_v3", "sequential", 2, LATENT | TIED),
  "mimo": ("mimo", "sequential", 1, {"trunk.qkv_bias": True, "trunk.num_kv_heads": 1}),
  "mimo-no-biases-tied": ("mimo", "sequential", 1, TIED),
  "glm": ("glm4_moe", "sequential", 3, common.EXPERTS | {
    "trunk.qkv_bias": True, "trunk.qk_norm": True, "trunk.attention_dim": 24,
    "mtp.zero_first": True,
  }),
  "glm-dense-tied": ("glm4_moe", "sequential", 2, TIED | LINEAR | {
    "trunk.rope_fraction": 0.5, "trunk.attention_dim": 32,
  }),
}


def one_device() -> jax.sharding.Mesh:
  return make_mesh(common.tiny_config().mesh, jax.devices()[:1])


def config_of(case, overrides=None):
  """Returns the config of a case."""
  _, kind, depth, values = CASES[case]
  return common.tiny_config(kind, depth, values | (overrides or {}))


def write(case, folder, **options):
  """Writes random parameters in the layout of a case; returns them."""
  config = config_of(case)
  params = common.random_params(config)
  interop.export_params(params, config, folder, CASES[case][0], **options)
  return params


ALPHABET = [character for character, _ in sorted(
  subword_tokenizer.byte_vocab().items(), key=lambda item: item[1]
)]  # fmt: skip
BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


@dataclasses.dataclass(frozen=True)
class Published:
  """What a model folder says of its tokens, and what follows from it.

  specials: added tokens, ids from 258 on. front: the post-processor puts the first of
  them before a text. tokens: the expected (bos_id, eos_id, end_ids).
  """

  specials: tuple[str, ...]
  front: bool
  config: dict[str, Any]
  tokenizer_config: dict[str, Any] | None
  generation_config: dict[str, Any] | None
  tokens: tuple[int | None, int | None, tuple[int, ...]]


PUBLISHED = {
  # GPT-2: one special token at the end, which is begin and end, and is never put first.
  "gpt2": Published(
    ("<|endoftext|>",), False, {"bos_token_id": 258, "eos_token_id": 258},
    {"model_max_length": 1024},
    {"bos_token_id": 258, "eos_token_id": 258, "_from_model_config": True},
    (None, 258, (258,)),
  ),
  # Llama 3: a begin token through the post-processor, and several ends.
  "llama": Published(
    (BEGIN, END, "<|eom_id|>", TURN), True,
    {"bos_token_id": 258, "eos_token_id": [259, 260, 261]},
    {"bos_token": BEGIN, "eos_token": TURN, "model_max_length": 131072,
     "clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast",
     "chat_template": "{% for m in messages %}{{ m }}{% endfor %}"},
    {"bos_token_id": 258, "eos_token_id": [259, 260, 261], "do_sample": True,
     "temperature": 0.6, "top_p": 0.9},
    (258, 259, (259, 260, 261)),
  ),
  # Qwen2 tuned for chats: config.json has a begin token that nothing puts first.
  "qwen2": Published(
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), False,
    {"bos_token_id": 258, "eos_token_id": 260},
    {"add_prefix_space": False, "add_bos_token": False, "bos_token": None,
     "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
     "tokenizer_class": "Qwen2Tokenizer"},
    {"bos_token_id": 258, "eos_token_id": [260, 258], "pad_token_id": 258,
     "repetition_penalty": 1.05},
    (None, 260, (260, 258)),
  ),
  # DeepSeek-V3: tokenizer_config.json asks for the begin token.
  "deepseek_v3": Published(
    ("<begin>", "<end>"), False, {"bos_token_id": 258, "eos_token_id": 259},
    {"add_bos_token": True, "add_eos_token": False, "bos_token": {
      "__type": "AddedToken", "content": "<begin>", "lstrip": False, "normalized": True,
      "rstrip": False, "single_word": False}, "eos_token": "<end>",
     "tokenizer_class": "PreTrainedTokenizerFast"},
    None, (258, 259, (259,)),
  ),
  # A model of ids alone: nothing begins or ends a text.
  "qwen3": Published(
    (), False, {"bos_token_id": None, "eos_token_id": None},
    {"tokenizer_class": "PreTrainedTokenizerFast"}, None, (None, None, ()),
  ),
}  # fmt: skip


def write_tokenizer(name, folder, vocab_size=264):
  """Writes the files of a `PUBLISHED` folder but for weights; returns its row.

  Merges the model's keys into a config.json that is there.
  """
  row = PUBLISHED[name]
  vocab = {character: i for i, character in enumerate(ALPHABET)}
  model = hf.Tokenizer(models.BPE(
    vocab=vocab | {"th": 256, "the": 257}, merges=[("t", "h"), ("th", "e")]
  ))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  model.post_processor = processors.ByteLevel(trim_offsets=False)
  model.add_special_tokens(list(row.specials))
  if row.front:
    first = row.specials[0]
    template = processors.TemplateProcessing(
      single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1",
      special_tokens=[(first, 258)],
    )
    model.post_processor = processors.Sequence([model.post_processor, template])
  folder.mkdir(exist_ok=True, parents=True)
  model.save(str(folder / "tokenizer.json"))
  file = folder / "config.json"
  values = json.loads(file.read_text()) if file.exists() else {"model_type": name}
  values |= {"vocab_size": vocab_size} | row.config
  for key, content in {
    "config": values, "tokenizer_config": row.tokenizer_config,
    "generation_config": row.generation_config,
  }.items():
    if content is not None:
      (folder / f"{key}.json").write_text(json.dumps(content, indent=2))
  return row


def assert_same_bits(actual, expected):
  """Fails with the path of the first leaf that differs."""
  common.assert_trees_close(actual, expected, rtol=0, atol=0)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
