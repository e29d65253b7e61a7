"""config.json of folders with drafters alone, whose trunk is in another folder.

A layout has the name of its `mtp.kind`: `medusa` is the layout of
FasterDecoding/Medusa; `eagle` and `eagle3` are the layouts of SafeAILab/EAGLE, with the
layer of Llama. The tensors `d2t` and `t2d` of EAGLE-3 are there where it has a
vocabulary of its own (`mtp.draft_vocab`).
"""

from pathlib import Path
from typing import Any

from mtp_jax.config import Config
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.hf_config import KEYS
from mtp_jax.interop.hf_config_writing import TokenIds, longest_text, write_keys
from mtp_jax.interop.layouts import DRAFTERS, model_layouts_for
from mtp_jax.predictors import num_trunk_layers, predictor_trunk, tapped_layers

# Keys that must have our value if config.json has them.
_STATED = (
  "medusa_num_heads", "medusa_num_layers", "hidden_size", "intermediate_size",
  "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
  "draft_vocab_size",
)
# After how many layers of the trunk the three streams of EAGLE-3 are taken.
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
  if trunk.kind != "llama":
    return f"the drafter's layer is Llama's, but trunk.kind is {trunk.kind!r}"
  if trunk.qk_norm:
    return "trunk.qk_norm must be False in this layout"
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
) -> dict[str, Any]:
  """Returns the config.json of a folder with drafters alone.

  `token_ids`: begin and end of a text. `base_model`: folder or name of the trunk.
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
  # The layer of an EAGLE drafter is described as a Llama model of one layer.
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
    return values | {"bias": config.mtp.fc_bias, "qkv_bias": trunk.qkv_bias}
  values |= {
    "head_dim": trunk.head_dim,
    "draft_vocab_size": config.mtp.draft_vocab or config.tokenizer.vocab_size,
    _TAPS: list(tapped_layers(config)),
  }
  return values | _speculators(config, values, base_model)


def _speculators(
  config: Config, layer: dict[str, Any], base_model: str
) -> dict[str, Any]:
  """Returns the keys of vLLM's project speculators, which name the trunk.

  `vllm serve DRAFTER` is then the whole command. `layer`: the decoder layer.
  """
  return {
    "speculators_model_type": "eagle3",
    "speculators_version": "0.9.0",
    "speculators_config": {
      "algorithm": "eagle3",
      "default_proposal_method": "greedy",
      "proposal_methods": [
        {"proposal_type": "greedy", "speculative_tokens": config.mtp.depth}
      ],
      "verifier": {
        "name_or_path": base_model, "architectures": ["LlamaForCausalLM"]
      },
    },
    "transformer_layer_config": layer,
    "norm_before_residual": False,  # The default there differs from EAGLE's code.
  }


def check_drafter_config(file: Path, values: dict[str, Any], config: Config) -> None:
  """Raises InteropError if a config.json describes other predictors than `config`."""
  wanted = write_drafter_config(config, "float32")
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
