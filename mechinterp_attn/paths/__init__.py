"""One prompt, patterns frozen: where every logit comes from."""

from mechinterp_attn.paths.frozen import Frozen, freeze
from mechinterp_attn.paths.logits import LogitAttribution, logit_attribution
from mechinterp_attn.paths.orders import Orders, orders

__all__ = ["Frozen", "LogitAttribution", "Orders", "freeze", "logit_attribution", "orders"]
