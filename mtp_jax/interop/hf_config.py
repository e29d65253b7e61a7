"""config.json to our config keys and back, and which of our models have a layout.

Both keys under which the rotary settings are known are read and written:
`rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of those before.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from mtp_jax.config import (
  PUBLISHED_INPUTS,
  Config,
  MtpConfig,
  RopeScalingConfig,
  TrunkConfig,
)
from mtp_jax.files import shortened
from mtp_jax.interop.errors import InteropError
from mtp_jax.predictors import num_trunk_layers

# Ids of the tokens that begin a text, and of the one or the several that end it.
TokenIds = tuple[int | None, int | list[int] | None]
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Layout -> the class name and the model type that config.json has for it.
LAYOUTS = {
  "gpt2": ("GPT2LMHeadModel", "gpt2"),
  "llama": ("LlamaForCausalLM", "llama"),
  "qwen2": ("Qwen2ForCausalLM", "qwen2"),
  "qwen3": ("Qwen3ForCausalLM", "qwen3"),
  "deepseek_v3": ("DeepseekV3ForCausalLM", "deepseek_v3"),
  "mimo": ("MiMoForCausalLM", "mimo"),
}
# Layout of extra predictors alone (`drafter_config`) -> the one file of their tensors.
DRAFTERS = {
  "medusa": "medusa_lm_head.safetensors",
  "eagle": "model.safetensors",
  "eagle3": "model.safetensors",
}

# Our key -> theirs; the same value on both sides.
_GPT2_KEYS = {
  "tokenizer.vocab_size": "vocab_size",
  "data.seq_len": "n_positions",
  "trunk.embed_dim": "n_embd",
  "trunk.num_layers": "n_layer",
  "trunk.num_heads": "n_head",
}
KEYS = {
  "tokenizer.vocab_size": "vocab_size",
  "trunk.embed_dim": "hidden_size",
  "trunk.mlp_dim": "intermediate_size",
  "trunk.num_layers": "num_hidden_layers",
  "trunk.num_heads": "num_attention_heads",
}
_LATENT_KEYS = {
  "trunk.latent.kv_rank": "kv_lora_rank",
  "trunk.latent.nope_dim": "qk_nope_head_dim",
  "trunk.latent.rope_dim": "qk_rope_head_dim",
  "trunk.latent.value_dim": "v_head_dim",
}
_EXPERT_KEYS = {
  "trunk.moe.num_experts": "n_routed_experts",
  "trunk.moe.experts_per_token": "num_experts_per_tok",
  "trunk.moe.expert_dim": "moe_intermediate_size",
  "trunk.moe.num_shared": "n_shared_experts",
  "trunk.moe.num_groups": "n_group",
  "trunk.moe.groups_per_token": "topk_group",
}

# Their key -> the values with which our model is theirs; a missing key is one of them.
_ANY_LAYOUT = {
  "quantization_config": (None,),
  "attn_logit_softcapping": (None,),
  "final_logit_softcapping": (None,),
  "is_encoder_decoder": (False,),
}
_GPT2_ONLY = {
  "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
  "scale_attn_weights": (True,),
  "scale_attn_by_inverse_layer_idx": (False,),
  "reorder_and_upcast_attn": (False,),
  "add_cross_attention": (False,),
}
_ROTARY = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (None, 1.0)}
_NO_BIAS, _FALSE = {"attention_bias": (False, None)}, (False, None)
# Qwen2 and MiMo have biases of queries, keys and values whatever `attention_bias` is.
_ONLY = {
  "gpt2": _GPT2_ONLY,
  "llama": _ROTARY | _NO_BIAS | {"mlp_bias": _FALSE},
  "qwen2": _ROTARY | {"use_sliding_window": _FALSE},
  "qwen3": _ROTARY | _NO_BIAS | {"use_sliding_window": _FALSE},
  "mimo": _ROTARY | {"use_sliding_window": _FALSE},
  "deepseek_v3": _ROTARY | _NO_BIAS | {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),
  },
}

_ROPE_KINDS = {
  "default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"
}  # fmt: skip
_ROPE_TYPES = {ours: theirs for theirs, ours in _ROPE_KINDS.items()}
# What a set of rotary parameters may have beside its kind and theta.
_ROPE_KEYS = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
  ),
  "yarn": (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "truncate",
  ),
}  # fmt: skip

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class TrunkDescription:
  """What config.json says; see `importing.HfModel`.

  depth: of MTP, by its account. sizes: of parameters, by its keys.
  """

  family: str
  overrides: dict[str, Any]
  max_length: int
  depth: int
  sizes: dict[str, int]


class _Values:
  """Reads typed values of one config.json; every error names the file and the key."""

  def __init__(self, file: Path, values: dict[str, Any], section: str = ""):
    self._file, self._values, self._section = file, values, section
    self.sizes: dict[str, int] = {}

  def get(self, key: str, kinds: tuple[type, ...], default: Any = _REQUIRED) -> Any:
    """Returns a value; a missing one or null is `default`."""
    value = self._values.get(key)
    if value is None:
      if default is _REQUIRED:
        raise InteropError(f"{self._file}: {self._section}{key} is missing.")
      return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
      self.refuse(key, " or ".join(kind.__name__ for kind in kinds))
    return value

  def integer(self, key: str, default: Any = _REQUIRED, least: int = 0) -> int:
    value = self.get(key, (int,), default)
    if value is not None and not least <= value < 2**31:
      self.refuse(key, f"{least} to {2**31 - 1}")
    return value

  def size(self, key: str, default: Any = _REQUIRED) -> int:
    """Returns an axis of parameters, or how many of them there are."""
    self.sizes[key] = self.integer(key, default, least=1)
    return self.sizes[key]

  def number(self, key: str, default: Any = _REQUIRED) -> float:
    value = self.get(key, (int, float), default)
    if value is not None and not 0 <= value <= 1e18:  # Nor is NaN.
      self.refuse(key, "a number from 0 to 1e18")
    return value if value is None else float(value)

  def check(self, allowed: dict[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
      if key in self._values and self._values[key] not in values:
        self.refuse(key, " or ".join(map(repr, values)))

  def refuse(self, key: str, supported: str) -> None:
    raise InteropError(
      f"{self._file}: {self._section}{key} is {shortened(self._values.get(key))}; "
      f"supported: {supported}."
    )

  def section(self, key: str) -> "_Values":
    return _Values(self._file, self.get(key, (dict,), {}), f"{key}.")

  def __contains__(self, key: str) -> bool:
    return self._values.get(key) is not None

  def keys(self) -> set[str]:
    return set(self._values)


def read_config(file: Path, values: dict[str, Any]) -> TrunkDescription:
  """Returns what the values of a config.json mean for ours.

  Raises:
    InteropError: another architecture or variant; names file, key, value and what is
      supported.
  """
  reader = _Values(file, values)
  family = _family(reader, values)
  reader.check(_ANY_LAYOUT)
  reader.check(_ONLY[family])
  if family == "gpt2":
    return _read_gpt2(reader)
  kinds = reader.get("layer_types", (list,), [])
  if any(kind != "full_attention" for kind in kinds):
    reader.refuse("layer_types", "'full_attention' for every layer")

  max_length = reader.integer("max_position_embeddings", least=1)
  overrides = {ours: reader.size(theirs) for ours, theirs in KEYS.items()}
  overrides |= {
    "trunk.kind": "llama",
    "trunk.num_kv_heads": reader.size(
      "num_key_value_heads", overrides["trunk.num_heads"]
    ),
    "trunk.norm_eps": reader.number("rms_norm_eps", 1e-6),
    "trunk.tie_embeddings": reader.get("tie_word_embeddings", (bool,), False),
    "trunk.qkv_bias": family in ("qwen2", "mimo"),
    "trunk.qk_norm": family == "qwen3",
  }
  overrides |= _read_rope(reader, max_length, family)
  depth = 0
  if family in ("mimo", "deepseek_v3"):
    depth = reader.integer("num_nextn_predict_layers", 0)
  if family == "mimo" and depth > 1:
    reader.refuse(
      "num_nextn_predict_layers",
      "at most 1: what a second layer of this family reads is not agreed on",
    )
  if family == "deepseek_v3":
    overrides |= _read_deepseek(reader, overrides)
  else:
    overrides |= _read_heads(reader, overrides)
  return TrunkDescription(family, overrides, max_length, depth, reader.sizes)


def _family(reader: _Values, values: dict[str, Any]) -> str:
  key, column = ("architectures", 0) if "architectures" in reader else ("model_type", 1)
  value = values.get(key)
  found = value[0] if isinstance(value, list) and len(value) == 1 else value
  for family, names in LAYOUTS.items():
    if found == names[column]:
      return family
  reader.refuse(key, ", ".join(names[column] for names in LAYOUTS.values()))


def _read_gpt2(reader: _Values) -> TrunkDescription:
  overrides = {ours: reader.size(theirs) for ours, theirs in _GPT2_KEYS.items()}
  overrides |= {
    "trunk.kind": "gpt2",
    "trunk.num_kv_heads": overrides["trunk.num_heads"],
    "trunk.attention_dim": 0,
    "trunk.attention_kind": "grouped",
    "trunk.mlp_dim": reader.size("n_inner", 4 * overrides["trunk.embed_dim"]),
    "trunk.norm_eps": reader.number("layer_norm_epsilon", 1e-5),
    "trunk.tie_embeddings": reader.get("tie_word_embeddings", (bool,), True),
    "trunk.qkv_bias": False,
    "trunk.qk_norm": False,
    "trunk.rope_scaling.kind": "none",
    "trunk.moe.num_experts": 0,
  }
  length = overrides["data.seq_len"]
  return TrunkDescription("gpt2", overrides, length, 0, reader.sizes)


def _read_heads(reader: _Values, overrides: dict[str, Any]) -> dict[str, Any]:
  heads, dim = overrides["trunk.num_heads"], overrides["trunk.embed_dim"]
  width = heads * reader.size("head_dim", max(1, dim // heads))
  return {
    "trunk.attention_kind": "grouped",
    "trunk.attention_dim": 0 if width == dim else width,
    "trunk.moe.num_experts": 0,
  }


def _read_deepseek(reader: _Values, overrides: dict[str, Any]) -> dict[str, Any]:
  if overrides["trunk.num_kv_heads"] != overrides["trunk.num_heads"]:
    reader.refuse("num_key_value_heads", "num_attention_heads, for latent attention")
  found = {ours: reader.size(theirs) for ours, theirs in _LATENT_KEYS.items()}
  found |= {
    "trunk.attention_kind": "latent",
    "trunk.attention_dim": 0,
    "trunk.latent.query_rank": reader.integer("q_lora_rank", 0),
  }
  num_dense = reader.integer("first_k_dense_replace")
  if num_dense >= overrides["trunk.num_layers"]:
    return found | {"trunk.moe.num_experts": 0}
  found |= {ours: reader.size(theirs) for ours, theirs in _EXPERT_KEYS.items()}
  return found | {
    "trunk.moe.dense_layers": num_dense,
    "trunk.moe.route_scale": reader.number("routed_scaling_factor"),
  }


def _read_rope(reader: _Values, max_length: int, family: str) -> dict[str, Any]:
  """Rotary settings, from whichever of the two keys is there."""
  rope = reader.section("rope_parameters")
  if not rope.keys():
    rope = reader.section("rope_scaling")
  key = "rope_type" if "rope_type" in rope else "type"
  kind = rope.get(key, (str,), "default")
  if kind not in _ROPE_KINDS:
    rope.refuse(key, ", ".join(_ROPE_KINDS))
  known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
  for extra in sorted(rope.keys() - known - set(_ROPE_KEYS[kind])):
    rope.refuse(extra, f"for kind {kind!r}: {', '.join(_ROPE_KEYS[kind]) or 'nothing'}")
  rope.check({"partial_rotary_factor": (None, 1.0)})
  theta = rope.number("rope_theta", reader.number("rope_theta", 10_000.0))
  scaling = {"kind": _ROPE_KINDS[kind]}
  if kind == "linear":
    scaling["factor"] = rope.number("factor")
  elif kind == "llama3":
    scaling |= {
      "factor": rope.number("factor"),
      "original_length": rope.integer(
        "original_max_position_embeddings", max_length, least=1
      ),
      "low_freq_factor": rope.number("low_freq_factor"),
      "high_freq_factor": rope.number("high_freq_factor"),
    }
  elif kind == "yarn":
    scaling |= _read_yarn(rope, max_length, family)
  return {"trunk.rope_theta": theta} | {
    f"trunk.rope_scaling.{name}": value for name, value in scaling.items()
  }


def _read_yarn(rope: _Values, max_length: int, family: str) -> dict[str, Any]:
  rope.check({"truncate": (True, None)})
  original = rope.integer("original_max_position_embeddings", max_length, least=1)
  factor = rope.number("factor", max_length / original)
  # Without both of these there, the attention factor follows from `factor` alone.
  mscale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
  if not (mscale and all_dim):
    if all_dim and family == "deepseek_v3":
      rope.refuse("mscale", "a factor other than 0 beside mscale_all_dim")
    mscale, all_dim = 1.0, 0.0
  scaling = {
    "factor": factor,
    "original_length": original,
    "beta_fast": rope.number("beta_fast", 32.0),
    "beta_slow": rope.number("beta_slow", 1.0),
    "mscale": mscale,
    "mscale_all_dim": all_dim,
  }
  implied = _mscale(factor, mscale) / _mscale(factor, all_dim)
  given = rope.number("attention_factor", implied)
  if not math.isclose(given, implied, rel_tol=1e-6):
    rope.refuse("attention_factor", f"what follows from the factor, {implied:.6g}")
  return scaling


def _mscale(factor: float, mscale: float) -> float:
  return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


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
    token_ids: of the tokens that begin and end a text, where they are known.
    came: the config.json of an imported model. What it has, goes out again as far as
      the model is still the one that it describes.
  """
  values = _written(config, layout, dtype, token_ids)
  if came is None:
    return values
  ids = {key: came[key] for key in ID_KEYS if key in came}
  described = read_config(Path("config.json"), came)
  changed = {k for k, x in described.overrides.items() if get_dotted(config, k) != x}
  key = "max_position_embeddings"
  if changed or described.family != layout:
    longest = max(values.get(key, 0), _length_that_came(described, changed))
    return values | ({key: longest} if key in values else {}) | ids
  ours = ("architectures", "dtype", "torch_dtype", "num_nextn_predict_layers")
  own_ids = {} if ids else {key: values[key] for key in ID_KEYS if key in values}
  # The code that `auto_map` names is not in the folder that is written.
  kept = {name: value for name, value in came.items() if name != "auto_map"}
  if described.family != "gpt2" and config.data.seq_len > described.max_length:
    kept[key] = config.data.seq_len  # Training has gone on with longer rows.
  return own_ids | kept | {name: values[name] for name in ours if name in values}


