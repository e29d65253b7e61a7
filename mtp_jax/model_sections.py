"""The sections of a config that describe the model; see `sections.py`.

Which kinds of predictors read a key of `mtp` is in `predictors.KINDS`.
"""

import dataclasses
from typing import Any, Literal

from mtp_jax.keys import (
  ABOVE_0,
  ARCH,
  FACTOR,
  FRACTION,
  HOST,
  NOT_NEGATIVE,
  ON,
  RUNS,
  SHARE,
  SIZE,
  at_least,
  at_most,
  key,
  section,
)

# Mesh axes that split heads and inner widths, and the width of the stream.
_TENSOR, _FSDP = "mesh.tensor", "mesh.fsdp"

# Where keys have an effect: values that other keys must have.
_LLAMA = {"trunk.kind": ("llama",)}
_GROUPED = _LLAMA | {"trunk.attention_kind": ("grouped",)}
_EXPERTS = {"trunk.moe.num_experts": ON}
_LINEAR = {"trunk.rope_scaling.kind": ("linear", "llama3", "yarn")}
_LENGTH = {"trunk.rope_scaling.kind": ("llama3", "yarn")}
_LLAMA3 = {"trunk.rope_scaling.kind": ("llama3",)}
_DEPTHS = {"mtp.depth": ON}
_DEPTH_2 = {"mtp.depth": at_least(2)}
# Extra depths are trained, not next-token prediction for as long as they would take.
_MTP = {"mtp.arm": ("added", "shortened")}
_TRAINED = _DEPTHS | _MTP


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
  """How rotary frequencies change for texts longer than `original_length`.

  See model/rotary.py. Turns are of a frequency in `original_length` tokens.
  """

  kind: Literal["none", "linear", "llama3", "yarn"] = key(
    "none", "which frequencies are divided by the factor", ARCH, when=_LLAMA
  )
  factor: float = key(1.0, "longer texts by original ones", ARCH, FACTOR, when=_LINEAR)
  original_length: int = key(128, "tokens of a text", ARCH, at_least(1), when=_LENGTH)
  low_freq_factor: float = key(1.0, "turns: all below", ARCH, ABOVE_0, when=_LLAMA3)
  high_freq_factor: float = key(4.0, "turns: none above", ARCH, ABOVE_0, when=_LLAMA3)
  beta_fast: float = key(32.0, "turns: none above", ARCH, ABOVE_0)
  beta_slow: float = key(1.0, "turns: all below", ARCH, ABOVE_0)
  mscale: float = key(1.0, "gain of the rotated part", ARCH, NOT_NEGATIVE)
  mscale_all_dim: float = key(0.0, "gain of the whole softmax", ARCH, NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
  """Sizes of multi-head latent attention (DeepSeek-V3, equations 1 to 11)."""

  query_rank: int = key(96, "compressed query; 0: none", SIZE, at_least(0), by=_FSDP)
  kv_rank: int = key(32, "compressed keys and values", SIZE, at_least(1), by=_FSDP)
  nope_dim: int = key(32, "per head, without rotation", SIZE, at_least(1))
  rope_dim: int = key(16, "per head, rotated; keys share it", SIZE, at_least(1))
  value_dim: int = key(32, "per head", SIZE, at_least(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """Mixture of experts (DeepSeek-V3, equations 12 to 20)."""

  num_experts: int = key(
    0, "routed; 0: every layer is dense", SIZE, at_least(0), when=_LLAMA,
    by="mesh.expert",
  )
  experts_per_token: int = key(2, "routed experts of a token", ARCH, at_least(1))
  expert_dim: int = key(128, "width, of a SwiGLU", SIZE, at_least(1), by=_TENSOR)
  num_shared: int = key(1, "experts of every token, merged", ARCH, at_least(0))
  dense_layers: int = key(1, "first layers that stay dense", SIZE, at_least(0))
  num_groups: int = key(1, "groups of experts (nodes)", ARCH, at_least(1))
  groups_per_token: int = key(
    1, "best groups, to choose from", ARCH, at_least(1), most="trunk.moe.num_groups"
  )
  route_scale: float = key(1.0, "factor on the normalised gates", ARCH, ABOVE_0)
  bias_rate: float = key(0.001, "gamma, step of the balancing bias", NOT_NEGATIVE)
  bias_until: float = key(
    0.97, "fraction of training after which gamma is 0", FRACTION,
    when=_EXPERTS | {"trunk.moe.bias_rate": ON},
  )
  balance_weight: float = key(1e-4, "alpha of the sequence-wise loss", NOT_NEGATIVE)
  grouped_matmul: Literal["auto", "ragged", "blocked", "tokamax"] = key(
    "auto", "how it is computed, see kernels/grouped_matmul.py", RUNS
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkConfig:
  """The shared trunk. `num_layers` counts the layers of the deployed NTP model.

  kind: llama (RMSNorm, RoPE, SwiGLU) | gpt2 (LayerNorm, learned positions, GELU,
    biases). `qkv_bias` is for Qwen2, `qk_norm` for Qwen3.
  scan_layers, remat: auto is on and names; on a GPU the fastest of `layouts` that its
    memory holds, by XLA's own analysis of the compiled step.
  """

  kind: Literal["llama", "gpt2"] = key("llama", "family of the blocks", ARCH)
  num_layers: int = key(4, "layers of the deployed model", SIZE, at_least(1))
  embed_dim: int = key(128, "width of the stream", SIZE, at_least(1), by=_FSDP)
  mlp_dim: int = key(352, "width of dense layers", SIZE, at_least(1), by=_TENSOR)
  num_heads: int = key(4, "query heads", SIZE, at_least(1), by=_TENSOR)
  num_kv_heads: int = key(2, "key and value heads", SIZE, at_least(1), by=_TENSOR)
  attention_dim: int = key(
    0, "num_heads * head_dim of grouped attention; 0: embed_dim", SIZE, at_least(0),
    when={"trunk.attention_kind": ("grouped",)},
  )
  attention_kind: Literal["grouped", "latent"] = key(
    "grouped", "grouped-query, or latent with the sizes in `latent`", ARCH, when=_LLAMA
  )
  latent: LatentConfig = section({"trunk.attention_kind": ("latent",)})
  moe: MoeConfig = section(_EXPERTS)
  qkv_bias: bool = key(False, "biases of query, key and value", ARCH, when=_GROUPED)
  qk_norm: bool = key(False, "norms of query and key heads", ARCH, when=_GROUPED)
  tie_embeddings: bool = key(False, "embed and unembed by one matrix", ARCH)
  rope_theta: float = key(1e4, "base of the frequencies", ARCH, ABOVE_0, when=_LLAMA)
  rope_fraction: float = key(
    1.0, "share of a head's numbers that turns, the first ones", ARCH, SHARE,
    when=_GROUPED,
  )
  rope_scaling: RopeScalingConfig = section({"trunk.rope_scaling.kind": ("yarn",)})
  norm_eps: float = key(1e-6, "epsilon of all norms", ARCH, ABOVE_0)
  scan_layers: Literal["auto", "on", "off"] = key(
    "auto", "compile one layer, and loop", RUNS
  )
  remat: Literal["auto", "none", "names", "full"] = key(
    "auto", "what is recomputed", RUNS
  )
  compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = key(
    "auto", "of activations; auto: bfloat16 on accelerators, float32 on CPU"
  )
  attention: Literal[
    "auto", "xla", "blocked", "cudnn", "cudnn_packed", "tokamax"
  ] = key("auto", "how it is computed, see kernels/attention.py", RUNS)

  @property
  def head_dim(self) -> int:
    return (self.attention_dim or self.embed_dim) // self.num_heads

  @property
  def loops(self) -> bool:
    return self.scan_layers != "off"

  @property
  def layouts(self) -> list["TrunkConfig"]:
    """The ways to run the layers that `auto` leaves open, the fastest on a GPU first.

    Unrolled layers keep what XLA computed. A loop copies what it keeps into stacks and
    out of them: to keep all of it there takes longer than to compute some of it again.
    """
    found = []
    for scan, remat in (
      ("off", "none"), ("off", "names"), ("on", "names"), ("on", "full")
    ):
      scan = scan if self.scan_layers == "auto" else self.scan_layers
      remat = remat if self.remat == "auto" else self.remat
      values: dict[str, Any] = {"scan_layers": scan, "remat": remat}
      way = dataclasses.replace(self, **values)
      keeps_all_in_loop = (scan, remat) == ("on", "none") and self.remat == "auto"
      if way not in found and not keeps_all_in_loop:
        found.append(way)
    return found

  @property
  def dense_prefix(self) -> int:
    """How many layers come before the first with experts, where there are any."""
    return self.moe.dense_layers if self.moe.num_experts else 0

  def dense(self) -> "TrunkConfig":
    """Returns the trunk that its dense layers see: the same without experts."""
    return dataclasses.replace(
      self, moe=dataclasses.replace(self.moe, num_experts=0, dense_layers=0)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MtpConfig:
  """What is predicted beyond the next token, and how much it weighs.

  weighting:  `mean` gives each depth lambda / D, `sum` gives each lambda.
  schedule:   constant | piecewise (`weight` until `schedule_fraction` of the steps,
              then `final_weight`) | linear (from `weight` to `final_weight`) | anneal
              (linear to 0, reached at `schedule_fraction`).
  curriculum: none | forward (depths switched on one by one) | reverse (switched off).
  hidden:     chained (of module k - 1 at i) | trunk (the trunk's at i) | trunk_shifted
              (the trunk's at i + k - 1, of the token before the one that it is fed; see
              `predictors.sequential` for where there is none).
  fed:        the token i + k whose embedding module k sees: true | none (zeros) | own
              (the most likely one by depth k - 1).
  out_norm:   what the output matrix and the next sequential module read: own (the
              output of the block after a norm of the module's own) | none (the output
              as it is). docs/explanation has what published systems do.
  norm:       trunk (the kind of the trunk) | rms (RMSNorm on any trunk).
  unembed:    shared (the trunk's) | own (begins as a copy of the trunk's).
  markov_rank: rank of a table of the token before the target, of which each extra head
              adds a row to its logits (the Markov head of DSpark, published with 256).
  draft_vocab: so many most frequent tokens of the training text are all that EAGLE-3
              with an output matrix of its own can draft.
  zero_first: at the first position of a document modules see zeros instead of the
              embedding, as in vLLM.
  window:     so many upcoming tokens are ranked by TOP.
  draft_layers: DFlash has five; one would let no row of a block read what others have.
  one_mask:   the rows of a block share one mask, as in DFlash's code; files of other
              programs have no place for more.
  fc_norm, norm_output: the two norms of EAGLE-3.1.
  fc_bias:    EAGLE's own code has a bias after its map of state and embedding; vLLM has
              none, and drops it in silence.
  detach:     the extra depths learn, and the trunk learns from the next token alone, as
              without them.
  objective:  see `losses.OBJECTIVES`: cross_entropy (with the data) | kl | tv |
              log_acceptance (with the trunk's own distribution of the same token).
  feature_weight: weight of the distance between the states of the extra depths and
              the trunk's for the same token (EAGLE), relative to `objective`.
  score_from: start (wherever their target belongs to the answer) | answer (only at
              positions whose next token belongs to it: no model can predict an answer
              before the end of the prompt).
  arm:        added (extra modules on top of the deployed model) | shortened (the trunk
              loses as many layers as they add) | flops (plain NTP that is trained for
              the FLOPs that this kind and depth would have cost).
  """

  kind: str = key("none", "kind of predictor, see predictors.KINDS", ARCH)
  depth: int = key(0, "D extra tokens; 0: plain next-token", ARCH, at_least(0))
  weight: float = key(0.3, "lambda", HOST, NOT_NEGATIVE, when_given=_TRAINED)
  weighting: Literal["mean", "sum"] = key(
    "mean", "lambda / D or lambda for each depth", when_given=_DEPTH_2 | _MTP
  )
  schedule: Literal["constant", "piecewise", "linear", "anneal"] = key(
    "constant", "lambda over training", when_given=_TRAINED
  )
  schedule_fraction: float = key(
    0.67, "share of the steps", FRACTION, when={"mtp.schedule": ("piecewise", "anneal")}
  )
  final_weight: float = key(
    0.1, "lambda later", NOT_NEGATIVE, when={"mtp.schedule": ("piecewise", "linear")}
  )
  depth_weights: tuple[float, ...] = key((), "empty: all equal", when_given=_MTP)
  curriculum: Literal["none", "forward", "reverse"] = key(
    "none", "order in which depths are switched on or off", when_given=_TRAINED
  )
  share_modules: bool = key(
    False, "one module for all depths", ARCH, then=_DEPTH_2
  )
  dense_blocks: bool = key(
    False, "modules without experts", ARCH, when=_EXPERTS, then=_DEPTHS
  )
  mlp_dim: int = key(
    0, "of modules; 0: trunk.mlp_dim", ARCH, at_least(0), when=_DEPTHS, by=_TENSOR
  )
  hidden: Literal["chained", "trunk", "trunk_shifted"] = key(
    "chained", "state that module k starts from at position i", ARCH,
    then=_DEPTH_2, when_given=_MTP,
  )
  hidden_norm: Literal["after", "before"] = key(
    "after", "the trunk's state after or before its final norm", ARCH,
    then=_DEPTHS, when_given=_MTP,
  )
  fed: Literal["true", "none", "own"] = key(
    "true", "token whose embedding module k sees", ARCH, then=_DEPTHS
  )
  out_norm: Literal["own", "none"] = key(
    "own", "norm of a module's output", ARCH, then=_DEPTHS,
    when_given=_MTP,
  )
  norm: Literal["trunk", "rms"] = key(
    "trunk", "kind of a module's norms, but for its block", ARCH,
    then=_DEPTHS, when_given=_MTP | {"trunk.kind": ("gpt2",)},
  )
  unembed: Literal["shared", "own"] = key(
    "shared", "output matrix of the extra depths", ARCH, when=_DEPTHS
  )
  markov_rank: int = key(
    0, "rank of the heads' table of the token before; 0: none", ARCH, at_least(0),
    most="tokenizer.vocab_size", when=_DEPTHS,
  )
  draft_vocab: int = key(
    0, "tokens that can be drafted; 0: every token", ARCH, at_least(0),
    most="tokenizer.vocab_size", by=_TENSOR,
    when={"mtp.unembed": ("own",)},
  )
  zero_first: bool = key(
    False, "sequential modules see no embedding at position 0", ARCH, then=_DEPTHS,
    when_given=_MTP,
  )
  window: int = key(
    32, "upcoming tokens that are ranked", at_least(1), most="data.seq_len",
    when=_DEPTHS,
  )
  draft_layers: int = key(
    2, "layers of a block drafter", ARCH, at_least(1), at_most(64)
  )
  one_mask: bool = key(False, "one mask for all rows of a block", ARCH)
  fc_norm: bool = key(False, "norm of each stream that EAGLE-3 joins", ARCH)
  norm_output: bool = key(False, "EAGLE-3's steps read a normed state", ARCH)
  fc_bias: bool = key(True, "bias of EAGLE's map of state and embedding", ARCH)
  detach: bool = key(
    False, "no gradient from the extra depths to the trunk",
    then=_DEPTHS | {"train.freeze_trunk": (False,)}, when_given=_MTP,
  )
  objective: Literal["cross_entropy", "kl", "tv", "log_acceptance"] = key(
    "cross_entropy", "what the extra depths minimise", when=_DEPTHS
  )
  feature_weight: float = key(
    0.0, "weight of the distance of states", NOT_NEGATIVE, when=_DEPTHS, when_given=_MTP
  )
  score_from: Literal["start", "answer"] = key(
    "start", "where the extra depths of a task are scored", when_given=_TRAINED
  )
  arm: Literal["added", "shortened", "flops"] = key("added", "fairness arm", ARCH)
