"""The predictors of more than one token: one file a kind, one row each in `KINDS`.

A file holds the Flax module of its kind, how it drafts, its FLOPs, its parameters on a
given trunk and its contract; `interface.Kind` lists what a row may have. No code
outside of this package and `interop` asks which kind a model has: it reads the row.
"""

import dataclasses
from typing import Any

from mtp_jax.config import Config, ConfigError, MtpConfig, TrunkConfig
from mtp_jax.predictors import (
  dflash,
  eagle,
  linear,
  medusa,
  parallel,
  peagle,
  sequential,
  top,
)
from mtp_jax.predictors.interface import Given, Kind

__all__ = ["KINDS", "Given", "Kind", "kind_of"]

# By `mtp.kind`, in the order of tables and legends.
KINDS: dict[str, Kind] = {
  "none": linear.NEXT_TOKEN,
  "parallel": parallel.PARALLEL,
  "sequential": sequential.SEQUENTIAL,
  "linear": linear.LINEAR,
  "medusa": medusa.MEDUSA,
  "eagle": eagle.EAGLE,
  "eagle3": eagle.EAGLE3,
  "peagle": peagle.PEAGLE,
  "dflash": dflash.DFLASH,
  "top": top.TOP,
}


def kind_of(mtp: MtpConfig) -> Kind:
  """Returns the row of `mtp.kind`.

  Raises:
    ConfigError: there is no such kind.
  """
  if mtp.kind not in KINDS:
    names = ", ".join(map(repr, KINDS))
    raise ConfigError(f"mtp.kind must be one of {names}, got {mtp.kind!r}.")
  return KINDS[mtp.kind]


def reading(key: str) -> tuple[str, ...]:
  """Returns the kinds that read a key of `mtp`."""
  return tuple(name for name, kind in KINDS.items() if key in kind.reads)


def num_drafts(mtp: MtpConfig) -> int:
  """Tokens that the predictors draft a round, each once."""
  return mtp.depth if kind_of(mtp).drafter is not None else 0


def tokens_after_row(mtp: MtpConfig) -> int:
  """Tokens after a row of training text that its last position learns from."""
  is_ranked = mtp.depth > 0 and kind_of(mtp).upcoming is not None
  return max(1 + mtp.depth, mtp.window if is_ranked else 0)


def num_added_layers(mtp: MtpConfig) -> int:
  """Transformer layers that training has and the deployed NTP model has not."""
  return kind_of(mtp).added_layers(mtp) if mtp.depth else 0


def predictor_trunk(trunk: TrunkConfig, mtp: MtpConfig) -> TrunkConfig:
  """Returns the trunk that the blocks of the extra predictors are built from."""
  trunk = trunk.dense() if mtp.dense_blocks or kind_of(mtp).is_dense else trunk
  return dataclasses.replace(trunk, mlp_dim=mtp.mlp_dim or trunk.mlp_dim)


def num_trunk_layers(config: Config) -> int:
  """Layers of the shared trunk, given the kind of predictor and the fairness arm.

  `trunk.num_layers` counts what is deployed for next-token prediction. Parallel heads
  deploy their first head, so their trunk is one layer shorter than the NTP trunk: with
  D = 0 they are the same function. In the `shortened` arm (Gloeckle et al. 2024,
  section 3) the trunk also gives up the layers of the extra modules.
  """
  layers = config.trunk.num_layers - kind_of(config.mtp).deployed_blocks
  if config.mtp.arm == "shortened":
    layers -= num_added_layers(config.mtp)
  return layers


def tapped_layers(config: Config) -> tuple[int, ...]:
  """Returns after how many trunk layers streams are taken besides the last one."""
  return kind_of(config.mtp).tapped_layers(num_trunk_layers(config))


def routed_layers(config: Config) -> dict[str, int]:
  """Returns how many layers with experts there are in the `trunk` and in `mtp`.

  These are the routings of one forward pass: a shared module counts once per depth.
  A part without any is left out.
  """
  moe = config.trunk.moe
  if moe.num_experts == 0:
    return {}
  in_mtp = kind_of(config.mtp).blocks(config.mtp)
  if predictor_trunk(config.trunk, config.mtp).moe.num_experts == 0:
    in_mtp = 0
  in_trunk = num_trunk_layers(config) - moe.dense_layers
  return {"trunk": in_trunk} | ({"mtp": in_mtp} if in_mtp else {})


def contract(config: Config) -> dict[str, Any]:
  """Returns the facts that a reader of the parameters needs besides their names."""
  mtp, trunk = config.mtp, config.trunk
  return {
    "kind": mtp.kind,
    "depth": mtp.depth,
    "share_modules": mtp.share_modules,
    "depth_m_predicts": "token i + 1 + m at position i; m = 0 is the next token",
    "hidden_source": "trunk output after its final norm",
    "embedding_source": None,
    "output_norm": "final norm",
    "module_norms": None,
    "concat_order": None,
    "next_token_head": "trunk",
    "embedding_shared": True,
    "unembedding_shared": mtp.unembed == "shared",
    "tied_embeddings": trunk.tie_embeddings,
    "positions": {"kind": "learned", "count": config.data.seq_len}
    if trunk.kind == "gpt2"
    else {
      "kind": "rotary",
      "theta": trunk.rope_theta,
      "scaling": dataclasses.asdict(trunk.rope_scaling),
    } | ({"fraction": trunk.rope_fraction} if trunk.rope_fraction < 1 else {}),
  } | kind_of(mtp).contract(mtp, tapped_layers(config))
