"""Which head does what."""

from mechinterp_attn.detect.scores import HeadScores, Matches, Offsets, match, offsets, score_heads

__all__ = ["HeadScores", "Matches", "Offsets", "match", "offsets", "score_heads"]
