"""DFlash's layers against a drafter in PyTorch that runs one block after the other.

Names and layouts are those of speculators' `DFlashDraftModel`, whose own module is
compared too where speculators is installed (version 0.9.0 cannot be with the newest
transformers). What decoding makes of a block is tested for all kinds in test_decode.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.predictors import predictor_trunk
from mtp_jax.predictors.dflash import DFlash
from mtp_jax.predictors.interface import Given
from mtp_jax.targets import shifted_tokens
from tests.common import VOCAB, assert_trees_close, batch_of, random_params, tiny_config

torch = pytest.importorskip("torch", reason="the peer is written in torch")

T, DEPTH, MASK = 14, 3, VOCAB - 1
# The third document goes on after the row.
DOCUMENTS = ((0, 6), (6, 7), (7, T + 1 + DEPTH))
CONFIG = tiny_config("dflash", DEPTH, {
  "trunk.qk_norm": True, "data.seq_len": T, "trunk.compute_dtype": "float64",
  "trunk.rope_theta": 100.0,
})


def inputs():
  """Returns tokens, documents and positions of one row, and (params, streams, table).

  The masks are all the embedding of one token, as they are in the peer.
  """
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, MASK, T + 1 + DEPTH)
  documents = np.repeat([1, 2, 3], [end - start for start, end in DOCUMENTS])
  positions = np.concatenate([np.arange(end - start) for start, end in DOCUMENTS])
  params = jax.tree.map(np.float64, random_params(CONFIG)["mtp"])
  table_VD = rng.standard_normal((VOCAB, 16))
  params["masks"] = np.tile(table_VD[MASK], (DEPTH, 1))
  return tokens, documents, positions, (
    params, rng.standard_normal((T, 3 * 16)), table_VD
  )


def anchored(documents):
  """Returns the places i whose next token belongs to the same document."""
  return [i for i in range(T) if documents[i] == documents[i + 1]]


def own_states(params, streams_TX, table_VD, tokens, documents):
  """Returns state_ATD of the rows after each anchor, by our module."""
  batch = batch_of(tokens[None], documents[None], T)
  given = Given(
    residual_BTD=jnp.zeros((1, T, 16)),
    final_norm=lambda x: x,
    ahead=None,
    embed_ahead=lambda k: table_VD[shifted_tokens(batch, k)[0]],
    embed_own=None,
    unembed_DV=jnp.zeros((16, VOCAB)),
    positions_BT=batch.positions,
    segment_ids_BT=batch.segment_ids,
    tapped=tuple(jnp.split(streams_TX[None], 3, axis=-1)),
  )
  trunk = predictor_trunk(CONFIG.trunk, CONFIG.mtp)
  hidden_MBTD, _ = DFlash(trunk, CONFIG.mtp).apply({"params": params}, given)
  return jnp.moveaxis(hidden_MBTD[1:, 0, np.array(anchored(documents))], 0, 1)


def state_dict(params, table_VD):
  """Returns our parameters, or their gradients, by the names of the peer."""
  found = {
    "embed_tokens.weight": table_VD,
    "fc.weight": params["fusion"]["kernel"].T,
    "hidden_norm.weight": params["context_norm"]["scale"],
    "norm.weight": params["out_norm"]["scale"],
  }
  for i in range(CONFIG.mtp.draft_layers):
    layer = params[f"layer_{i}"]
    attention = layer["attention"]
    names = {
      "input_layernorm": layer["attention_norm"]["scale"],
      "post_attention_layernorm": layer["mlp_norm"]["scale"],
      "self_attn.q_norm": attention["query_head_norm"]["scale"],
      "self_attn.k_norm": attention["key_head_norm"]["scale"],
      "self_attn.o_proj": attention["out"].reshape(-1, 16).T,
    }
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
      names[f"self_attn.{short}_proj"] = attention[name].reshape(16, -1).T
    for name in ("gate", "up", "down"):
      names[f"mlp.{name}_proj"] = layer["mlp"][name].T
    found |= {f"layers.{i}.{name}.weight": value for name, value in names.items()}
  return {name: np.array(value) for name, value in found.items()}


def peer_states(state, streams_TX, tokens, documents, positions):
  """Returns state_ATD of the peer: a whole block for every anchor, in its document."""
  trunk, functional = CONFIG.trunk, torch.nn.functional

  def norm(x, name):
    size = torch.sqrt(torch.mean(x * x, -1, keepdim=True) + trunk.norm_eps)
    return x / size * state[f"{name}.weight"]

  def turned(x_XNH, position_X):
    half = x_XNH.shape[-1] // 2
    frequency = trunk.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = position_X[:, None, None] * frequency
    first, second = x_XNH[..., :half], x_XNH[..., half:]
    return torch.cat([
      first * angle.cos() - second * angle.sin(),
      second * angle.cos() + first * angle.sin(),
    ], -1)

  def block(i):
    start = next(s for s, e in DOCUMENTS if s <= i < e)
    context = norm(streams_TX[start : i + 1] @ state["fc.weight"].T, "hidden_norm")
    ids = torch.tensor([tokens[i + 1], *[MASK] * DEPTH])
    x = state["embed_tokens.weight"][ids]
    own = positions[i + 1] + torch.arange(1 + DEPTH)
    places = torch.cat([torch.tensor(positions[start : i + 1]), own])
    for n in range(CONFIG.mtp.draft_layers):
      at = f"layers.{n}.self_attn"

      def heads(x, name, at=at):
        return (x @ state[f"{at}.{name}_proj.weight"].T).reshape(len(x), -1, 4)

      read = norm(x, f"layers.{n}.input_layernorm")
      both = torch.cat([context, read])
      query = turned(norm(heads(read, "q"), f"{at}.q_norm"), own)
      key = turned(norm(heads(both, "k"), f"{at}.k_norm"), places)
      repeats = query.shape[1] // key.shape[1]
      key, value = (
        a.repeat_interleave(repeats, 1) for a in (key, heads(both, "v"))
      )
      weights = torch.softmax(torch.einsum("qnh,knh->nqk", query, key) / 2, -1)
      mixed = torch.einsum("nqk,knh->qnh", weights, value).reshape(1 + DEPTH, -1)
      x = x + mixed @ state[f"{at}.o_proj.weight"].T
      read = norm(x, f"layers.{n}.post_attention_layernorm")
      gate, up, down = (
        state[f"layers.{n}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
      )
      x = x + (functional.silu(read @ gate.T) * (read @ up.T)) @ down.T
    return norm(x, "norm")[1:]

  return torch.stack([block(i) for i in anchored(documents)])


def speculators_states(state, streams_TX, tokens, documents, positions):
  """Returns state_ATD of speculators' own module, every valid place an anchor."""
  dflash = pytest.importorskip("speculators.models.dflash")
  from transformers import Qwen3Config

  trunk, layers = CONFIG.trunk, CONFIG.mtp.draft_layers
  config = dflash.DFlashSpeculatorConfig(
    transformer_layer_config=Qwen3Config(
      vocab_size=VOCAB, hidden_size=16, intermediate_size=24, head_dim=4,
      num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
      rms_norm_eps=trunk.norm_eps, attn_implementation="eager",
      rope_parameters={"rope_type": "default", "rope_theta": trunk.rope_theta},
    ),
    draft_vocab_size=VOCAB, block_size=1 + DEPTH, mask_token_id=MASK,
    aux_hidden_state_layer_ids=[1, 2, 3],
  )
  model = dflash.DFlashDraftModel(config).double()
  # All tokens of the row and of what comes after it; there is no block near the end.
  end = len(tokens)
  streams_SX = torch.cat([
    streams_TX, torch.zeros(end + DEPTH - T, streams_TX.shape[1]).double()
  ])
  fill = lambda x, value: torch.tensor(  # noqa: E731
    np.concatenate([x, np.full(DEPTH, value)])
  )[None]
  is_anchor = np.zeros(end, bool)
  is_anchor[np.array(anchored(documents)) + 1] = True
  tensors = dict(model.named_parameters()) | dict(model.named_buffers())
  own = {name: tensors[name] for name in tensors if name not in state}
  model.forward = lambda: model._backbone_forward(
    streams_SX[None], fill(tokens, 0), fill(is_anchor, False),
    torch.zeros(1, end + DEPTH, 16, dtype=torch.float64), fill(documents, -1),
    fill(positions, 0), max_anchors=int(is_anchor.sum()),
  )
  hidden = torch.func.functional_call(model, own | state, ())[0]
  return hidden.reshape(-1, 1 + DEPTH, 16)[:, 1:]


