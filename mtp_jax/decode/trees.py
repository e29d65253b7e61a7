"""Trees of drafts: several guesses for a token, each with guesses for what follows it.

A round then verifies N nodes in one pass instead of a chain. A node sees the committed
tokens, its ancestors and itself; it is accepted if the target chooses the same token
after its parent, and all its ancestors are accepted. Siblings differ, so that accepted
nodes are a path.

The nodes are fixed (`StaticTree`), or chosen anew in every round by the drafter's
probabilities (`DynamicTree`). Both make a `Drafter` that proposes `Nodes`; the loop
needs no other fact about a tree.

Legend: B batch, S slots, N nodes, X = 1 + N rows of a verification (the newest token
and the nodes), K depth, R = 1 + K rows of a path, W width of a beam, C its expanded
nodes, P all nodes ever expanded, M slots of a beam's rows, V vocab.
"""

import dataclasses
import functools
import heapq
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.model.cache_slots import Places, write_slots
from mtp_jax.predictors.drafting import (
  Choice,
  Choose,
  Drafter,
  Nodes,
  Recursion,
  Window,
  take_rows,
)

# A round verifies all nodes at once; more than these never pay.
MOST_NODES = 1024


@dataclasses.dataclass(frozen=True)
class StaticTree:
  """The same tree in every round, as Medusa has it (Cai et al. 2024, arXiv 2401.10774).

  paths: of every node, the ranks from the root to it: (0, 2) is the third most likely
    token of draft 2, after the most likely one of draft 1. In any order; kept sorted by
    length, so that parents come first.

  Raises:
    ValueError: no path, one that is not of ranks or comes twice, or a node without its
      parent.
  """

  paths: tuple[tuple[int, ...], ...]

  def __post_init__(self):
    paths = tuple(map(tuple, self.paths))
    if not paths:
      raise ValueError("a tree must have at least one path, got none.")
    if len(paths) > MOST_NODES:
      most = f"at most {MOST_NODES} paths"
      raise ValueError(f"a tree must have {most}, got {len(paths)}.")
    for path in paths:
      if not path or any(type(rank) is not int or rank < 0 for rank in path):
        raise ValueError(f"paths must be of ranks from 0 on, at least one, got {path}.")
      if paths.count(path) > 1:
        raise ValueError(f"paths must differ, got {path} {paths.count(path)} times.")
      if path[:-1] and path[:-1] not in paths:
        raise ValueError(
          f"paths must hold the parent of every node, {path} is without {path[:-1]}."
        )
    paths = tuple(sorted(paths, key=lambda path: (len(path), path)))
    object.__setattr__(self, "paths", paths)

  @property
  def depth(self) -> int:
    return len(self.paths[-1])

  @property
  def num_nodes(self) -> int:
    return len(self.paths)

  @property
  def width(self) -> int:
    """The most ranks that are asked of one distribution."""
    return 1 + max(path[-1] for path in self.paths)

  @property
  def parents(self) -> tuple[int, ...]:
    """The row of every node's parent, see `interface.Nodes`."""
    rows = {(): 0} | {path: 1 + i for i, path in enumerate(self.paths)}
    return tuple(rows[path[:-1]] for path in self.paths)

  def __str__(self) -> str:
    return f"static tree, N={self.num_nodes} K={self.depth}"


