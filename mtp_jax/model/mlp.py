"""Feed-forward layers: SwiGLU (Llama) and GELU with biases (GPT-2).

Legend: B batch, T sequence, D embed, F mlp.
"""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import TrunkConfig
from mtp_jax.kernels.dense import dense, gelu, swiglu
from mtp_jax.model.layers import compute_dtype, fan_in_normal, partitioned
from mtp_jax.sharding import constrain


class Mlp(nn.Module):
  """Maps x_BTD to out_BTD: SwiGLU for kind `llama`, GELU with biases for `gpt2`."""

  trunk: TrunkConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c, dtype = self.trunk, compute_dtype(self.trunk)
    D, F = c.embed_dim, c.mlp_dim

    def widen(name: str) -> jax.Array:
      kernel = self.param(name, partitioned(fan_in_normal(D), "embed", "mlp"), (D, F))
      hidden_BTF = dense(x_BTD, kernel.astype(dtype))
      if c.kind == "gpt2":
        zeros = partitioned(nn.initializers.zeros, "mlp")
        hidden_BTF += self.param(f"{name}_bias", zeros, (F,)).astype(dtype)
      hidden_BTF = constrain(hidden_BTF, "batch", "seq", "mlp")
      return checkpoint_name(hidden_BTF, f"mlp_{name}")

    if c.kind == "llama":
      hidden_BTF = swiglu(widen("gate"), widen("up"))
    else:
      hidden_BTF = gelu(widen("up"))
    gain = (2 * c.num_layers) ** -0.5  # Keeps the residual stream's size (GPT-2).
    kernel = self.param(
      "down", partitioned(fan_in_normal(F, gain), "mlp", "embed"), (F, D)
    )
    out_BTD = dense(hidden_BTF, kernel.astype(dtype))
    if c.kind == "gpt2":
      zeros = partitioned(nn.initializers.zeros, "norm")
      out_BTD += self.param("down_bias", zeros, (D,)).astype(dtype)
    return out_BTD
