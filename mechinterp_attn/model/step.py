"""What all banks share in one forward pass besides the stream: masks, rotations, past keys."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.given import named
from mechinterp_attn.model.rotary import Rotation


class KeyValueCache:
    """Keys (already turned) and values of the tokens seen so far, by layer.

    ``model(tokens, past_kv_cache=cache)`` appends to it, so that the next call needs the new tokens only.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.real: Bool[Tensor, "batch pos"] | None = None

    def __len__(self) -> int:
        """How many tokens it holds."""
        return next(iter(self._layers.values()))[0].shape[1] if self._layers else 0

    def extend(
        self,
        layer: int,
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
    ) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the new ones at the end."""
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        self._layers[layer] = k, v
        return k, v


class Step:
    """One forward pass over ``n_new`` tokens that follow ``n_past`` cached ones.

    Attributes:
        positions: of all tokens, cached ones first.
        rotations: the rotary tables of the new tokens, one pair for each table of the model.
        cache: where keys and values go, or None.
    """

    def __init__(
        self,
        n_new: int,
        device: torch.device,
        *,
        positions: Int[Tensor, "#batch key"],
        real: Bool[Tensor, "batch key"] | None = None,
        rotations: tuple[Rotation, ...] = (),
        cache: KeyValueCache | None = None,
    ):
        self.n_new = n_new
        self.n_past = 0 if cache is None else len(cache)
        self.positions = positions
        self.rotations = rotations
        self.cache = cache
        self._device = device
        self._real = real
        self._masks: dict[tuple[bool, int | None], Tensor] = {}

    def is_plain(self, window: int | None) -> bool:
        """Whether "no later token" is all there is to the mask of a causal layer."""
        return self._real is None and self.n_past == 0 and (window is None or window >= self.n_new)

    def is_open(self, *, causal: bool) -> bool:
        """Whether every token sees every token."""
        return not causal and self._real is None

    def allowed(self, *, causal: bool, window: int | None) -> Bool[Tensor, "#batch 1 query key"]:
        """Who may look at whom. A padding token sees itself, so that no row is empty."""
        key = (causal, window)
        if key not in self._masks:
            n_keys = self.n_past + self.n_new
            q = torch.arange(self.n_past, n_keys, device=self._device)[:, None]
            k = torch.arange(n_keys, device=self._device)[None, :]
            mask = (k <= q) if causal else torch.ones_like(k <= q)
            if window is not None:
                mask = mask & (q - k < window)
            mask = mask[None, None]
            if self._real is not None:
                mask = (mask & self._real[:, None, None, :]) | (q == k)
            self._masks[key] = mask
        return self._masks[key]


def real_tokens(
    tokens: Tensor, mask: Tensor | None, past: KeyValueCache | None
) -> Bool[Tensor, "batch key"] | None:
    """Which tokens, cached ones first, are not padding; None if none is.

    Args:
        tokens: the new ones.
        mask: of the new tokens or of all, 0 on padding; None if no new one is padding.
        past: the cache, which takes note of the new ones.

    Raises:
        MechInterpError: a mask of another shape.
    """
    n_past, (batch, n_new) = 0 if past is None else len(past), tokens.shape
    known = None if past is None else past.real
    if mask is None and known is None:
        return None
    try:
        new = torch.ones(batch, n_new) if mask is None else torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MechInterpError(f"attention_mask is {named(mask)}; expected a table of 0 and 1") from error
    new = new.to(tokens.device).bool()
    if new.shape not in ((batch, n_new), (batch, n_past + n_new)):
        raise MechInterpError(
            f"attention_mask has shape {tuple(new.shape)}, expected {(batch, n_past + n_new)}"
        )
    if new.shape[1] == n_new and n_past:
        old = torch.ones(batch, n_past, dtype=torch.bool, device=tokens.device)
        new = torch.cat([old if known is None else known, new], 1)
    if past is not None:
        past.real = new
    return None if bool(new.all()) else new
