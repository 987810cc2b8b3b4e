"""What a bank of heads says of a run: its patterns, what its heads move and write, out of a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """Activations by hook name: a TransformerLens ActivationCache or a dict."""

    def __getitem__(self, name: str, /) -> Any: ...


class OnARun(ABC):
    """The questions about a run that every bank answers, each in its own way.

    A bank keeps patterns in a compact form: attention heads ``[head, query, key]``, a neuron one number per
    position, its weight on its own token.
    """

    @abstractmethod
    def by_head(self, z: Tensor) -> Float[Tensor, "*batch pos head d_head"]:
        """What ``hook_z`` (or, without grouped values, ``hook_v``) holds, with the axes of every kind: a
        view, in which a neuron's number is a vector of length one.
        """

    @abstractmethod
    def cached_pattern(self, cache: Cache, batch: int) -> Tensor:
        """The bank's compact pattern for one sequence, out of a cache."""

    @abstractmethod
    def dense_pattern(self, pattern: Tensor, index: int) -> Float[Tensor, "query key_plus_bias"]:
        """One head's [query, key + bias column] picture from the compact pattern."""

    @abstractmethod
    def attention_on(
        self,
        pattern: Tensor,
        pairs: Shaped[Tensor, "*batch query key"],
        moved: Float[Tensor, "batch key head"] | None = None,
    ) -> Float[Tensor, " head"]:
        """Sum over the batch and its (query, key) of pattern times ``pairs``, for every head.

        Args:
            pattern: the bank's compact pattern of a batch.
            pairs: weights of pairs of real tokens, the same for the whole batch or one by one.
            moved: weights of keys, such as the norm of what the head moves from there.
        """

    @abstractmethod
    def entropy(self, pattern: Tensor) -> Float[Tensor, "batch pos head"]:
        """Entropy (nats) of every row of the pattern, the bias token included; NaN where a row is
        no distribution, as the gate of a gated neuron.
        """

    @abstractmethod
    def moved(self, cache: Cache) -> Float[Tensor, "batch pos head"]:
        """Norm of what every head would write if it attended to one position alone, out of a cache
        with the bank's values.
        """

    @abstractmethod
    def written(self, cache: Cache) -> Float[Tensor, "batch pos head"]:
        """Norm of what every head writes at every position, out of a cache with the bank's ``z``."""
