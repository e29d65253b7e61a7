"""config.json of folders with drafters alone, whose trunk is in another folder.

A layout has the name of its `mtp.kind`: `medusa` is the layout of
FasterDecoding/Medusa; `eagle` and `eagle3` are the layouts of SafeAILab/EAGLE, with the
layer of Llama; `peagle` and `dflash` are the layouts of vLLM's project speculators
(0.9.0), with one layer of Llama and `mtp.draft_layers` of Qwen3. A drafter with a
vocabulary of its own (`mtp.draft_vocab`) also has the tensors `d2t` and `t2d`.
"""

from pathlib import Path
from typing import Any

from mtp_jax.config import Config
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.hf_config import KEYS
from mtp_jax.interop.hf_config_writing import TokenIds, longest_text, write_keys
from mtp_jax.interop.layouts import DRAFTERS, LAYOUTS, MASKS, model_layouts_for
from mtp_jax.predictors import num_trunk_layers, predictor_trunk, tapped_layers

# Keys that must have our value if config.json has them.
_STATED = (
  "medusa_num_heads", "medusa_num_layers", "hidden_size", "intermediate_size",
  "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
  "draft_vocab_size", "speculators_model_type", "aux_hidden_state_layer_ids",
  "block_size", "sample_from_anchor", "norm_before_residual", "norm_before_fc",
  "fc_norm", "norm_output",
)
# After how many layers of the trunk the three streams are taken; DFlash has no prefix.
_TAPS = "eagle_aux_hidden_state_layer_ids"
# Keys that must have our value, and their values if config.json lacks them.
_DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "rope_scaling": None,
  "bias": True,
  "qkv_bias": False,
}


def layouts_for(config: Config, trunk_only: bool = False) -> dict[str, str]:
  """Returns, by layout, the reason why `config` cannot be exported; "" if it can.

  `trunk_only`: export without the extra predictors.
  """
  return model_layouts_for(config, trunk_only) | {
    layout: (
      "the layout has no trunk" if trunk_only else drafter_obstacle(config, layout)
    )
    for layout in DRAFTERS
  }


def drafter_obstacle(config: Config, layout: str) -> str:
  """Returns the reason why the predictors have no place in a layout; "" if they do."""
  if config.mtp.kind != layout or not config.mtp.depth:
    return f"the layout holds predictors of mtp.kind {layout!r}, at least one"
  if layout != "medusa":
    return _eagle_obstacle(config)
  return "mtp.markov_rank must be 0 in this layout" if config.mtp.markov_rank else ""


def _eagle_obstacle(config: Config) -> str:
  trunk = config.trunk
  is_dflash = config.mtp.kind == "dflash"
  if trunk.kind != "llama":
    family = "Qwen3" if is_dflash else "Llama"
    return f"the drafter's layer is {family}'s, but trunk.kind is {trunk.kind!r}"
  if trunk.qk_norm != is_dflash:
    return f"trunk.qk_norm must be {is_dflash} in this layout, got {trunk.qk_norm}"
  if is_dflash and not config.mtp.one_mask:
    return "mtp.one_mask must be True in this layout, got False"
  if trunk.rope_fraction < 1:
    return "trunk.rope_fraction must be 1 in this layout"
  if trunk.rope_scaling.kind not in ("none", "linear"):
    return "trunk.rope_scaling.kind must be 'none' or 'linear' in this layout"
  for key in ("fc_norm", "norm_output"):
    if getattr(config.mtp, key):
      return f"mtp.{key} must be False in this layout"
  if config.mtp.kind == "eagle":
    if trunk.num_heads * trunk.head_dim != trunk.embed_dim:
      return "trunk.attention_dim must be trunk.embed_dim in this layout"
    return ""
  if trunk.qkv_bias:
    return "trunk.qkv_bias must be False in this layout"
  return ""


