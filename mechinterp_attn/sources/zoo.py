"""The bundled models: small transformers trained for this package, found offline by name."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.sources.checkpoint import Checkpoint

D_VOCAB = 1024  # of the tokenizer that the bundled models share

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def models() -> pd.DataFrame:
    """One row per bundled model: its shape, training, loss (nats) and induction score.

    ``mia.load(name)`` gives a model in attention-only form; ``mia.source_model(name)`` gives the
    source itself, a native TransformerBridge with its MLPs. The full card, with data and licence,
    is ``mia.card(name)``.
    """
    columns = ("n_parameters", "tokens", "loss", "induction_score", "licence", "description")
    rows = [{"name": name} | {c: card(name).get(c) for c in columns} for name in bundled_names()]
    return pd.DataFrame(rows)


def card(name: str) -> dict[str, object]:
    """The card of a bundled model: data, licence, recipe, loss, induction score.

    Args:
        name: of a bundled model.

    Raises:
        MechInterpError: no bundled model has this name; the message lists them.
    """
    return dict(json.loads((_known_folder(name) / "card.json").read_text(encoding="utf-8")))


def source_model(name: str, *, dtype: torch.dtype | None = None) -> TransformerBridge:
    """A bundled model in its original form: a native TransformerBridge with its MLPs.

    Args:
        name: of a bundled model.
        dtype: of the weights; as stored by default.

    Raises:
        MechInterpError: no bundled model has this name; the message lists them.
    """
    from mechinterp_attn.sources.bridge import to_bridge

    return to_bridge(read_bundled(name, dtype))


def bigram_counts() -> Int[Tensor, "first second"]:
    """How often each token follows each other one in the novels that the bundled models are trained on
    (litbank, 22.6 million tokens in the bundled tokenizer): what a model without layers can learn.
    """
    tensors = _corpus()
    counts = torch.zeros(D_VOCAB**2, dtype=torch.long)
    counts[tensors["pairs"].long()] = tensors["counts"].long()
    return counts.view(D_VOCAB, D_VOCAB)


def held_out() -> Int[Tensor, "document pos"]:
    """Real text that no bundled model was trained on: 128 documents of a BOS and 127 tokens, spread over
    the five held-out novels.

    From LitBank, https://github.com/dbamman/litbank (Bamman, Popat and Shen 2019): texts in the public
    domain, collection licensed under CC BY 4.0, https://creativecommons.org/licenses/by/4.0/. Changed:
    cut into passages, stored as token ids.
    """
    return _corpus()["held_out"].long()


def _corpus() -> dict[str, Tensor]:
    return load_file(_home() / "corpus.safetensors")


def read_bundled(name: str, dtype: torch.dtype | None = None) -> Checkpoint:
    """A bundled model as a Checkpoint, with the tokenizer that the bundled models share."""
    from mechinterp_attn.sources.folder import read_checkpoint
    from mechinterp_attn.sources.tokenizer import read_tokenizer

    folder = _known_folder(name)
    checkpoint = read_checkpoint(folder, dtype)
    tokenizer = read_tokenizer(folder.parent / "tokenizer.json", bos_token="<|endoftext|>")
    return Checkpoint(checkpoint.cfg, checkpoint.state_dict, tokenizer, name)


def bundled_names() -> list[str]:
    """Names of the bundled models."""
    return sorted(path.parent.name for path in _home().glob("*/card.json"))


def bundled_folder(name: str) -> Path | None:
    """Where a bundled model lies, or None where no bundled model has this name."""
    return _home() / name if name in bundled_names() else None


def bundled_dictionaries(name: str) -> Path | None:
    """Where the transcoders of a bundled model lie, ``layer_0``, ``layer_1``, ...; None if it has none."""
    folder = bundled_folder(name)
    return None if folder is None or not (folder / "transcoders").is_dir() else folder / "transcoders"


def _known_folder(name: str) -> Path:
    folder = bundled_folder(name)
    if folder is None:
        raise MechInterpError(f"no bundled model {name!r}; there are {', '.join(bundled_names())}")
    return folder


def _home() -> Path:
    with as_file(files("mechinterp_attn") / "sources" / "weights") as home:
        return home
