"""Attention and blocks equal torch: published equations, and transformers' layers.

Everything in float64, gradients of every parameter and of the input included.
"""

import dataclasses

import jax
import numpy as np
import pytest

from mtp_jax.model.block import Block
from mtp_jax.model.latent_attention import LatentAttention
from tests.common import (
  LATENT,
  packed_batch,
  random_layer_params,
  tiny_config,
)

torch = pytest.importorskip("torch", reason="the parity test needs torch")
# It keeps torch's types when it is imported: before a test changes what they are.
pytest.importorskip("safetensors.torch")

DIRECT = {"trunk.latent.query_rank": 0}
YARN = {
  "kind": "yarn", "factor": 6.0, "original_length": 16, "beta_fast": 2.0,
  "beta_slow": 0.1, "mscale": 0.6, "mscale_all_dim": 0.9,
}
LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_length": 64}
THETA = {"trunk.rope_theta": 100.0}  # So that 8 dims have slow and fast pairs.


def scaled(scaling):
  return THETA | {f"trunk.rope_scaling.{key}": v for key, v in scaling.items()}


@dataclasses.dataclass
class Case:
  """A layer of ours at random parameters, its batch, output and gradients."""

  trunk: object
  batch: object
  x_BTD: np.ndarray
  d_out_BTD: np.ndarray
  params: dict
  out_BTD: np.ndarray
  grads: dict
  d_x_BTD: np.ndarray


def run(layer_type, overrides):
  """Returns the `Case` on packed documents and padding."""
  config = tiny_config(overrides={"trunk.compute_dtype": "float64"} | overrides)
  trunk, batch = config.trunk, packed_batch(config, padding=True)
  layer = layer_type(trunk)
  rng = np.random.default_rng(1)
  x_BTD, d_out_BTD = rng.normal(size=(2, *batch.tokens.shape, trunk.embed_dim))

  @jax.jit
  def vjp(params, x_BTD, d_out_BTD):
    apply = lambda p, x: layer.apply(  # noqa: E731
      {"params": p}, x, batch.positions, batch.segment_ids
    )[0]
    out_BTD, pullback = jax.vjp(apply, params, x_BTD)
    return out_BTD, *pullback(d_out_BTD)

  with jax.enable_x64(True):
    params = random_layer_params(layer, trunk)
    found = jax.device_get(vjp(params, x_BTD, d_out_BTD))
  assert found[0].dtype == np.float64
  return Case(trunk, batch, x_BTD, d_out_BTD, params, *found)


def mask_of(batch):
  """Which key [.., S] each query [B, T, ..] sees."""
  segments = torch.tensor(batch.segment_ids)
  length = segments.shape[1]
  causal = torch.ones(length, length, dtype=torch.bool).tril()
  return causal & (segments[:, :, None] == segments[:, None, :])


def assert_equal(name, found, expected):
  size = np.abs(expected).max()
  assert size > 0.01, name
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * size, err_msg=name)


@pytest.fixture
def float64_everywhere(monkeypatch):
  """Widens what transformers rounds to float32 by name: norms, softmax, rotation."""
  for name in ("float", "float32"):
    monkeypatch.setattr(torch, name, torch.float64)
  before = torch.get_default_dtype()
  torch.set_default_dtype(torch.float64)
  yield
  torch.set_default_dtype(before)


