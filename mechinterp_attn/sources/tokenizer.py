"""Tokenizers as their own library uses them: out of files, and out of a bridge that changed them."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp_attn.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_NONE: Mapping[str, Any] = {}
_MADE_UP = ("bos_token", "eos_token", "pad_token")


def read_tokenizer(file: Path, bos_token: str | None = None, settings: Mapping[str, Any] = _NONE) -> Any:
    """A Hugging Face tokenizer from a ``tokenizer.json``, or None where there is no such file.

    Args:
        bos_token: the text of the BOS token, where there is one.
        settings: what ``settings_of`` gave, for a tokenizer that was saved. Without them the BOS ends and
            pads texts as well, and is put in front of them.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not file.is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    given: dict[str, Any] = {"bos_token": bos_token} | dict(settings)
    if not settings:
        # A bridge looks the name and add_bos_token up, and would go to the hub for a tokenizer that adds
        # no BOS.
        given |= dict(eos_token=bos_token, pad_token=bos_token, name_or_path=file.parent.name)
        given["add_bos_token"] = bos_token is not None
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **given)
    except Exception as error:  # what the library raises on a damaged file has no class of its own
        raise CheckpointError(
            str(file.parent), [f"{file.name} is damaged or no tokenizer ({' '.join(str(error).split())})"]
        ) from error


def read_files(folder: Path, names: Iterable[str], settings: Mapping[str, Any]) -> Any:
    """A tokenizer written in Python, from the files of its own that it was saved in.

    Args:
        folder: where they are.
        names: which of the folder's files are the tokenizer's; no other is looked at.
        settings: what ``settings_of`` gave.

    Raises:
        CheckpointError: they are damaged, or no tokenizer of transformers reads them.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as alone:
        for name in names:
            shutil.copy(folder / name, alone)
        try:
            return AutoTokenizer.from_pretrained(alone, trust_remote_code=False, **settings)
        except Exception as error:  # as above
            why = " ".join(str(error).split())
            raise CheckpointError(str(folder), [f"its tokenizer is damaged or unknown ({why})"]) from error


def as_before_booting(tokenizer: Any) -> Any:
    """A bridge's tokenizer as it was before booting, which is left as it is.

    Booting reads a tokenizer anew with ``add_bos_token=True``, which takes BERT's [CLS] and [SEP] away,
    sets an EOS where there is none, and BOS and padding to EOS where they are missing: a model that never
    saw a BOS would get one in front of every text. Where it still lies where it came from it is read
    again; otherwise its own arguments say which special tokens are made up.
    """
    own = getattr(tokenizer, "init_kwargs", None)
    if own is None:
        return tokenizer
    if own.get("add_bos_token"):
        original = _read_again(tokenizer)
        if original is not None:
            return original
    eos = tokenizer.eos_token
    made_up = [
        name
        for name in _MADE_UP
        if own.get(name) is None
        and getattr(tokenizer, name) is not None
        and getattr(tokenizer, name) == ("<|endoftext|>" if name == "eos_token" else eos)
    ]
    if not made_up:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    for name in made_up:
        setattr(tokenizer, name, None)
    return tokenizer


def _read_again(tokenizer: Any) -> Any:
    """The tokenizer from its folder or the local cache; None where it is not there any more."""
    from transformers import AutoTokenizer

    try:
        original = AutoTokenizer.from_pretrained(
            tokenizer.name_or_path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        return None
    known = tokenizer.get_vocab()
    same = all(known.get(token) == i for token, i in original.get_vocab().items())
    return original if same else None


def give_tokenizer(bridge: TransformerBridge, tokenizer: Any) -> None:
    """Let a bridge's texts be those of a tokenizer as its own library uses it, with or without a BOS.

    The bridge keeps a padding token, without which it cannot read texts at all.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import detect_tokenizer_bos_eos

    bridge.tokenizer = tokenizer
    if tokenizer is None:
        return
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    prepends, appends = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.tokenizer_prepends_bos = bridge.cfg.default_prepend_bos = prepends
    bridge.cfg.tokenizer_appends_eos = appends