# Rotations, norms and softmax of speculators' module are float32 whatever the input.
@pytest.mark.parametrize(
  "peer, tolerance", [(peer_states, 1e-9), (speculators_states, 1e-4)]
)
def test_states_and_gradients_are_those_of_the_peer(peer, tolerance):
  with jax.enable_x64(True):
    tokens, documents, positions, ours = inputs()
    count = len(anchored(documents))
    assert count == 5 + 0 + 7
    pull = np.random.default_rng(1).standard_normal((count, DEPTH, 16))

    def total(params, streams_TX, table_VD):
      states = own_states(params, streams_TX, table_VD, tokens, documents)
      return jnp.sum(states * pull), states

    run = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    (d_params, d_streams, d_table), states = jax.device_get(run(*ours))
  params, streams_TX, table_VD = ours
  state = {
    name: torch.tensor(value, requires_grad=True)
    for name, value in state_dict(params, table_VD).items()
  }
  streams = torch.tensor(streams_TX, requires_grad=True)
  expected = peer(state, streams, tokens, documents, positions)
  close = {"rtol": tolerance, "atol": tolerance / 10}
  np.testing.assert_allclose(states, expected.detach().numpy(), **close)
  torch.sum(expected * torch.tensor(pull)).backward()
  d_table = d_table + np.eye(VOCAB)[MASK][:, None] * d_params["masks"].sum(axis=0)
  assert_trees_close(
    state_dict(d_params, d_table) | {"streams": d_streams},
    {name: x.grad.numpy() for name, x in state.items()}
    | {"streams": streams.grad.numpy()},
    **close,
  )
