"""Rules of rotary positions: an even part of a head turns, scalings have an order."""

from mtp_jax.config import TrunkConfig
from mtp_jax.machine_rules import Rule


def check_rotated_heads(rule: Rule, trunk: TrunkConfig) -> None:
  of = "trunk.attention_dim" if trunk.attention_dim else "trunk.embed_dim"
  rule(
    trunk.head_dim % 2 == 0, of,
    f"such that {of.removeprefix('trunk.')} / num_heads is even for RoPE (it is "
    f"{trunk.head_dim})",
  )
  if 0 < trunk.rope_fraction < 1:
    width = int(trunk.head_dim * trunk.rope_fraction)
    rule(
      width > 0 and width % 2 == 0, "trunk.rope_fraction",
      f"such that an even part of a head's {trunk.head_dim} numbers turns (it is "
      f"{width})",
    )


def check_rope_scaling(rule: Rule, trunk: TrunkConfig) -> None:
  scaling = trunk.rope_scaling
  if scaling.kind == "llama3":
    rule(
      scaling.high_freq_factor > scaling.low_freq_factor,
      "trunk.rope_scaling.high_freq_factor",
      f"larger than low_freq_factor ({scaling.low_freq_factor})",
    )
  if scaling.kind == "yarn":
    rule(
      scaling.beta_fast > scaling.beta_slow, "trunk.rope_scaling.beta_fast",
      f"larger than beta_slow ({scaling.beta_slow})",
    )
    rule(trunk.rope_theta > 1, "trunk.rope_theta", "more than 1 for yarn")
