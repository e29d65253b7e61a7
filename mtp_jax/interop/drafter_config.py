"""Folders that hold extra predictors alone, beside one with the trunk.

A layout is called like the `mtp.kind` whose predictors it holds: `medusa` is that of
FasterDecoding/Medusa, `eagle` and `eagle3` are those of SafeAILab/EAGLE, with the layer
of Llama. An EAGLE drafter of the trunk's whole vocabulary, the only one that is read or
written, has no `d2t` and `t2d`.
"""

from pathlib import Path
from typing import Any

from mtp_jax.config import Config
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.hf_config import (
  DRAFTERS,
  KEYS,
  TokenIds,
  longest_text,
  model_layouts_for,
  write_keys,
)
from mtp_jax.predictors import num_trunk_layers, predictor_trunk, tapped_layers

# What must be the same on both sides where config.json states it ...
_STATED = (
  "medusa_num_heads", "medusa_num_layers", "hidden_size", "intermediate_size",
  "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
  "draft_vocab_size",
)
# ... and what it is where config.json does not.
_DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "rope_scaling": None,
  "bias": True,
  "qkv_bias": False,
}


def layouts_for(config: Config, trunk_only: bool = False) -> dict[str, str]:
  """Returns for every layout why `config` cannot be written in it; "" where it can.

  `trunk_only`: without the extra predictors, as `export_params` takes it.
  """
  return model_layouts_for(config, trunk_only) | {
    layout: "it has no trunk" if trunk_only else drafter_obstacle(config, layout)
    for layout in DRAFTERS
  }


def drafter_obstacle(config: Config, layout: str) -> str:
  """Returns why the predictors cannot be written in a layout; "" where they can."""
  if config.mtp.kind != layout or not config.mtp.depth:
    return f"it has predictors of mtp.kind {layout!r}, at least one"
  return "" if layout == "medusa" else _eagle_obstacle(config)


def _eagle_obstacle(config: Config) -> str:
  trunk, layers = config.trunk, num_trunk_layers(config)
  if trunk.kind != "llama":
    return f"its layer is Llama's, and the trunk is of kind {trunk.kind!r}"
  if trunk.qk_norm:
    return "trunk.qk_norm must be False there"
  if trunk.rope_scaling.kind not in ("none", "linear"):
    return "trunk.rope_scaling.kind must be 'none' or 'linear' there"
  if config.mtp.kind == "eagle":
    if trunk.num_heads * trunk.head_dim != trunk.embed_dim:
      return "trunk.attention_dim must be trunk.embed_dim there"
    return ""
  if trunk.qkv_bias:
    return "trunk.qkv_bias must be False there"
  if config.mtp.draft_vocab:
    return "mtp.draft_vocab must be 0: its tensors d2t and t2d are not written"
  if tapped_layers(config) != (2, layers // 2, layers - 3):
    return (
      "the streams are those after layers 2, L/2 and L - 3 there, and a trunk of "
      f"{layers} layers gives {', '.join(map(str, tapped_layers(config)))}"
    )
  return ""


def write_drafter_config(
  config: Config,
  dtype: str,
  token_ids: TokenIds | None = None,
  base_model: str = "",
) -> dict[str, Any]:
  """Returns the config.json of predictors alone.

  `token_ids`: of the tokens that begin and end a text. `base_model`: folder or name of
  the trunk.
  """
  kind, trunk = config.mtp.kind, config.trunk
  bos, eos = token_ids or (None, None)
  values = {
    "base_model_name_or_path": base_model,
    "torch_dtype": dtype,
    "bos_token_id": bos,
    "eos_token_id": eos,
  }
  if kind == "medusa":
    return values | {
      "model_type": "medusa",
      "hidden_size": trunk.embed_dim,
      "vocab_size": config.tokenizer.vocab_size,
      "medusa_num_heads": config.mtp.depth,
      "medusa_num_layers": 1,
    }
  scaling = trunk.rope_scaling
  is_linear = scaling.kind == "linear"
  values |= write_keys(config, KEYS) | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "intermediate_size": predictor_trunk(trunk, config.mtp).mlp_dim,
    "num_hidden_layers": 1,
    "num_key_value_heads": trunk.num_kv_heads,
    "rms_norm_eps": trunk.norm_eps,
    "hidden_act": "silu",
    "max_position_embeddings": longest_text(config),
    "rope_theta": trunk.rope_theta,
    "rope_scaling": {"type": "linear", "factor": scaling.factor} if is_linear else None,
    "tie_word_embeddings": False,
  }
  if kind == "eagle":
    return values | {"bias": True, "qkv_bias": trunk.qkv_bias}
  return values | {
    "head_dim": trunk.head_dim, "draft_vocab_size": config.tokenizer.vocab_size
  }


def check_drafter_config(file: Path, values: dict[str, Any], config: Config) -> None:
  """Raises InteropError where a config.json is of other predictors than `config`."""
  wanted = write_drafter_config(config, "float32")
  for key in (*_STATED, *_DEFAULTS):
    if key not in wanted:
      continue
    found = values.get(key, _DEFAULTS.get(key, wanted[key]))
    if found != wanted[key]:
      raise InteropError(
        f"{file}: {key} must be {wanted[key]!r} for predictors of this model, got "
        f"{found!r}."
      )


def drafter_contract(config: Config) -> dict[str, Any]:
  """Returns what a reader must know and config.json does not state."""
  if config.mtp.kind == "medusa":
    return {
      "hidden_source": "trunk output after its final norm",
      "row": "head k at position i predicts token i + k + 1; k starts at 1, its "
      "tensors are those of number k - 1",
      "unembedding_shared": config.mtp.unembed == "shared",
    }
  streams = ", ".join(map(str, tapped_layers(config)))
  return {
    "concat_order": ["embedding", "hidden"],
    "hidden_source": "trunk output after its final norm"
    if config.mtp.kind == "eagle"
    else f"fc of the trunk's residual streams after layers {streams}, side by side",
    "norm_point": "none" if config.mtp.kind == "eagle" else "each input of the "
    "attention has its own norm, and so has the output before the unembedding",
    "recycled_state": "the output of the layer, before any norm",
    "position_offset": 0,
    "row": "step k at row i reads the embedding of token i + k, at position i + k - 1, "
    "and predicts token i + k + 1; k starts at 1",
    "embedding_shared": True,
    "unembedding_shared": config.mtp.unembed == "shared",
  }