def write_drafter_config(
  config: Config,
  dtype: str,
  token_ids: TokenIds | None = None,
  base_model: str = "",
  mask_token: int = 0,
) -> dict[str, Any]:
  """Returns the config.json of a folder with drafters alone.

  `token_ids`: begin and end of a text. `base_model`: folder or name of the trunk.
  `mask_token`: see `mask_token_of`.
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
      "architectures": ["MedusaModel"],
      "model_type": "medusa",
      "hidden_size": trunk.embed_dim,
      "vocab_size": config.tokenizer.vocab_size,
      "medusa_num_heads": config.mtp.depth,
      "medusa_num_layers": 1,
      "medusa_fc_bias": True,  # vLLM drops the biases in silence without it.
    }
  # The layers of a drafter are described as a small Llama or Qwen3.
  scaling, family = trunk.rope_scaling, "qwen3" if kind == "dflash" else "llama"
  is_linear = scaling.kind == "linear"
  values |= write_keys(config, KEYS) | {
    "architectures": [LAYOUTS[family][0]],
    "model_type": family,
    "intermediate_size": predictor_trunk(trunk, config.mtp).mlp_dim,
    "num_hidden_layers": config.mtp.draft_layers if kind == "dflash" else 1,
    "num_key_value_heads": trunk.num_kv_heads,
    "rms_norm_eps": trunk.norm_eps,
    "hidden_act": "silu",
    "max_position_embeddings": longest_text(config),
    "rope_theta": trunk.rope_theta,
    "rope_scaling": {"type": "linear", "factor": scaling.factor} if is_linear else None,
    "tie_word_embeddings": False,
  }
  if kind == "eagle":
    return values | {"bias": config.mtp.fc_bias, "qkv_bias": trunk.qkv_bias}
  values["head_dim"] = trunk.head_dim
  own = {"draft_vocab_size": config.mtp.draft_vocab or config.tokenizer.vocab_size}
  taps = list(tapped_layers(config))
  if kind == "eagle3":
    values |= own | {_TAPS: taps}
    return values | _speculators(config, values, base_model)
  own |= _speculators(config, values, base_model) | {
    "torch_dtype": dtype,
    "base_model_name_or_path": base_model,
    "mask_token_id": mask_token,
  }
  if kind == "peagle":
    norms = ("norm_before_fc", "fc_norm", "norm_output")
    return own | dict.fromkeys(norms, False) | {
      "architectures": ["PEagleDraftModel"],
      _TAPS: taps,
      "embed_requires_grad": True,
    }
  return own | {
    "architectures": ["DFlashDraftModel"],
    "aux_hidden_state_layer_ids": taps,
    "block_size": 1 + config.mtp.depth,
    "sample_from_anchor": False,
    # vLLM takes False for all layers, and then a row would see none after it.
    "sliding_window_non_causal": True,
  }


def _speculators(
  config: Config, layer: dict[str, Any], base_model: str
) -> dict[str, Any]:
  """Returns the keys of vLLM's project speculators, which name the trunk.

  `vllm serve DRAFTER` is then the whole command. `layer`: the decoder layers.
  """
  kind, trunk = config.mtp.kind, "qwen3" if config.trunk.qk_norm else "llama"
  # The default there differs from EAGLE's code.
  residual = {} if kind == "dflash" else {"norm_before_residual": False}
  return {
    "speculators_model_type": kind,
    "speculators_version": "0.9.0",
    "speculators_config": {
      "algorithm": kind,
      "default_proposal_method": "greedy",
      "proposal_methods": [
        {"proposal_type": "greedy", "speculative_tokens": config.mtp.depth}
      ],
      "verifier": {
        "name_or_path": base_model, "architectures": [LAYOUTS[trunk][0]]
      },
    },
    "transformer_layer_config": layer,
  } | residual


def mask_token_of(
  config: Config, begin: int | list[int] | None, num_tokens: int | None
) -> int:
  """Returns the token in whose place the embedding of a drafter's folder has the mask.

  No drafter reads the begin of a text, or an id that no token has. `begin`: its id.
  `num_tokens`: of the tokenizer, if there is one.

  Raises:
    InteropError: every id may be read.
  """
  if config.mtp.kind not in MASKS:
    return 0
  if isinstance(begin, int):
    return begin
  size = config.tokenizer.vocab_size
  if num_tokens is None or num_tokens >= size:
    raise InteropError(
      f"the layout {config.mtp.kind!r} needs a token that no text has, in whose place "
      "the mask is written: the tokenizer must have a begin of text, or "
      f"tokenizer.vocab_size must be above its {num_tokens} tokens, got {size}."
    )
  return size - 1


def check_drafter_config(file: Path, values: dict[str, Any], config: Config) -> int:
  """Returns the token whose embedding is the mask; 0 without masks.

  Raises:
    InteropError: the config.json describes other predictors than `config`.
  """
  wanted = write_drafter_config(config, "float32")
  is_masked = config.mtp.kind in MASKS
  if is_masked:
    wanted, values = _with_layer(wanted), _with_layer(values)
  layers = num_trunk_layers(config)
  defaults = _DEFAULTS | {_TAPS: [2, layers // 2, layers - 3]}
  for key in (*_STATED, *defaults):
    if key not in wanted:
      continue
    found = values.get(key, defaults.get(key, wanted[key]))
    if found != wanted[key]:
      raise InteropError(
        f"{file}: {key} must be {wanted[key]!r} for predictors of this model, got "
        f"{found!r}."
      )
  if not is_masked:
    return 0
  token, size = values.get("mask_token_id"), config.tokenizer.vocab_size
  if not isinstance(token, int) or not 0 <= token < size:
    raise InteropError(
      f"{file}: mask_token_id must be a token of the {size}, got {token!r}."
    )
  return token


def _with_layer(values: dict[str, Any]) -> dict[str, Any]:
  """Returns a config.json with the keys of its decoder layers beside its own."""
  layer = values.get("transformer_layer_config")
  layer = layer if isinstance(layer, dict) else {}
  rotary = layer.get("rope_parameters")  # Newer transformers have the base in it.
  return (rotary if isinstance(rotary, dict) else {}) | layer | values


def drafter_contract(config: Config) -> dict[str, Any]:
  """Returns facts that a reader of the weights needs and config.json lacks."""
  if config.mtp.kind == "medusa":
    return {
      "hidden_source": "trunk output after its final norm",
      "row": "head k at position i predicts token i + k + 1; k starts at 1, its "
      "tensors have the number k - 1",
      "unembedding_shared": config.mtp.unembed == "shared",
    }
  streams = ", ".join(map(str, tapped_layers(config)))
  shared = {
    "embedding_shared": True,
    "unembedding_shared": config.mtp.unembed == "shared",
  }
  if config.mtp.kind == "dflash":
    return shared | {
      "hidden_source": "keys and values of every layer: hidden_norm of fc of the "
      f"trunk's residual streams after layers {streams}, side by side",
      "norm_point": "before attention and MLP of every layer, before the unembedding",
      "row": "row 0 of a block at row i is token i + 1, rows k are the embedding of "
      "mask_token_id; row k predicts token i + k + 1 and sees the whole block",
    }
  masked = {
    "recycled_state": "none: step k > 1 reads mask_hidden, and the embedding of "
    "mask_token_id",
    "row": "step k at row i is at position i + k - 1, and predicts token i + k + 1; "
    "step 1 reads the embedding of token i + 1",
  } if config.mtp.kind == "peagle" else {}
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
  } | shared | masked
