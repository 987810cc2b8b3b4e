"""The same quantities the plain way: dense float64 matrices, with the constant coordinate of the
bias-token construction written out."""

import torch
from torch import Tensor


def ov(head) -> Tensor:
    return head.W_V.double() @ head.W_O.double()


def qk(head) -> Tensor:
    return head.W_Q.double() @ head.W_K.double().T


def over_vocabulary(model, head, which: str) -> Tensor:
    W_E, W_U = model.W_E.detach().double(), model.W_U.detach().double()
    if which == "OV":
        return W_E @ ov(head) @ W_U
    if head.kind == "mlp":  # the key is the constant 1: only the query speaks
        z = W_E @ head.W_Q.double() + head.b_Q.double()
        return z.expand(-1, len(W_E))
    return W_E @ qk(head) @ W_E.T


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
