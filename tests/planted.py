"""Models whose drafts are right now and then, without training.

After a token comes mostly its follower, by a permutation of the vocabulary: the
embeddings are random, and the output matrix has the embedding of a token as the column
of its follower. The predictors pass on the embedding that they are given. What is
random beside that decides how often the trunk and the predictors go other ways.
"""

import jax
import numpy as np

from tests import common

SIZES = {
  "tokenizer.vocab_size": 258, "trunk.embed_dim": 64, "trunk.num_heads": 2,
  "trunk.num_kv_heads": 1, "trunk.num_layers": 2, "trunk.mlp_dim": 96,
  "data.seq_len": 128, "trunk.remat": "none",
}
EXPERTS = common.EXPERTS | {"trunk.moe.expert_dim": 32}
LATENT = {
  "trunk.attention_kind": "latent", "trunk.num_kv_heads": 2,
  "trunk.latent.query_rank": 32, "trunk.latent.kv_rank": 32,
  "trunk.latent.nope_dim": 16, "trunk.latent.rope_dim": 16,
  "trunk.latent.value_dim": 32,
}
# Name -> layout, layout of the trunk of a drafter, kind, depth, overrides.
CASES = {
  "gpt2": ("gpt2", "", "none", 0, {"trunk.kind": "gpt2", "trunk.num_kv_heads": 2}),
  "llama": ("llama", "", "none", 0, {}),
  "qwen2": ("qwen2", "", "none", 0, {"trunk.qkv_bias": True}),
  "qwen3": ("qwen3", "", "none", 0, {"trunk.qk_norm": True}),
  "mimo": ("mimo", "", "sequential", 1, {"trunk.qkv_bias": True}),
  "glm4_moe": ("glm4_moe", "", "sequential", 1, {"trunk.qkv_bias": True}),
  "glm4_moe, D = 2": ("glm4_moe", "", "sequential", 2, {"trunk.qk_norm": True}),
  "glm4_moe, experts": ("glm4_moe", "", "sequential", 1, EXPERTS),
  "glm4_moe, experts, D = 3": ("glm4_moe", "", "sequential", 3, EXPERTS),
  "deepseek_v3": ("deepseek_v3", "", "sequential", 1, LATENT),
  "deepseek_v3, experts": ("deepseek_v3", "", "sequential", 1, LATENT | EXPERTS),
  "deepseek_v3, experts, D = 2": (
    "deepseek_v3", "", "sequential", 2, LATENT | EXPERTS
  ),
  "deepseek_v3, experts, D = 3": (
    "deepseek_v3", "", "sequential", 3, LATENT | EXPERTS
  ),
  "medusa": ("medusa", "llama", "medusa", 2, {"mtp.unembed": "own"}),
  "eagle": ("eagle", "llama", "eagle", 2, {"mtp.fc_bias": False}),
  "eagle3": (
    "eagle3", "llama", "eagle3", 2,
    {"mtp.unembed": "own", "trunk.num_kv_heads": 2, "trunk.num_layers": 3},
  ),
  "eagle3, reduced": (
    "eagle3", "llama", "eagle3", 2,
    {
      "mtp.unembed": "own", "trunk.num_kv_heads": 2, "trunk.num_layers": 3,
      "mtp.draft_vocab": 200,
    },
  ),
  "peagle": (
    "peagle", "llama", "peagle", 2,
    {"mtp.unembed": "own", "trunk.num_kv_heads": 2, "trunk.num_layers": 3},
  ),
  "dflash": (
    "dflash", "qwen3", "dflash", 2,
    {
      "mtp.unembed": "own", "trunk.num_kv_heads": 2, "trunk.num_layers": 3,
      "mtp.one_mask": True, "trunk.qk_norm": True,
    },
  ),
}  # fmt: skip
# Of blocks, what is added to the residual stream.
_OUTPUTS = ("out", "down")
_NOISE = 0.6


def config_of(case, overrides=None):
  _, _, kind, depth, values = CASES[case]
  return common.tiny_config(kind, depth, SIZES | values | (overrides or {}))