@dataclasses.dataclass(frozen=True)
class DynamicTree:
  """A tree by the drafter's confidence: EAGLE-2, Li et al. 2024, arXiv 2406.16858.

  At every depth a beam of the `width` most probable nodes (by the product along their
  path) is expanded, each to its `width` most likely tokens; of all nodes
  so found the best `num_nodes` are verified.

  Raises:
    ValueError: a number below 1, or more nodes than are found.
  """

  depth: int
  width: int
  num_nodes: int

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if type(value) is not int or value < 1:
        raise ValueError(f"{name} of a tree must be at least 1, got {value!r}.")
    if self.num_nodes > MOST_NODES:
      raise ValueError(
        f"num_nodes of a tree must be at most {MOST_NODES}, got {self.num_nodes}."
      )
    found = self.width + (self.depth - 1) * self.width**2
    if self.num_nodes > found:
      raise ValueError(
        f"num_nodes of a tree must be at most {found}, as many as a beam of width "
        f"{self.width} finds in depth {self.depth}, got {self.num_nodes}."
      )

  def __str__(self) -> str:
    return f"dynamic tree, W={self.width} N={self.num_nodes} K={self.depth}"


Tree = StaticTree | DynamicTree


def read(text: str) -> Tree:
  """Returns the tree of a command line: dynamic:DEPTH,WIDTH,NODES or a JSON file.

  The file is what `launch.tree` writes; only its `paths` are read.

  Raises:
    ValueError: neither, or no tree.
  """
  rule = "tree must be dynamic:DEPTH,WIDTH,NODES or a JSON file with paths"
  if text.startswith("dynamic:"):
    if not re.fullmatch(r"dynamic:\d+,\d+,\d+", text):
      raise ValueError(f"{rule}, got {text!r}.")
    return DynamicTree(*map(int, text.removeprefix("dynamic:").split(",")))
  try:
    paths = json.loads(Path(text).read_text())["paths"]
    paths = tuple(map(tuple, paths))
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{rule}, got {text!r} ({reason}).") from error
  return StaticTree(paths)


@functools.cache
def static(drafter: Drafter, tree: StaticTree) -> Drafter:
  """Returns `drafter` with a tree of its most likely tokens for its greedy chain.

  Args:
    drafter: of a chain of as many drafts as the tree is deep, with a distribution.
    tree: where a draft depends on those before it, these are the most likely ones: only
      their children can be nodes.

  Raises:
    ValueError: such a drafter, and a node whose parent is not the most likely token.
  """
  strays = [path for path in tree.paths if any(path[:-1])]
  if drafter.feeds_choices and strays:
    raise ValueError(
      "nodes must be children of the most likely tokens, (0, ..., 0, rank), where a "
      f"draft depends on those before it, got {strays[0]}."
    )
  widths = [0] * tree.depth
  for path in tree.paths:
    widths[len(path) - 1] = max(widths[len(path) - 1], 1 + path[-1])

  def propose(weights, cache, carry, window: Window, choose: Choose):
    del choose

    def choose_first(logits_BV: jax.Array, k: int) -> Choice:
      _, likeliest = jax.lax.top_k(logits_BV, widths[k - 1])
      return Choice(likeliest[:, 0], likeliest)

    cache, drafts = drafter.propose(weights, cache, carry, window, choose_first)
    tokens = [drafts[len(path) - 1].note[:, path[-1]] for path in tree.paths]
    token_BN = jnp.stack(tokens, axis=1)
    parent_BN = jnp.broadcast_to(jnp.array(tree.parents, jnp.int32), token_BN.shape)
    return cache, Nodes(token_BN, parent_BN)

  return drafter._replace(propose=propose, num_nodes=tree.num_nodes)


