"""One set of colours for tables, figures and the report; colour-blind safe."""

# Attention heads and MLP-derived heads keep theirs everywhere; neither is blue or red: those are signs.
KIND_COLOURS = {"attention": "#7d52b0", "mlp": "#a06c0a", "embed": "#4d7c3a", "bias": "#7a7a7a"}
KIND_COLOURS |= {"feature": "#0f7f8c", "skip": "#8a5a44", "error": "#a3457a"}
SEQUENTIAL = "Blues"  # for scores in [0, 1]
DIVERGING = "RdBu"  # for signed values, centred at zero: red is negative, blue positive
NEGATIVE, POSITIVE = "#b2182b", "#2166ac"  # the ends of both scales
