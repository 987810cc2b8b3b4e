"""What can be read from weights alone."""

from mechinterp_attn.circuits.vocabulary import TokenPairs, ov_top, qk_top

__all__ = ["TokenPairs", "ov_top", "qk_top"]