def _length_that_came(described: TrunkDescription, changed: set[str]) -> int:
  """Returns the tokens of a text, as the folder states them, that still hold.

  `changed`: keys that have other values now. A scaling that was replaced stretches the
  texts no more.
  """
  scaling = "trunk.rope_scaling."
  kind = described.overrides[f"{scaling}kind"]
  if kind == "none" or not any(key.startswith(scaling) for key in changed):
    return described.max_length
  return described.overrides.get(f"{scaling}original_length", 0)


def _written(
  config: Config, layout: str, dtype: str, token_ids: TokenIds | None
) -> dict[str, Any]:
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
    values |= write_keys(config, _GPT2_KEYS)
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
  """Returns the values of dotted keys of ours under their names there."""
  return {theirs: get_dotted(config, ours) for ours, theirs in keys.items()}


def get_dotted(config: Config, key: str) -> Any:
  return functools.reduce(getattr, key.split("."), config)


def _write_deepseek(config: Config) -> dict[str, Any]:
  trunk, depth = config.trunk, config.mtp.depth
  moe = trunk.moe
  if not moe.num_experts:  # Every layer is before the first with experts.
    moe = dataclasses.replace(
      moe, num_experts=1, experts_per_token=1, num_groups=1, groups_per_token=1,
      num_shared=1, dense_layers=num_trunk_layers(config) + depth,
    )  # fmt: skip
  stated = dataclasses.replace(config, trunk=dataclasses.replace(trunk, moe=moe))
  return write_keys(stated, _LATENT_KEYS | _EXPERT_KEYS) | {
    "q_lora_rank": trunk.latent.query_rank or None,
    "first_k_dense_replace": moe.dense_layers,
    "routed_scaling_factor": moe.route_scale,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "attention_bias": False,
    "num_nextn_predict_layers": depth,
  }


