"""Which head does what."""

from mechinterp_attn.detect.scores import HeadScores, score_heads

__all__ = ["HeadScores", "score_heads"]
