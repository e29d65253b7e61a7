"""config.json of model folders: tables of keys, and reading as overrides of ours.

Rotary settings have two forms, which are both read and written: `rope_parameters`
(transformers 5), and `rope_theta` with `rope_scaling` (before).
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from mtp_jax.files import shortened
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.layouts import LAYOUTS, NUMBERED

# Our key -> their key, with the same value.
GPT2_KEYS = {
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
LATENT_KEYS = {
  "trunk.latent.kv_rank": "kv_lora_rank",
  "trunk.latent.nope_dim": "qk_nope_head_dim",
  "trunk.latent.rope_dim": "qk_rope_head_dim",
  "trunk.latent.value_dim": "v_head_dim",
}
EXPERT_KEYS = {
  "trunk.moe.num_experts": "n_routed_experts",
  "trunk.moe.experts_per_token": "num_experts_per_tok",
  "trunk.moe.expert_dim": "moe_intermediate_size",
  "trunk.moe.num_shared": "n_shared_experts",
  "trunk.moe.num_groups": "n_group",
  "trunk.moe.groups_per_token": "topk_group",
}

# Their key -> supported values; a missing key is supported, too.
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
_SILU = {"hidden_act": ("silu", "swish")}
_ROTARY = _SILU | {"partial_rotary_factor": (None, 1.0)}
_NO_BIAS, _FALSE = {"attention_bias": (False, None)}, (False, None)
# Qwen2 and MiMo always have biases of queries, keys and values: no `attention_bias`.
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
  "glm4_moe": _SILU | {"norm_topk_prob": (True,)},
}
# A key of our own: the routed experts are zeros and the shared expert is a dense MLP.
ZERO_EXPERTS_KEY = "routed_experts_are_zeros"

_ROPE_KINDS = {
  "default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"
}  # fmt: skip
ROPE_TYPES = {ours: theirs for theirs, ours in _ROPE_KINDS.items()}
# Keys of rotary parameters besides kind and theta, by kind.
ROPE_KEYS = {
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
  """The content of a config.json; see `importing.HfModel`.

  depth: number of MTP layers. sizes: sizes of parameters, by their keys.
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
    """Returns a value; `default` if it is missing or null."""
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
    """Returns a size or number of parameters, and records it in `sizes`."""
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
  """Returns the description of the trunk, as overrides of our config.

  Raises:
    InteropError: an unsupported architecture or value; names file, key, value and the
      supported values.
  """
  reader = _Values(file, values)
  family = _family(reader, values)
  reader.check(_ANY_LAYOUT)
  reader.check(_ONLY[family])
  if family == "gpt2":
    return _read_gpt2(reader)
  # Sliding windows and the like would change the meaning of long texts.
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
    "trunk.norm_eps": reader.number(
      "rms_norm_eps", 1e-5 if family == "glm4_moe" else 1e-6
    ),
    "trunk.tie_embeddings": reader.get("tie_word_embeddings", (bool,), False),
    "trunk.qkv_bias": family in ("qwen2", "mimo"),
    "trunk.qk_norm": family == "qwen3",
    "trunk.rope_fraction": 1.0,
  }
  overrides |= _read_rope(reader, max_length, family)
  depth = 0
  if family in ("mimo", *NUMBERED):
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
  if family == "glm4_moe":
    overrides |= _read_glm(reader, overrides)
  return TrunkDescription(family, overrides, max_length, depth, reader.sizes)


def _family(reader: _Values, values: dict[str, Any]) -> str:
  key, column = ("architectures", 0) if "architectures" in reader else ("model_type", 1)
  value = values.get(key)
  found = value[0] if isinstance(value, list) and len(value) == 1 else value
  for family, names in LAYOUTS.items():
    if found == names[column] or (column and found == family):
      return family
  reader.refuse(key, ", ".join(names[column] for names in LAYOUTS.values()))


def _read_gpt2(reader: _Values) -> TrunkDescription:
  overrides = {ours: reader.size(theirs) for ours, theirs in GPT2_KEYS.items()}
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
  found = {ours: reader.size(theirs) for ours, theirs in LATENT_KEYS.items()}
  found |= {
    "trunk.attention_kind": "latent",
    "trunk.attention_dim": 0,
    "trunk.latent.query_rank": reader.integer("q_lora_rank", 0),
  }
  return found | _read_experts(reader, overrides)


def _read_glm(reader: _Values, overrides: dict[str, Any]) -> dict[str, Any]:
  """Returns what GLM-4.5 has by choice: biases, norms of the heads, and experts."""
  rope = reader.section("rope_parameters")
  stated = rope if "partial_rotary_factor" in rope else reader
  fraction = stated.number("partial_rotary_factor", 0.5)
  if not 0 < fraction <= 1:
    stated.refuse("partial_rotary_factor", "more than 0 and at most 1")
  found = {
    "trunk.rope_fraction": fraction,
    "trunk.qkv_bias": reader.get("attention_bias", (bool,), False),
    "trunk.qk_norm": reader.get("use_qk_norm", (bool,), False),
  }
  if not reader.get(ZERO_EXPERTS_KEY, (bool,), False):
    return found | _read_experts(reader, overrides)
  shared = reader.size("moe_intermediate_size") * reader.size("n_shared_experts")
  if shared != overrides["trunk.mlp_dim"] or reader.integer("first_k_dense_replace"):
    reader.refuse(
      "intermediate_size", f"beside {ZERO_EXPERTS_KEY}, n_shared_experts * "
      f"moe_intermediate_size ({shared}), with first_k_dense_replace 0"
    )
  return found


def _read_experts(reader: _Values, overrides: dict[str, Any]) -> dict[str, Any]:
  num_dense = reader.integer("first_k_dense_replace")
  if num_dense >= overrides["trunk.num_layers"]:
    return {"trunk.moe.num_experts": 0}
  found = {ours: reader.size(theirs) for ours, theirs in EXPERT_KEYS.items()}
  return found | {
    "trunk.moe.dense_layers": num_dense,
    "trunk.moe.route_scale": reader.number("routed_scaling_factor"),
  }


def _read_rope(reader: _Values, max_length: int, family: str) -> dict[str, Any]:
  """Returns the rotary settings, from `rope_parameters` or else `rope_scaling`."""
  rope = reader.section("rope_parameters")
  if not rope.keys():
    rope = reader.section("rope_scaling")
  key = "rope_type" if "rope_type" in rope else "type"
  kind = rope.get(key, (str,), "default")
  if kind not in _ROPE_KINDS:
    rope.refuse(key, ", ".join(_ROPE_KINDS))
  # An unknown key may change the positions, so it must not be ignored.
  known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
  for extra in sorted(rope.keys() - known - set(ROPE_KEYS[kind])):
    rope.refuse(extra, f"for kind {kind!r}: {', '.join(ROPE_KEYS[kind]) or 'nothing'}")
  if family != "glm4_moe":
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
  # Unless both are set, the attention factor follows from `factor` alone.
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