def planted(config, seed=0):
  """Returns parameters of `config` as the module says."""
  rng = np.random.default_rng(seed)
  params = common.random_params(config, seed)
  size, dim = config.tokenizer.vocab_size, config.trunk.embed_dim
  follower = rng.permutation(size)

  def near_1(path, x):
    name = path[-1].key
    if name in _OUTPUTS:
      return 0.1 * x
    return 1 + 0.3 * (x - 1) if name == "scale" else x

  params = jax.tree_util.tree_map_with_path(near_1, params)
  embedding = rng.standard_normal((size, dim))
  embedding[:, 0] = 4  # What all tokens share: see `_attend_to_itself`.
  params["embed"]["embedding"] = embedding

  def unembedding(steps):
    matrix, at = np.zeros((dim, size)), np.arange(size)
    for _ in range(steps):
      at = follower[at]
    matrix[:, at] = embedding.T
    return matrix / dim**0.5

  noise = lambda shape: _NOISE * rng.standard_normal(shape)  # noqa: E731
  if config.trunk.kind == "gpt2":
    params["embed"]["embedding"] = embedding = embedding / 10
  if not config.trunk.tie_embeddings:
    params["unembed"]["kernel"] = unembedding(1)
  mtp, own = params.get("mtp", {}), np.eye(dim)
  through = np.concatenate([noise((dim, dim)) / dim**0.5, own])
  if config.mtp.kind == "sequential":
    shape = (config.mtp.depth, dim, dim)
    from_state = noise(shape) / dim**0.5
    mtp["modules"]["projection"] = np.concatenate(
      [from_state, np.broadcast_to(own, shape)], axis=1
    )
    if config.mtp.depth > 1 and config.trunk.attention_kind == "grouped":
      # The next module reads the state before this norm in vLLM's GLM-4.5, which makes
      # no difference without a gain.
      out_norm = mtp["modules"]["out_norm"]
      out_norm["scale"] = np.ones_like(out_norm["scale"])
  elif config.mtp.kind == "medusa":
    mtp["kernels"] = noise(mtp["kernels"].shape) / dim**0.5
    mtp["biases"] = 2 * noise(mtp["biases"].shape)
    mtp["unembed"] = np.stack(
      [unembedding(2 + k) for k in range(config.mtp.depth)]
    ) + noise(mtp["unembed"].shape) / dim**0.5
  elif config.mtp.kind == "eagle":
    mtp["layer"]["projection"] = through
  elif config.mtp.kind == "eagle3":
    mtp["fusion"]["kernel"] = noise((3 * dim, dim)) / dim
    mtp["unembed"] = unembedding(1)
    if number := config.mtp.draft_vocab:
      ids = np.sort(rng.permutation(size)[:number])
      mtp["draft_tokens"] = ids
      mtp["unembed"] = mtp["unembed"][:, ids]
    _look_back(mtp["layer"]["attention"], config, (0, 0))
  elif config.mtp.kind in ("peagle", "dflash"):
    # A row writes what it finds at one distance into one half, for the first draft, and
    # at a larger distance into the other half, for the second.
    half = dim // 2
    mtp["unembed"] = np.concatenate([
      unembedding(1)[:half], unembedding(2)[:half]
    ])
    mask = 0.3 * np.append(4, rng.standard_normal(dim - 1))
    if config.mtp.kind == "peagle":
      mtp["fusion"]["kernel"] = noise((3 * dim, dim)) / dim
      mtp["mask_embedding"] = mask
      _look_back(mtp["layer"]["attention"], config, (0, 1), half)
    else:
      mtp["fusion"]["kernel"] = noise((3 * dim, dim)) / dim + np.eye(3 * dim, dim)
      mtp["masks"] = mask[None]
      _look_back(mtp["layer_0"]["attention"], config, (1, 2), half)
  return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def _look_back(attention, config, distances, half=None):
  """Makes each head read the embedding at one distance alone: there is no other way to
  an embedding.

  Queries and keys are one constant vector, made of what all embeddings share, so that
  rotation alone tells positions apart: the query is turned back by the distance, so
  that the key there has the largest product. `half`: all heads read so many dimensions,
  the first ones; None: each head its own.
  """
  dim, heads, size = config.trunk.embed_dim, config.trunk.num_heads, (
    config.trunk.head_dim
  )
  width = len(attention["query"])  # Behind the hidden state, if that is read too.
  first, pairs = width - dim, size // 2
  turn = config.trunk.rope_theta ** (-np.arange(pairs) / pairs)
  angle = np.array(distances)[:, None] * turn
  attention["key"] = np.zeros((width, heads, size))
  attention["key"][first] = 1.5
  attention["query"] = np.zeros((width, heads, size))
  attention["query"][first, :, :pairs] = 1.5 * (np.cos(angle) + np.sin(angle))
  attention["query"][first, :, pairs:] = 1.5 * (np.cos(angle) - np.sin(angle))
  values = np.concatenate([np.zeros((first, dim)), np.eye(dim)])
  if half is not None:
    values[:, half:] = values[:, :half]
  attention["value"] = values.reshape(width, heads, size)
  attention["out"] = 3 * np.eye(dim).reshape(heads, size, dim)
  for name in ("query_head_norm", "key_head_norm"):
    if name in attention:  # The length does not count: two pairs alone do, and much.
      scale = np.zeros(size)
      scale[[0, 1, pairs, pairs + 1]] = 5
      attention[name]["scale"] = scale
