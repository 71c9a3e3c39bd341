"""Acceptance of a tree: greedy, typical (Medusa, section 2.3.1) and lossless, one sequence at a time.

Lossless draws the target's own token at a node and descends to the child that carries it; since the drafts are a fixed
function of the hidden state, the emitted tokens follow the target distribution exactly.
"""

import torch
from torch import Tensor

from .sampling import draw, kept_weights

GREEDY, TYPICAL = 0, 1  # else lossless


@torch.no_grad()
def launch(
    logits: Tensor,
    tree_tokens: Tensor,
    parents: Tensor,
    acceptance: tuple[Tensor, ...] | None,
    accepted_nodes: Tensor,
    accept_length: Tensor,
    next_token: Tensor,
) -> None:
    accepted_nodes.fill_(-1)
    for b in range(logits.shape[0]):
        tokens = tree_tokens[b].tolist()
        tree = (parents if parents.dim() == 1 else parents[b]).tolist()
        mode, *numbers = (GREEDY,) if acceptance is None else (x[b].item() for x in acceptance)
        if mode == GREEDY or numbers[0] == 0:
            path, token = _greedy(logits[b], tokens, tree)
        elif mode == TYPICAL:
            path, token = _typical(logits[b].float(), tokens, tree, *numbers)
        else:
            temperature, top_p, top_k, _, _, seed, offset = numbers
            path, token = _lossless(logits[b].float(), tokens, tree, temperature, top_p, top_k, seed, offset)
        accepted_nodes[b, : len(path)] = torch.tensor(path, dtype=torch.int32, device="cpu")
        accept_length[b] = len(path) - 1
        next_token[b] = token


def _greedy(logits: Tensor, tokens: list[int], parents: list[int]) -> tuple[list[int], int]:
    chosen = [int(row.argmax()) for row in logits]
    depth = {0: 0}
    for node in range(1, len(tokens)):
        if parents[node] in depth and tokens[node] == chosen[parents[node]]:
            depth[node] = depth[parents[node]] + 1
    last = min(depth, key=lambda node: (-depth[node], node))
    return _path_to(last, parents), chosen[last]


def _typical(
    logits: Tensor,
    tokens: list[int],
    parents: list[int],
    temperature: float,
    top_p: float,
    top_k: int,
    threshold: float,
    alpha: float,
    seed: int,
    offset: int,
) -> tuple[list[int], int]:
    # In fp64, and either side rounded once: P is above the floor or it is not, whatever the order of the sums.
    logp = (logits / temperature).double().log_softmax(dim=-1)
    entropy = -(logp.exp() * logp).nan_to_num(nan=0.0).sum(dim=-1)
    floor = torch.clamp(alpha * torch.exp(-entropy).float(), max=threshold)
    reached = {0: (0, 0.0)}  # node -> its depth and the sum of ln P along its path
    for node in range(1, len(tokens)):
        parent = parents[node]
        if parent in reached and logp[parent, tokens[node]].exp().float() > floor[parent]:
            depth, total = reached[parent]
            reached[node] = (depth + 1, total + float(logp[parent, tokens[node]]))
    last = min(reached, key=lambda node: (-reached[node][0], -reached[node][1], node))
    weights = kept_weights(logits[last], temperature, top_p, top_k)
    return _path_to(last, parents), draw(weights, seed, offset + reached[last][0] + 1)


def _lossless(
    logits: Tensor,
    tokens: list[int],
    parents: list[int],
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    offset: int,
) -> tuple[list[int], int]:
    path = [0]
    while True:
        token = draw(kept_weights(logits[path[-1]], temperature, top_p, top_k), seed, offset + len(path))
        children = (node for node in range(path[-1] + 1, len(tokens)) if parents[node] == path[-1])
        match = next((node for node in children if tokens[node] == token), None)
        if match is None:
            return path, token
        path.append(match)


def _path_to(node: int, parents: list[int]) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]