def published(params, x_BTD, batch, trunk):
  """Equations 1 to 11 of the DeepSeek-V3 report, one head at a time.

  Rotation is that of complex numbers, without scaling of its frequencies.
  """
  sizes = trunk.latent
  C, P, R = sizes.nope_dim, sizes.rope_dim, sizes.kv_rank
  seen, positions = mask_of(batch), torch.tensor(batch.positions)

  def norm(x, scale):
    return scale * x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)

  def rope(x_BTP):
    pairs = torch.complex(x_BTP[..., : P // 2], x_BTP[..., P // 2 :])
    turns = torch.tensor([trunk.rope_theta ** (-2 * f / P) for f in range(P // 2)])
    pairs = pairs * torch.exp(1j * positions[..., None] * turns)
    return torch.cat([pairs.real, pairs.imag], dim=-1)

  c_query = x_BTD
  if sizes.query_rank:
    c_query = norm(x_BTD @ params["query_down"], params["query_norm"]["scale"])
  c_kv = norm(x_BTD @ params["kv_down"][:, :R], params["kv_norm"]["scale"])
  k_rope = rope(x_BTD @ params["kv_down"][:, R:])
  out = 0
  for n in range(trunk.num_heads):
    query, up = params["query"][:, n], params["kv_up"][:, n]
    scores = (c_query @ query[:, :C]) @ (c_kv @ up[:, :C]).mT
    scores = scores + rope(c_query @ query[:, C:]) @ k_rope.mT
    scores = (scores / (C + P) ** 0.5).masked_fill(~seen, -torch.inf)
    out = out + scores.softmax(-1) @ (c_kv @ up[:, C:]) @ params["out"][n]
  return out


@pytest.mark.parametrize("options", [{}, DIRECT], ids=["compressed", "direct"])
def test_latent_attention_equals_its_equations(options, float64_everywhere):
  case = run(LatentAttention, LATENT | THETA | options)
  leaf = lambda x: torch.tensor(np.asarray(x)).requires_grad_()  # noqa: E731
  params, x = jax.tree.map(leaf, case.params), leaf(case.x_BTD)
  out = published(params, x, case.batch, case.trunk)
  out.backward(torch.tensor(case.d_out_BTD))
  assert_equal("out", case.out_BTD, out.detach().numpy())
  assert_equal("x", case.d_x_BTD, x.grad.numpy())
  for (path, found), expected in zip(
    jax.tree_util.tree_leaves_with_path(case.grads), jax.tree.leaves(params),
    strict=True,
  ):
    assert_equal(jax.tree_util.keystr(path), found, expected.grad.numpy())


def peer_scaling(trunk):
  """Returns transformers' `rope_parameters`."""
  scaling = dataclasses.asdict(trunk.rope_scaling)
  kind = scaling.pop("kind")
  scaling["original_max_position_embeddings"] = scaling.pop("original_length")
  kind = "default" if kind == "none" else kind
  return scaling | {"rope_type": kind, "rope_theta": trunk.rope_theta}


def compare(case, layer, rotary, to_state, call):
  """Loads our parameters by `to_state` and compares output and all gradients."""
  layer = layer.double()
  state = {k: torch.tensor(np.asarray(v)) for k, v in to_state(case.params).items()}
  layer.load_state_dict(state, strict=True)
  x = torch.tensor(case.x_BTD).requires_grad_()
  cos_sin = rotary(x, torch.tensor(case.batch.positions))
  assert cos_sin[0].dtype == torch.float64
  mask_BTT = torch.where(mask_of(case.batch), 0.0, -torch.inf)[:, None]
  out = call(layer, x, cos_sin, mask_BTT)
  out.backward(torch.tensor(case.d_out_BTD))
  assert_equal("out", case.out_BTD, out.detach().numpy())
  assert_equal("x", case.d_x_BTD, x.grad.numpy())
  found = to_state(case.grads)
  for name, parameter in layer.named_parameters():
    assert_equal(name, found[name], parameter.grad.numpy())
  assert found.keys() == dict(layer.named_parameters()).keys()


def rows(kernel):
  """[in, heads, size] or [in, out] as torch's [out, in]."""
  return kernel.reshape(len(kernel), -1).T


def interleaved(kernel, start):
  """Halves of the last axis after `start` as DeepSeek's alternating pairs."""
  first, second = np.split(kernel[..., start:], 2, axis=-1)
  pairs = np.stack([first, second], axis=-1).reshape(kernel[..., start:].shape)
  return np.concatenate([kernel[..., :start], pairs], axis=-1)


@pytest.mark.parametrize(
  "options",
  [scaled({"kind": "none"}), DIRECT | scaled(YARN), scaled(YARN)],
  ids=["plain", "direct-yarn", "yarn"],
)
def test_latent_attention_equals_deepseek_in_transformers(options, float64_everywhere):
  deepseek = pytest.importorskip(
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    reason="the parity test needs transformers",
  )
  case = run(LatentAttention, LATENT | {"trunk.latent.rope_dim": 8} | options)
  trunk, sizes = case.trunk, case.trunk.latent
  config = deepseek.DeepseekV3Config(
    hidden_size=trunk.embed_dim, num_attention_heads=trunk.num_heads,
    num_key_value_heads=trunk.num_heads, q_lora_rank=sizes.query_rank or None,
    kv_lora_rank=sizes.kv_rank, qk_nope_head_dim=sizes.nope_dim,
    qk_rope_head_dim=sizes.rope_dim, v_head_dim=sizes.value_dim,
    rope_parameters=peer_scaling(trunk),
  )
  config._attn_implementation = "eager"

  def to_state(tree):
    query = rows(interleaved(tree["query"], sizes.nope_dim))
    state = {
      "kv_a_proj_with_mqa.weight": rows(interleaved(tree["kv_down"], sizes.kv_rank)),
      "kv_a_layernorm.weight": tree["kv_norm"]["scale"],
      "kv_b_proj.weight": rows(tree["kv_up"]),
      "o_proj.weight": tree["out"].reshape(-1, trunk.embed_dim).T,
    }
    if not sizes.query_rank:
      return state | {"q_proj.weight": query}
    return state | {
      "q_a_proj.weight": rows(tree["query_down"]),
      "q_a_layernorm.weight": tree["query_norm"]["scale"],
      "q_b_proj.weight": query,
    }

  compare(
    case, deepseek.DeepseekV3Attention(config, 0),
    deepseek.DeepseekV3RotaryEmbedding(config), to_state,
    lambda layer, x, cos_sin, mask: layer(x, cos_sin, mask)[0],
  )


@pytest.mark.parametrize(
  "family, options",
  [
    ("llama", scaled(LLAMA3)),
    ("qwen2", {"trunk.qkv_bias": True}),
    ("qwen3", {"trunk.qk_norm": True, "trunk.attention_dim": 32}),
  ],
)
def test_grouped_blocks_equal_transformers(family, options, float64_everywhere):
  transformers = pytest.importorskip(
    "transformers", reason="the parity test needs transformers"
  )
  modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
  prefix = family.capitalize()
  case = run(Block, options)
  trunk = case.trunk
  config = getattr(transformers, f"{prefix}Config")(
    hidden_size=trunk.embed_dim, intermediate_size=trunk.mlp_dim,
    num_attention_heads=trunk.num_heads, num_key_value_heads=trunk.num_kv_heads,
    head_dim=trunk.head_dim, rms_norm_eps=trunk.norm_eps, num_hidden_layers=1,
    rope_parameters=peer_scaling(trunk),
  )
  config._attn_implementation = "eager"

  def to_state(tree):
    attention, mlp = tree["attention"], tree["mlp"]
    state = {
      "input_layernorm.weight": tree["attention_norm"]["scale"],
      "post_attention_layernorm.weight": tree["mlp_norm"]["scale"],
      "self_attn.o_proj.weight": attention["out"].reshape(-1, trunk.embed_dim).T,
    }
    for name in ("gate", "up", "down"):
      state[f"mlp.{name}_proj.weight"] = mlp[name].T
    for name in ("query", "key", "value"):
      to = f"self_attn.{name[0]}_proj"
      state[f"{to}.weight"] = rows(attention[name])
      if trunk.qkv_bias:
        state[f"{to}.bias"] = attention[f"{name}_bias"].reshape(-1)
    if trunk.qk_norm:
      for name in ("query", "key"):
        norm = attention[f"{name}_head_norm"]["scale"]
        state[f"self_attn.{name[0]}_norm.weight"] = norm
    return state

  compare(
    case, getattr(modeling, f"{prefix}DecoderLayer")(config, 0),
    getattr(modeling, f"{prefix}RotaryEmbedding")(config), to_state,
    lambda layer, x, cos_sin, mask: layer(
      x, attention_mask=mask, position_embeddings=cos_sin
    ),
  )
