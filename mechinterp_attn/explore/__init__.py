"""The explorer: a local page where prompts are typed and heads are cut, scaled and patched."""

from mechinterp_attn.explore.application import app
from mechinterp_attn.explore.server import serve

__all__ = ["app", "serve"]