@functools.cache
def dynamic(recursion: Recursion, tree: DynamicTree) -> Drafter:
  """Returns the drafter of a tree that is grown from a recursion.

  The beam's rows are cached in M slots behind the slots of the sequence. Only the beam
  reads these slots, and every round overwrites them. (Absent rows of the window are
  written to the first of them, before.)
  """
  W, M = tree.width, tree.width * (tree.depth - 1)

  def init(rows: int, slots: int):
    return recursion.init(rows, slots + M)

  def likeliest(weights, state):
    log_p = jax.nn.log_softmax(recursion.logits(weights, state), axis=-1)
    return jax.lax.top_k(log_p, W)

  def propose(weights, cache, state_BD, window: Window, choose: Choose):
    del choose
    B, S = window.tokens_BS.shape
    newest_B1 = window.length_B[:, None] - 2
    known_BWS = jnp.broadcast_to((jnp.arange(S) <= newest_B1)[:, None], (B, W, S))
    # All children of the beam before, by score, token and place of their parent.
    score_BC, token_BC = likeliest(weights, state_BD)
    scores, tokens = [score_BC], [token_BC]
    parents = [jnp.full((B, W), -1)]
    state_BWD, seen_BWM = state_BD[:, None], jnp.zeros((B, 1, M), bool)
    num_found = 0
    for depth in range(1, tree.depth):
      score_BW, best_BW = jax.lax.top_k(score_BC, W)
      place_BW, from_BW = num_found + best_BW, best_BW // W
      num_found += score_BC.shape[1]
      own_W = (depth - 1) * W + jnp.arange(W)
      seen_BWM = take_rows(seen_BWM, from_BW) | (jnp.arange(M) == own_W[:, None])
      where = Places(
        jnp.broadcast_to(newest_B1 + depth, (B, W)),
        jnp.broadcast_to(S + own_W, (B, W)),
        jnp.concatenate([known_BWS, seen_BWM], axis=2),
      )
      state_BWD, token_BW = take_rows(state_BWD, from_BW), take_rows(token_BC, best_BW)
      cache, state_BWD = recursion.step(weights, cache, state_BWD, token_BW, where)
      log_p_BWW, token_BWW = likeliest(weights, state_BWD)
      score_BC = (score_BW[:, :, None] + log_p_BWW).reshape(B, W * W)
      token_BC = token_BWW.reshape(B, W * W)
      scores.append(score_BC)
      tokens.append(token_BC)
      parents.append(jnp.repeat(place_BW, W, axis=1))
    # A child is never likelier than its parent, and at a tie the first is taken, which
    # the parent is: so the chosen are a tree, and sorted they have parents first.
    _, kept_BN = jax.lax.top_k(jnp.concatenate(scores, axis=1), tree.num_nodes)
    kept_BN = jnp.sort(kept_BN, axis=1)
    above_BN = take_rows(jnp.concatenate(parents, axis=1), kept_BN)
    # The row of a parent is one more than the chosen before it; the root has place -1.
    rank_BN = jnp.sum(kept_BN[:, None, :] < above_BN[:, :, None], axis=2)
    parent_BN = jnp.where(above_BN < 0, 0, 1 + rank_BN).astype(jnp.int32)
    return cache, Nodes(take_rows(jnp.concatenate(tokens, axis=1), kept_BN), parent_BN)

  return Drafter(
    tree.depth, True, init, recursion.catch_up, propose, num_nodes=tree.num_nodes
  )


def ancestors(parent_BN: jax.Array, depth: int) -> jax.Array:
  """Returns sees_BXX: whether row x of a verification is y, or comes after it.

  Args:
    parent_BN: see `interface.Nodes`.
    depth: at least the depth of the tree.
  """
  itself_XX = jnp.eye(1 + parent_BN.shape[1], dtype=bool)
  sees_BXX = jnp.broadcast_to(itself_XX, (len(parent_BN), *itself_XX.shape))
  for _ in range(depth):
    above_BNX = take_rows(sees_BXX, parent_BN)
    sees_BXX = itself_XX | jnp.pad(above_BNX, ((0, 0), (1, 0), (0, 0)))
  return sees_BXX


def places(sees_BXX: jax.Array, length_B: jax.Array, slots: int) -> Places:
  """Returns where the rows of a verification are: the newest token and the nodes.

  They are written one after the other from slot `length - 1` on, whatever their
  positions.
  """
  newest_B1 = length_B[:, None] - 1
  slot_BX = newest_B1 + jnp.arange(sees_BXX.shape[1])
  known_BXS = jnp.broadcast_to(
    (jnp.arange(slots) < newest_B1)[:, None], (*sees_BXX.shape[:2], slots)
  )
  visible_BXS = write_slots(known_BXS, sees_BXX.swapaxes(1, 2), slot_BX, slot_axis=2)
  return Places(newest_B1 + depths(sees_BXX), slot_BX, visible_BXS)


