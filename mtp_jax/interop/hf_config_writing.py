"""config.json of exported model folders."""

import dataclasses
from pathlib import Path
from typing import Any

from mtp_jax.config import Config, MoeConfig, TrunkConfig, get_dotted
from mtp_jax.interop.hf_config import (
  EXPERT_KEYS,
  GPT2_KEYS,
  KEYS,
  LATENT_KEYS,
  ROPE_KEYS,
  ROPE_TYPES,
  ZERO_EXPERTS_KEY,
  TrunkDescription,
  read_config,
)
from mtp_jax.interop.layouts import LAYOUTS
from mtp_jax.interop.tensor_table import ZERO_EXPERTS, zero_expert_dim
from mtp_jax.predictors import num_trunk_layers

# Id that begins a text, and the id or ids that end it.
TokenIds = tuple[int | None, int | list[int] | None]
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_config(
  config: Config,
  layout: str,
  dtype: str,
  token_ids: TokenIds | None = None,
  came: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the config.json of `layout`; `layouts_for` must allow it.

  Args:
    config: of the model.
    layout: see `LAYOUTS`.
    dtype: of the tensors.
    token_ids: begin and end of a text, if known.
    came: the config.json of an imported model. Its values are kept as far as they still
      describe the model.
  """
  values = _written(config, layout, dtype, token_ids)
  if came is None:
    return values
  # An imported config.json is kept whole if it still describes the model: it may have
  # keys that have no meaning here.
  ids = {key: came[key] for key in ID_KEYS if key in came}
  described = read_config(Path("config.json"), came)
  changed = {k for k, x in described.overrides.items() if get_dotted(config, k) != x}
  key = "max_position_embeddings"
  if changed or described.family != layout:
    longest = max(values.get(key, 0), _length_that_came(described, changed))
    return values | ({key: longest} if key in values else {}) | ids
  ours = (
    "architectures", "model_type", "dtype", "torch_dtype", "num_nextn_predict_layers"
  )
  own_ids = {} if ids else {key: values[key] for key in ID_KEYS if key in values}
  # `auto_map` names code files, which are not exported.
  kept = {name: value for name, value in came.items() if name != "auto_map"}
  if described.family != "gpt2" and config.data.seq_len > described.max_length:
    kept[key] = config.data.seq_len  # Training continued with longer rows.
  return own_ids | kept | {name: values[name] for name in ours if name in values}


def _length_that_came(described: TrunkDescription, changed: set[str]) -> int:
  """Returns the folder's longest text, in tokens, as far as it is still valid.

  `changed`: keys whose values differ from the folder's. If they include the scaling of
  positions, the length before that scaling is returned.
  """
  scaling = "trunk.rope_scaling."
  kind = described.overrides[f"{scaling}kind"]
  if kind == "none" or not any(key.startswith(scaling) for key in changed):
    return described.max_length
  return described.overrides.get(f"{scaling}original_length", 0)


def _written(
  config: Config, layout: str, dtype: str, token_ids: TokenIds | None
) -> dict[str, Any]:
  # `dtype` is the key of transformers 5, `torch_dtype` of the versions before.
  architecture, model_type = LAYOUTS[layout]
  bos, eos = token_ids or (None, None)
  values = {
    "architectures": [architecture],
    "model_type": model_type,
    "dtype": dtype,
    "torch_dtype": dtype,
    "bos_token_id": bos,
    "eos_token_id": eos,
    "tie_word_embeddings": config.trunk.tie_embeddings,
    "use_cache": True,
  }
  trunk, depth = config.trunk, config.mtp.depth
  if layout == "gpt2":
    values |= write_keys(config, GPT2_KEYS)
    return values | {
      "n_inner": trunk.mlp_dim,
      "layer_norm_epsilon": trunk.norm_eps,
      "activation_function": "gelu_new",
      "attn_pdrop": 0.0,
      "embd_pdrop": 0.0,
      "resid_pdrop": 0.0,
    }
  values |= write_keys(config, KEYS) | _write_rope(trunk)
  values |= {
    "num_hidden_layers": num_trunk_layers(config),
    "num_key_value_heads": trunk.num_kv_heads,
    "rms_norm_eps": trunk.norm_eps,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": longest_text(config),
  }
  if layout == "deepseek_v3":
    return values | _write_deepseek(config)
  if layout == "glm4_moe":
    return values | _write_glm(config)
  if layout in ("llama", "qwen3", "mimo"):
    values["head_dim"] = trunk.head_dim
  if layout in ("llama", "qwen3"):
    values["attention_bias"] = False
  if layout == "llama":
    values["mlp_bias"] = False
  else:
    values["use_sliding_window"] = False
  if layout == "mimo":
    values["num_nextn_predict_layers"] = depth
  return values


def write_keys(config: Config, keys: dict[str, str]) -> dict[str, Any]:
  """Returns the values of our dotted keys, under their names in config.json."""
  return {theirs: get_dotted(config, ours) for ours, theirs in keys.items()}


def _write_deepseek(config: Config) -> dict[str, Any]:
  trunk, depth = config.trunk, config.mtp.depth
  moe = trunk.moe
  if not moe.num_experts:  # Written as one expert in a layer that does not exist.
    moe = dataclasses.replace(
      moe, num_experts=1, experts_per_token=1, num_groups=1, groups_per_token=1,
      num_shared=1, dense_layers=num_trunk_layers(config) + depth,
    )  # fmt: skip
  return write_keys(config, LATENT_KEYS) | _write_experts(config, moe) | {
    "q_lora_rank": trunk.latent.query_rank or None,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "attention_bias": False,
  }


def _write_glm(config: Config) -> dict[str, Any]:
  trunk, moe = config.trunk, config.trunk.moe
  is_dense, values = not moe.num_experts, {}
  if is_dense:  # The layout has no dense form: see `tensor_table`.
    width = zero_expert_dim(trunk)
    moe = dataclasses.replace(
      moe, num_experts=ZERO_EXPERTS, experts_per_token=1, num_groups=1,
      groups_per_token=1, expert_dim=width, num_shared=trunk.mlp_dim // width,
      dense_layers=0, route_scale=1.0,
    )  # fmt: skip
    values = {ZERO_EXPERTS_KEY: True}
  # Readers take a half for what is not stated, some here and some there.
  turning = {"partial_rotary_factor": trunk.rope_fraction}
  rope = _write_rope(trunk)
  rope["rope_parameters"] |= turning
  return values | rope | turning | _write_experts(config, moe) | {
    "head_dim": trunk.head_dim,
    "attention_bias": trunk.qkv_bias,
    "use_qk_norm": trunk.qk_norm,
  }


def _write_experts(config: Config, moe: MoeConfig) -> dict[str, Any]:
  stated = dataclasses.replace(config, trunk=dataclasses.replace(config.trunk, moe=moe))
  return write_keys(stated, EXPERT_KEYS) | {
    "first_k_dense_replace": moe.dense_layers,
    "routed_scaling_factor": moe.route_scale,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": config.mtp.depth,
  }


def _write_rope(trunk: TrunkConfig) -> dict[str, Any]:
  scaling, kind = trunk.rope_scaling, ROPE_TYPES[trunk.rope_scaling.kind]
  named = {"original_max_position_embeddings": "original_length"}
  parameters = {
    key: getattr(scaling, named.get(key, key))
    for key in ROPE_KEYS[kind]
    if key not in ("attention_factor", "truncate")
  }
  return {
    "rope_parameters": {
      "rope_theta": trunk.rope_theta, "rope_type": kind, **parameters
    },
    "rope_theta": trunk.rope_theta,
    "rope_scaling": (
      None if kind == "default" else {"rope_type": kind, "type": kind, **parameters}
    ),
  }  # fmt: skip


def longest_text(config: Config) -> int:
  """Returns the longest text, in tokens, that the positions are made for."""
  scaling = config.trunk.rope_scaling
  stretched = 0
  if scaling.kind in ("llama3", "yarn"):
    stretched = round(scaling.factor * scaling.original_length)
  return max(config.data.seq_len, stretched)
