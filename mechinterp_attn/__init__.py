"""mechinterp_attn: transformers as attention heads only, MLP neurons included.

The names stand in ``__init__.pyi``; each imports its module when it is first used, so that
``import mechinterp_attn`` is instant.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