def depths(sees_BXX: jax.Array) -> jax.Array:
  """Returns depth_BX, 0 of the newest token."""
  return jnp.sum(sees_BXX, axis=2, dtype=jnp.int32) - 1


def accepted_path(
  own_BX: jax.Array, nodes: Nodes, sees_BXX: jax.Array, depth: int
) -> tuple[jax.Array, jax.Array]:
  """Returns `(path_BR, accepted_B)`: the rows of the path, of which R - 1 are nodes.

  Past the accepted ones the path is row 0, which stands for nothing there.

  Args:
    own_BX: the target's own token after every row.
    nodes, sees_BXX: the tree, and its `ancestors`.
    depth: K.
  """
  is_right_BN = nodes.token_BN == take_rows(own_BX, nodes.parent_BN)
  is_right_BX = jnp.pad(is_right_BN, ((0, 0), (1, 0)), constant_values=True)
  accepted_BX = jnp.all(is_right_BX[:, None, :] | ~sees_BXX, axis=2)
  depth_BX = jnp.where(accepted_BX, depths(sees_BXX), 0)
  is_on_path_BXR = depth_BX[:, :, None] == jnp.arange(1 + depth)
  # Row 0 is the first of depth 0; no more than one is accepted in any other.
  return jnp.argmax(is_on_path_BXR, axis=1), jnp.max(depth_BX, axis=1)


def best_static_tree(
  hits_KR: Sequence[Sequence[float]], num_nodes: int, spine_only: bool = False
) -> StaticTree:
  """Returns the tree of most expected tokens: arXiv 2401.10774, section 2.3.3.

  Drafts are taken as right or wrong independently of each other, so that a node is
  accepted with the product of the accuracies along its path, and the sum of these is
  what a round is expected to accept. The best nodes are added one by one.

  Args:
    hits_KR: the share of positions at which the token that draft k + 1 ranks r-th is
      the target's own choice, see `evaluate.top_k_hits`.
    num_nodes: N.
    spine_only: allow only children of the most likely tokens, see `static`.

  Raises:
    ValueError: no such tree has so many nodes, or a hit is not in [0, 1].
  """
  hits_KR = np.asarray(hits_KR, np.float64)
  if hits_KR.ndim != 2 or not np.all((hits_KR >= 0) & (hits_KR <= 1)):
    raise ValueError(f"hits must be [K, R] in [0, 1], got {hits_KR.tolist()}.")
  K, R = hits_KR.shape
  most = K * R if spine_only else sum(R**k for k in range(1, 1 + K))
  if not 1 <= num_nodes <= most:
    raise ValueError(
      f"num_nodes must be 1 to {most}, as many as {K} draft(s) with {R} rank(s) have"
      f"{' along the most likely tokens' if spine_only else ''}, got {num_nodes}."
    )
  # Children come up for choice with their parent, so that no node is without it.
  candidates, paths = [(-1.0, ())], []
  while len(paths) <= num_nodes:
    value, path = heapq.heappop(candidates)
    paths.append(path)
    if len(path) < K and not (spine_only and any(path)):
      for rank, hit in enumerate(hits_KR[len(path)]):
        heapq.heappush(candidates, (value * hit, (*path, rank)))
  return StaticTree(tuple(paths[1:]))


def expected_tokens(tree: StaticTree, hits_KR: Sequence[Sequence[float]]) -> float:
  """Returns tokens per round as `best_static_tree` expects them, the target's own too.
  """
  values = (
    math.prod(hits_KR[k][rank] for k, rank in enumerate(path)) for path in tree.paths
  )
  return 1.0 + sum(values)