def _write_rope(trunk: TrunkConfig) -> dict[str, Any]:
  scaling, kind = trunk.rope_scaling, _ROPE_TYPES[trunk.rope_scaling.kind]
  named = {"original_max_position_embeddings": "original_length"}
  parameters = {
    key: getattr(scaling, named.get(key, key))
    for key in _ROPE_KEYS[kind]
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
  """Returns the tokens of a text for which the positions are made."""
  scaling = config.trunk.rope_scaling
  stretched = 0
  if scaling.kind in ("llama3", "yarn"):
    stretched = round(scaling.factor * scaling.original_length)
  return max(config.data.seq_len, stretched)


def model_layouts_for(config: Config, trunk_only: bool) -> dict[str, str]:
  """Returns for every layout of a trunk why `config` cannot be written in it, or ""."""
  return {
    layout: _trunk_obstacle(config, layout)
    or _predictor_obstacle(config, layout, trunk_only)
    for layout in LAYOUTS
  }


def _trunk_obstacle(config: Config, layout: str) -> str:
  trunk = config.trunk
  if (trunk.kind == "gpt2") != (layout == "gpt2"):
    return f"the trunk is of kind {trunk.kind!r}"
  if trunk.kind == "gpt2":
    if trunk.num_heads * trunk.head_dim != trunk.embed_dim:
      return "trunk.attention_dim must be trunk.embed_dim there"
    return ""
  if _differs_there(trunk.rope_scaling):
    return "YaRN with mscale_all_dim 0 means mscale 1 there"
  if trunk.attention_kind == "latent":
    if layout != "deepseek_v3":
      return "latent attention exists in the layout 'deepseek_v3' only"
    if trunk.moe.num_experts and not trunk.moe.num_shared:
      return "every layer with experts has a shared one there"
    return ""
  if trunk.moe.num_experts:
    return "grouped attention with experts has no portable layout"
  if layout == "deepseek_v3":
    return "attention is latent there (trunk.attention_kind)"
  has = trunk.qkv_bias, trunk.qk_norm
  wants = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
  if layout == "mimo" and trunk.qk_norm:
    return "trunk.qk_norm must be False there"
  if layout in wants and has != wants[layout]:
    return (
      f"trunk.qkv_bias and trunk.qk_norm must be {wants[layout][0]} and "
      f"{wants[layout][1]} there"
    )
  if layout in ("qwen2", "mimo"):
    if trunk.num_heads * trunk.head_dim != trunk.embed_dim:
      return "trunk.attention_dim must be trunk.embed_dim there"
  if layout == "llama" and trunk.embed_dim % trunk.num_heads:
    return "trunk.embed_dim must be divisible by trunk.num_heads there"
  return ""


def _differs_there(scaling: RopeScalingConfig) -> bool:
  if scaling.kind != "yarn":
    return False
  both = scaling.mscale and scaling.mscale_all_dim
  return not both and (scaling.mscale, scaling.mscale_all_dim) != (1.0, 0.0)


def _predictor_obstacle(config: Config, layout: str, trunk_only: bool) -> str:
  mtp = config.mtp
  has_any = (mtp.depth > 0 or mtp.kind == "parallel") and not trunk_only
  if layout == "mimo":
    if not has_any or mtp.kind != "sequential" or mtp.depth != 1:
      return "it has exactly one sequential module (mtp.depth 1)"
    return unpublished_inputs(mtp)
  if not has_any:
    return ""
  if mtp.kind in DRAFTERS:
    return f"the layout {mtp.kind!r} has the extra predictors, this one the trunk alone"
  if mtp.kind != "sequential":
    return f"{mtp.kind} heads have no portable layout; the trunk alone has one"
  if layout != "deepseek_v3":
    return "it has no place for MTP modules; the trunk alone can be written in it"
  if mtp.dense_blocks:
    return "MTP layers have experts there wherever the trunk ends with them"
  return unpublished_inputs(mtp)


def unpublished_inputs(mtp: MtpConfig) -> str:
  """Returns what sequential modules have that no layout has; "" where it has all.

  Layouts with modules have trunks with RMSNorm, so that `mtp.norm` decides nothing.
  """
  more = {"out_norm": "own", "mlp_dim": 0}
  for key, published in (PUBLISHED_INPUTS | more).items():
    if getattr(mtp, key) != published:
      return f"mtp.{key} must be {published!r} there, got {getattr(mtp, key)!r}"
  return ""
