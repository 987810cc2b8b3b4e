"""The null of an intervention: as much taken out of the stream, in a direction that means nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from mechinterp_attn.causal.batches import Batch, rows_within
from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.cuts import next_token
from mechinterp_attn.causal.metrics import LARGER_IS_WORSE
from mechinterp_attn.causal.rules import Hook
from mechinterp_attn.causal.runs import rows_at_once, run
from mechinterp_attn.circuits.ends import average_unembedding, embedding, seen_width
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.model.attention_only import AttentionOnlyModel

DRAWS = 8  # random directions for each head
LEAST = 1e-6  # nats: what float32 leaves of a mean loss


def random_removals(
    model: AttentionOnlyModel,
    batch: Batch,
    where: Bool[Tensor, "batch pos_minus_1"],
    heads: Sequence[str],
    *,
    seed: int,
    max_bytes: int,
) -> pd.DataFrame:
    """What the loss does when something that means nothing is taken out in place of a head's output.

    Returns:
        indexed by head: ``mean`` and ``std`` of the loss change (nats) over ``DRAWS`` rotations.
    """
    rows = min(len(batch), rows_within(model, batch.tokens.shape[1], max_bytes))
    at_a_time = max(1, rows_within(model, batch.tokens.shape[1], max_bytes) // rows)
    batch, where = next(batch.split(rows)), where[:rows].to(batch.tokens.device)

    def loss(hooks: list[Hook], parts: int) -> Tensor:
        return _loss(model, batch.repeat(parts), where.repeat(parts, 1), hooks, parts)

    return _turned_out_of(model, loss, heads, seed=seed, at_a_time=at_a_time)


def random_removals_for(
    model: AttentionOnlyModel, bound: Bound, heads: Sequence[str], *, seed: int, max_bytes: int
) -> pd.DataFrame:
    """The same for a behaviour: by how much its metric gets worse, on as many prompts as fit.

    Returns:
        indexed by head: ``mean`` and ``std`` of what is lost, in the metric's unit.
    """
    fit = rows_at_once(model, bound, max_bytes)
    bound = bound.take(slice(0, fit))
    sign = 1 if bound.metric in LARGER_IS_WORSE else -1

    def worse(hooks: list[Hook], parts: int) -> Tensor:
        many = bound.repeat(parts)
        metric = many.measure(run(model, many, many.clean, hooks))
        return sign * metric.double().unflatten(0, (parts, -1)).mean(1)

    return _turned_out_of(model, worse, heads, seed=seed, at_a_time=max(1, fit // len(bound)))


@torch.no_grad()
def _turned_out_of(
    model: AttentionOnlyModel,
    measured: Callable[[list[Hook], int], Tensor],
    heads: Sequence[str],
    *,
    seed: int,
    at_a_time: int,
) -> pd.DataFrame:
    """A head's output turned by a random rotation is taken out of the residual stream in place of it: the
    same norm at every position, the same relations between positions, another direction. Rotations are
    drawn in a basis that is made of the model's own embeddings: how its residual stream happens to be
    turned makes no difference.

    Args:
        measured: with hooks on so many copies of the prompts, one number for each copy.
        at_a_time: how many copies fit.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = seen_basis(model, generator)
    n = basis.shape[1]
    turns = [(basis @ _rotation(n, generator) @ basis.T).to(model.W_E) for _ in range(DRAWS)]
    plain = measured([], 1)
    found = {}
    for label in Progress(heads, desc="random directions"):
        changes: list[float] = []
        for start in range(0, DRAWS, at_a_time):
            some = turns[start : start + at_a_time]
            changes += (measured(_turned_out(model, label, torch.stack(some)), len(some)) - plain).tolist()
        drawn = torch.tensor(changes, dtype=torch.float64)
        found[label] = float(drawn.mean()), max(float(drawn.std()), LEAST)
    return pd.DataFrame.from_dict(found, orient="index", columns=["mean", "std"])


def seen_basis(model: AttentionOnlyModel, generator: Generator) -> Float[Tensor, "d_model seen"]:
    """An orthonormal basis of what readers of the residual stream see, float64 on the CPU: mixtures of some
    tokens' embeddings, one made orthogonal to the others after the other, and of logits' directions
    where the embeddings are too few. If the stream is turned, so is the basis.
    """
    width, d_model = seen_width(model), model.spec.d_model
    average = average_unembedding(model)
    rows: list[Tensor] = []
    for size, table in (
        (model.spec.d_vocab, lambda ids: embedding(model, ids)),
        (model.spec.d_vocab_out, lambda ids: model.W_U.detach()[:, ids].double().T - average),
        (d_model, lambda ids: torch.eye(d_model, dtype=torch.float64)[ids]),  # a vocabulary of a few tokens
    ):
        n = min(size, width - sum(len(part) for part in rows))
        ids = torch.randperm(size, generator=generator)[: 4 * width]
        mixed = torch.randn(n, len(ids), generator=generator, dtype=torch.float64) @ table(ids).cpu()
        rows.append(mixed - mixed.mean(-1, keepdim=True) if model.spec.mean_unseen else mixed)
    Q, R = torch.linalg.qr(torch.cat(rows).T)
    return Q * R.diagonal().sign()


def _turned_out(model: AttentionOnlyModel, label: str, turns: Tensor) -> list[Hook]:
    """Hooks that take a head's output, turned, out of the stream behind its sublayer, as large as it is
    behind the norm that may stand there; every turn in its own share of the batch.
    """
    bank, index = model.heads.find(label)
    streams = [sublayer.stream for sublayer in model.sublayers()]
    streams.append(f"blocks.{model.spec.n_layers - 1}.hook_resid_post")
    behind = streams[streams.index(model.stream_of(bank)) + 1]
    sublayer = model.sublayer_of(bank)
    norm, path = sublayer.out or sublayer.posts[sublayer.banks.index(bank)]
    W_O = bank.behind(model[label].W_O)
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda x, hook: held.__setitem__(name, x)

    def remove(x: Tensor, hook: Any) -> Tensor:
        written = bank.by_head(held["z"])[:, :, index] @ W_O
        if norm.kind is not None:
            written = (written / held["scale"]).to(written.dtype)
        turned = torch.einsum("nbpd,nde->nbpe", written.unflatten(0, (len(turns), -1)), turns)
        return x - turned.flatten(0, 1)

    scales = [] if norm.kind is None else [(f"{path}.hook_scale", keep("scale"))]
    return [(bank.hook("z"), keep("z")), *scales, (behind, remove)]


def _loss(model: AttentionOnlyModel, batch: Batch, where: Tensor, hooks: list[Hook], parts: int) -> Tensor:
    """Mean of the counted losses in each share of the batch."""
    padded: dict[str, Any] = {} if batch.mask is None else {"attention_mask": batch.mask}
    with model.hooks(fwd_hooks=hooks):
        loss, _ = next_token(model(batch.tokens, **padded), batch)
    loss, where = (x.unflatten(0, (parts, -1)).double() for x in (loss, where))
    return (loss * where).sum((1, 2)) / where.sum((1, 2))


def _rotation(n: int, generator: Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
