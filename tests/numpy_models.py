"""DeepSeek-V3, GLM-4.5 and MiMo with their MTP layers, and Llama trunks with Medusa and
EAGLE drafters in folders of their own, in plain NumPy, float64, from files.

Written from the equations of the DeepSeek-V3 report (arXiv 2412.19437), the Qwen2 and
MiMo reports, and the code of Medusa and EAGLE, on the names that the released
checkpoints have; nothing of mtp_jax is used. One document of one row.

Legend: T tokens, D embed, N heads, H head dim, E experts, V vocab.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class Weights:
  """The tensors whose names begin with `prefix`, and the values of config.json."""

  def __init__(self, folder: Path):
    self.tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
      self.tensors |= load_file(file)
    self.config = json.loads((folder / "config.json").read_text())
    self.config = self.config.get("transformer_layer_config", {}) | self.config
    contract = json.loads((folder / "mtp_contract.json").read_text())
    self.zeroes = contract.get("embedding_zeroed_at_position_0", False)
    self.prefix = ""

  def at(self, prefix: str) -> "Weights":
    other = object.__new__(Weights)
    other.tensors, other.config = self.tensors, self.config
    other.prefix = f"{self.prefix}{prefix}."
    return other

  def unless_zeroed(self, embedding_TD: np.ndarray) -> np.ndarray:
    """Returns embeddings as MTP layers see them: vLLM has zeros at position 0."""
    if self.zeroes:
      embedding_TD[0] = 0
    return embedding_TD

  def __getitem__(self, name: str) -> np.ndarray:
    return self.tensors[self.prefix + name].astype(np.float64)

  def linear(self, name: str, x: np.ndarray) -> np.ndarray:
    y = x @ self[f"{name}.weight"].T
    has_bias = f"{self.prefix}{name}.bias" in self.tensors
    return y + self[f"{name}.bias"] if has_bias else y

  def norm(self, name: str, x: np.ndarray, eps: float | None = None) -> np.ndarray:
    eps = self.config["rms_norm_eps"] if eps is None else eps
    size = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return x / size * self[f"{name}.weight"]


def logits(folder: Path, tokens: np.ndarray, length: int) -> np.ndarray:
  """Returns logits_MTV of the first `length` rows; `tokens` has M - 1 more."""
  weights = Weights(folder)
  is_mimo = weights.config["architectures"] == ["MiMoForCausalLM"]
  run = _mimo if is_mimo else _deepseek
  return np.stack(run(weights, tokens, length))


def medusa_logits(trunk: Path, heads: Path, tokens: np.ndarray) -> np.ndarray:
  """Returns logits_MTV of a trunk and Medusa heads, whose vocabulary matrices count."""
  w, m = Weights(trunk), Weights(heads)
  _, h_TD = _llama(w, tokens)
  out = [h_TD @ _head(w)["weight"].T]
  for k in range(m.config["medusa_num_heads"]):
    gate_TD = m.linear(f"{k}.0.linear", h_TD)
    out.append(m.linear(f"{k}.1", h_TD + gate_TD / (1 + np.exp(-gate_TD))))
  return np.stack(out)


def eagle_logits(
  trunk: Path, drafter: Path, tokens: np.ndarray, length: int, depth: int
) -> np.ndarray:
  """Returns logits_MTV of a trunk and a recursive drafter, drafting at every row.

  At row i the drafter has run on the features of rows 0 to i, each beside the token
  after it; then it goes on from its own output and the next true tokens.
  """
  w, e = Weights(trunk), Weights(drafter)
  streams, h_TD = _llama(w, tokens[:length])
  embedding_VD = w["model.embed_tokens.weight"]
  is_eagle3 = "draft_vocab_size" in e.config
  is_masked = "mask_token_id" in e.config
  if is_eagle3:
    layers = w.config["num_hidden_layers"]
    taps = [streams[i] for i in e.config.get(
      "eagle_aux_hidden_state_layer_ids", (2, layers // 2, layers - 3)
    )]
    feature_TD = e.linear("fc", np.concatenate(taps, axis=-1))
  else:
    feature_TD = h_TD
  out = [h_TD @ _head(w)["weight"].T, *np.zeros((depth, length, len(embedding_VD)))]
  for i in range(length):
    states = list(feature_TD[: i + 1])
    for k in range(1, 1 + depth):
      read = tokens[1 : 1 + len(states)].copy()
      if is_masked:  # P-EAGLE reads masks after the first step.
        read[i + 1 :] = e.config["mask_token_id"]
        embedding_VD = e["embed_tokens.weight"]
      ahead = embedding_VD[read]
      run = _eagle3 if is_eagle3 else _eagle
      state_D = run(e, ahead, np.array(states))[-1]
      states.append(e.linear("fc", e["mask_hidden"][0, 0]) if is_masked else state_D)
      if is_eagle3:
        out[k][i] = _drafted(e, state_D, len(embedding_VD))
      else:
        out[k][i] = states[-1] @ _head(w)["weight"].T
  return np.stack(out)


def _drafted(w: Weights, state_D: np.ndarray, vocab_size: int) -> np.ndarray:
  """Returns logits_V; -inf for tokens that cannot be drafted."""
  found = w.linear("lm_head", w.norm("norm", state_D))
  if "d2t" not in w.tensors:
    return found
  out_V = np.full(vocab_size, -np.inf)
  out_V[np.arange(len(found)) + w.tensors["d2t"]] = found
  return out_V


def dflash_logits(
  trunk: Path, drafter: Path, tokens: np.ndarray, length: int
) -> np.ndarray:
  """Returns logits_MTV of a trunk and a block drafter, one block after the other."""
  w, e = Weights(trunk), Weights(drafter)
  streams, h_TD = _llama(w, tokens[:length])
  depth = e.config["block_size"] - 1
  taps = [streams[i] for i in e.config["aux_hidden_state_layer_ids"]]
  context_TD = e.norm("hidden_norm", e.linear("fc", np.concatenate(taps, axis=-1)))
  size = len(e["embed_tokens.weight"])
  out = [h_TD @ _head(w)["weight"].T, *np.zeros((depth, length, size))]
  for i in range(length):
    ids = [tokens[i + 1], *[e.config["mask_token_id"]] * depth]
    x_RD = e["embed_tokens.weight"][ids]
    for n in range(e.config["num_hidden_layers"]):
      layer = e.at(f"layers.{n}")
      normed_RD = layer.norm("input_layernorm", x_RD)
      seen = np.concatenate([context_TD[: i + 1], normed_RD])
      x_RD = x_RD + _grouped(layer.at("self_attn"), seen, rows=len(x_RD))
      x_RD = x_RD + _swiglu(
        layer.at("mlp"), layer.norm("post_attention_layernorm", x_RD)
      )
    for k in range(1, 1 + depth):
      out[k][i] = _drafted(e, x_RD[k], size)
  return np.stack(out)


def _eagle(w: Weights, ahead_TD: np.ndarray, state_TD: np.ndarray) -> np.ndarray:
  layer = w.at("layers.0")
  x_TD = w.linear("fc", np.concatenate([ahead_TD, state_TD], axis=-1))
  x_TD = x_TD + _grouped(layer.at("self_attn"), x_TD)
  normed_TD = layer.norm("post_attention_layernorm", x_TD)
  return x_TD + _swiglu(layer.at("mlp"), normed_TD)


def _eagle3(w: Weights, ahead_TD: np.ndarray, state_TD: np.ndarray) -> np.ndarray:
  layer = w.at("layers.0" if "mask_token_id" in w.config else "midlayer")
  joined = np.concatenate(
    [layer.norm("input_layernorm", ahead_TD), layer.norm("hidden_norm", state_TD)],
    axis=-1,
  )
  x_TD = state_TD + _grouped(layer.at("self_attn"), joined)
  normed_TD = layer.norm("post_attention_layernorm", x_TD)
  return x_TD + _swiglu(layer.at("mlp"), normed_TD)


def _llama(w: Weights, tokens: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
  """Returns the residual streams, after 0, 1, ... layers, and the normed last one."""
  trunk = w.at("model")
  streams = [trunk["embed_tokens.weight"][tokens]]
  for i in range(w.config["num_hidden_layers"]):
    streams.append(_layer(trunk.at(f"layers.{i}"), streams[-1]))
  return streams, trunk.norm("norm", streams[-1])


def _deepseek(w: Weights, tokens: np.ndarray, length: int) -> list[np.ndarray]:
  trunk, num_layers = w.at("model"), w.config["num_hidden_layers"]
  h_TD = trunk["embed_tokens.weight"][tokens[:length]]
  for i in range(num_layers):
    h_TD = _layer(trunk.at(f"layers.{i}"), h_TD, i)
  h_TD = trunk.norm("norm", h_TD)
  out = [h_TD @ _head(w)["weight"].T]
  for k in range(1, 1 + w.config["num_nextn_predict_layers"]):
    index = num_layers + k - 1
    module = trunk.at(f"layers.{index}")
    ahead_TD = w.unless_zeroed(module["embed_tokens.weight"][tokens[k : k + length]])
    joined = np.concatenate(
      [module.norm("enorm", ahead_TD), module.norm("hnorm", h_TD)], axis=-1
    )
    h_TD = _layer(module, module.linear("eh_proj", joined), index)
    h_TD = module.norm("shared_head.norm", h_TD)
    out.append(module.linear("shared_head.head", h_TD))
  return out


def _mimo(w: Weights, tokens: np.ndarray, length: int) -> list[np.ndarray]:
  trunk = w.at("model")
  _, h_TD = _llama(w, tokens[:length])
  module = trunk.at("mtp_layers.0")
  ahead_TD = trunk["embed_tokens.weight"][tokens[1 : 1 + length]]
  joined = np.concatenate(
    [module.norm("hidden_layernorm", h_TD), module.norm("token_layernorm", ahead_TD)],
    axis=-1,
  )
  m_TD = _layer(module, module.linear("input_proj", joined))
  m_TD = module.norm("final_layernorm", m_TD)
  return [x_TD @ _head(w)["weight"].T for x_TD in (h_TD, m_TD)]


def _head(w: Weights) -> Weights:
  is_tied = w.config["tie_word_embeddings"]
  return w.at("model.embed_tokens") if is_tied else w.at("lm_head")


def _layer(w: Weights, x_TD: np.ndarray, index: int | None = None) -> np.ndarray:
  """A pre-norm block; with an `index`, one of DeepSeek-V3 or GLM-4.5."""
  attention, mlp = w.at("self_attn"), w.at("mlp")
  normed_TD = w.norm("input_layernorm", x_TD)
  is_latent = "kv_lora_rank" in w.config
  x_TD = x_TD + (_latent if is_latent else _grouped)(attention, normed_TD)
  normed_TD = w.norm("post_attention_layernorm", x_TD)
  is_dense = index is None or index < w.config["first_k_dense_replace"]
  return x_TD + (_swiglu if is_dense else _experts)(mlp, normed_TD)


def _swiglu(w: Weights, x_TD: np.ndarray) -> np.ndarray:
  gate, up = w.linear("gate_proj", x_TD), w.linear("up_proj", x_TD)
  return w.linear("down_proj", gate / (1 + np.exp(-gate)) * up)


def _attend(
  q_NTH: np.ndarray, k_NTH: np.ndarray, v_NTH: np.ndarray, is_causal: bool = True
) -> np.ndarray:
  T = q_NTH.shape[1]
  scores = q_NTH @ k_NTH.swapaxes(1, 2) / np.sqrt(q_NTH.shape[-1])
  if is_causal:
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  out_NTH = weights / weights.sum(-1, keepdims=True) @ v_NTH
  return out_NTH.swapaxes(0, 1).reshape(T, -1)


def _turns(
  theta: float, length: int, width: int, factor: float = 1.0
) -> np.ndarray:
  frequency = theta ** (-np.arange(0, width, 2) / width) / factor
  return np.exp(1j * np.arange(length)[:, None] * frequency)


def _grouped(w: Weights, x_TD: np.ndarray, rows: int = 0) -> np.ndarray:
  """Grouped-query attention, the pairs of a rotation in the two halves of a head.

  `rows`: so many last places, which see all places, are computed; 0: causally, all.
  """
  c, T = w.config, len(x_TD)
  H = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
  scaling = c["rope_scaling"] or {"type": "linear", "factor": 1.0}
  assert scaling["type"] == "linear"
  R = int(H * c.get("partial_rotary_factor", 1.0))  # The rest is not rotated.
  turns = _turns(c["rope_theta"], T, R, scaling["factor"])

  def heads(name: str) -> np.ndarray:
    return w.linear(name, x_TD).reshape(T, -1, H).swapaxes(0, 1)

  def rotate(x_NTH: np.ndarray, name: str) -> np.ndarray:
    if f"{w.prefix}{name}.weight" in w.tensors:
      x_NTH = w.norm(name, x_NTH)
    turned = (x_NTH[..., : R // 2] + 1j * x_NTH[..., R // 2 : R]) * turns
    return np.concatenate([turned.real, turned.imag, x_NTH[..., R:]], axis=-1)

  q, k = rotate(heads("q_proj"), "q_norm"), rotate(heads("k_proj"), "k_norm")
  v = heads("v_proj")
  group = c["num_attention_heads"] // c["num_key_value_heads"]
  k, v = (a.repeat(group, axis=0) for a in (k, v))
  return w.linear("o_proj", _attend(q[:, T - rows if rows else 0 :], k, v, not rows))


def _latent(w: Weights, x_TD: np.ndarray) -> np.ndarray:
  """Multi-head latent attention, equations 1 to 11; a rotation's pairs are adjacent."""
  c, T, N = w.config, len(x_TD), w.config["num_attention_heads"]
  nope, rope = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
  turns = _turns(c["rope_theta"], T, rope)

  def rotate(x_NTH: np.ndarray) -> np.ndarray:
    turned = (x_NTH[..., 0::2] + 1j * x_NTH[..., 1::2]) * turns
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x_NTH.shape)

  def heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(T, N, -1).swapaxes(0, 1)

  if c["q_lora_rank"]:
    low = w.norm("q_a_layernorm", w.linear("q_a_proj", x_TD), eps=1e-6)
    q_NTH = heads(w.linear("q_b_proj", low))
  else:
    q_NTH = heads(w.linear("q_proj", x_TD))
  down = w.linear("kv_a_proj_with_mqa", x_TD)
  latent = w.norm("kv_a_layernorm", down[:, : c["kv_lora_rank"]], eps=1e-6)
  shared_1TH = rotate(down[None, :, c["kv_lora_rank"] :])
  kv_NTH = heads(w.linear("kv_b_proj", latent))
  q_NTH = np.concatenate([q_NTH[..., :nope], rotate(q_NTH[..., nope:])], axis=-1)
  k_NTH = np.concatenate(
    [kv_NTH[..., :nope], shared_1TH.repeat(N, axis=0)], axis=-1
  )
  return w.linear("o_proj", _attend(q_NTH, k_NTH, kv_NTH[..., nope:]))


def _experts(w: Weights, x_TD: np.ndarray) -> np.ndarray:
  """Shared and routed experts, equations 12 to 16, token by token."""
  c = w.config
  affinity_TE = 1 / (1 + np.exp(-x_TD @ w["gate.weight"].T))
  out_TD = _swiglu(w.at("shared_experts"), x_TD)
  size = c["n_routed_experts"] // c["n_group"]
  for t, affinity_E in enumerate(affinity_TE):
    score_GS = (affinity_E + w["gate.e_score_correction_bias"]).reshape(-1, size)
    best_two_G = np.sort(score_GS, axis=1)[:, -2:].sum(axis=1)
    kept = np.argsort(best_two_G)[-c["topk_group"] :]
    allowed = [g * size + s for g in kept for s in range(size)]
    allowed.sort(key=lambda e: -score_GS[e // size, e % size])
    chosen = allowed[: c["num_experts_per_tok"]]
    for e in chosen:
      gate = affinity_E[e] / affinity_E[chosen].sum() * c["routed_scaling_factor"]
      out_TD[t] += gate * _swiglu(w.at(f"experts.{e}"), x_TD[t : t + 1])[0]
  return out_TD
