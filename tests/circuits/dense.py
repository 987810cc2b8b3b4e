"""The same quantities the plain way: dense float64 matrices, every norm written out as a matrix, and the
constant coordinate of the bias-token construction as one more dimension."""

import torch
from torch import Tensor


def centring(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) - 1 / n


def behind(head) -> Tensor:
    """What a head writes passes this matrix before anything reads it."""
    model, bank = head.model, head.bank
    state, spec = model.state_dict(), model.spec
    name = f"blocks.{bank.layer}.{'ln1' if bank.part == 'attn' else 'ln2'}"
    passes = torch.eye(spec.d_model, dtype=torch.float64)
    if spec.post_norm:
        passes = centring(spec.d_model) if spec.post_norm == "LN" else passes
        passes = passes @ torch.diag(state[f"{name}_post.w"].double())
    if spec.stream_norm:
        return passes @ centring(spec.d_model) @ torch.diag(state[f"{name}.w"].double())
    if spec.norm == spec.final_norm == "LN":
        passes = passes @ centring(spec.d_model)
    return passes


def ov(head) -> Tensor:
    product = torch.eye(len(head.W_V), dtype=torch.float64)
    for one in getattr(head, "heads", [head]):
        product = product @ one.W_V.double() @ one.W_O.double() @ behind(one)
    return product


def qk(head) -> Tensor:
    return head.W_Q.double() @ head.W_K.double().T


def embedded(model, table: Tensor, *, bias: bool = False) -> Tensor:
    state, spec = model.state_dict(), model.spec
    x = table.detach().double()
    if spec.embed_norm:
        x = x @ centring(spec.d_model) @ torch.diag(state["embed_norm.w"].double())
        x = x + state["embed_norm.b"].double() if bias else x
    return x @ centring(spec.d_model) if spec.norm == spec.final_norm == "LN" else x


def over_vocabulary(model, head, which: str) -> Tensor:
    """Logits against their average; scores with the query's bias, and a neuron's with all of it."""
    keys, queries = embedded(model, model.W_E), embedded(model, model.W_E, bias=True)
    if which == "OV":
        return keys @ ov(head) @ model.W_U.detach().double() @ centring(model.spec.d_vocab_out)
    parts = list(getattr(head, "heads", [head]))
    last = parts.pop()
    for one in parts:
        keys = keys @ ov(one)
    query = queries @ last.W_Q.double() + last.b_Q.double()
    if last.kind == "mlp":  # its key is the constant 1: what was moved to its token is read by its query
        return query + (keys @ last.W_Q.double()).T * bool(parts)
    return query @ (keys @ last.W_K.double()).T


def composition(first, then, kind: str) -> float:
    """Augmented by the constant coordinate, which no head writes and every neuron's key is."""
    d = len(first.W_V)
    write = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    write[:d, :d] = ov(first)
    read = torch.zeros_like(write)
    if kind == "V":
        read[:d, :d] = ov(then)
    else:
        read[:d, :d] = qk(then)
        if then.kind == "mlp":
            read[:d, d] = then.W_Q.double()[:, 0]
        read = read.T if kind == "K" else read
    size = float(write.norm() * read.norm())
    return float((write @ read).norm()) / size
