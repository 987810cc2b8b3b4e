"""Runs with hooks and caches as in TransformerLens, and what hooks see only on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.block import Block
from mechinterp_attn.model.renamed import Cache, Renamed, present_filter

if TYPE_CHECKING:
    from torch import nn
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.hook_points import HookPoint


class Hooked(HookedRootModule):
    """A hooked module with ``blocks`` and TransformerLens's config in ``_cfg``."""

    blocks: nn.ModuleList
    _cfg: TransformerBridgeConfig

    def run_with_hooks(
        self, *args: Any, fwd_hooks: Sequence[Any] = (), bwd_hooks: Sequence[Any] = (), **kwargs: Any
    ) -> Any:
        """One forward pass with hooks on it, as in TransformerLens.

        Args:
            args, kwargs: of ``forward``, and ``reset_hooks_end``, ``clear_contexts``.
            fwd_hooks, bwd_hooks: pairs of a hook's name, or a function that chooses names, and what to
                call.

        Returns:
            what ``forward`` returns.

        Raises:
            MechInterpError: none of the hooks would fire; the message names the switch that is off.
        """
        names = [name for name, _ in (*fwd_hooks, *bwd_hooks)]
        if names and all(isinstance(name, str) and self.switch_of(name) for name in names):
            self.check_hooks_to_add(self.hook_dict[names[0]], names[0])
        hooks = dict(fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks))
        return super().run_with_hooks(*args, **hooks, **kwargs)

    def run_with_cache(
        self,
        *args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """The output and a TransformerLens ActivationCache (or the plain dict).

        Arguments are those of ``HookedRootModule.run_with_cache`` (names_filter, device, ...).

        Args:
            return_cache_object: False for the plain dictionary.
            remove_batch_dim: drop the batch axis of a batch of one.
            args: as for a forward pass.
            kwargs: as for a forward pass.
        """
        if "names_filter" in kwargs:
            kwargs["names_filter"] = present_filter(kwargs["names_filter"])
        out, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, Renamed(cache)
        return out, Cache(cache, self, has_batch_dim=not remove_batch_dim)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether ``attn.hook_result`` holds what every head writes, ``[batch, pos, head, d_model]``.

        Args:
            use_attn_result: on or off; it is off at first, since it costs a stream per head.
        """
        for block in self.blocks:
            cast(Block, block).attn.use_result = use_attn_result
        self._cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether a copy of the stream is made for every head's query, key and value.

        ``hook_q_input``, ``hook_k_input`` and ``hook_v_input`` hold them, ``[batch, pos, head,
        d_model]``, so that one of them can be patched alone.

        Args:
            use_split_qkv_input: on or off.
        """
        self._fork(qkv=use_split_qkv_input)
        self._cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether ``hook_attn_in`` holds a stream for every head, ``[batch, pos, head, d_model]``.

        Args:
            use_attn_in: on or off.
        """
        self._fork(attn_in=use_attn_in)
        self._cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether ``hook_mlp_in`` holds the stream that the MLP's neurons read, before the norm.

        Args:
            use_hook_mlp_in: on or off.
        """
        self._fork(mlp_in=use_hook_mlp_in)
        self._cfg.use_hook_mlp_in = use_hook_mlp_in

    def _fork(self, **flags: bool) -> None:
        for block in self.blocks:
            forks = replace(cast(Block, block).forks, **flags)
            if forks.attn_in and forks.qkv:
                raise MechInterpError(
                    "set_use_attn_in and set_use_split_qkv_input exclude each other; turn one off"
                )
            cast(Block, block).forks = forks

    def switch_of(self, hook_name: str) -> str | None:
        """The method that makes a hook fire, where it is off; None for all hooks that fire."""
        last = hook_name.split(".")[-1]
        flags = {"hook_result": "attn_result", "hook_attn_in": "attn_in", "hook_mlp_in": "hook_mlp_in"}
        flags |= dict.fromkeys(("hook_q_input", "hook_k_input", "hook_v_input"), "split_qkv_input")
        flag = flags.get(last)
        return None if flag is None or getattr(self._cfg, f"use_{flag}", False) else f"set_use_{flag}"

    def check_hooks_to_add(
        self, hook_point: HookPoint, hook_point_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse a hook that would never fire, because what it looks at is not made.

        Args:
            hook_point: where the hook goes.
            hook_point_name: its name.
            args, kwargs: the rest of what TransformerLens passes.

        Raises:
            MechInterpError: the hook needs a ``set_use_...`` that is off.
        """
        switch = self.switch_of(hook_point_name)
        if switch is not None:
            raise MechInterpError(
                f"{hook_point_name} is computed only on demand; call model.{switch}(True) first"
            )
