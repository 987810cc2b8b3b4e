"""The door for Hugging Face folders, files and ids, wrapped in a TransformerBridge."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mechinterp_attn.core.errors import CheckpointError, MechInterpError, UnsupportedModelError
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.sources.foreign import check_folder, check_size, unfit
from mechinterp_attn.sources.tokenizer import give_tokenizer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def boot(
    source: str | Path, dtype: torch.dtype | None = None, revision: str | None = None
) -> TransformerBridge:
    """A Hugging Face folder, ``.gguf`` file or hub id as a TransformerBridge in eval mode on the CPU.

    Args:
        dtype: of the weights; as stored by default, half precisions widened to float32. Quantized
            weights of a GGUF file become numbers of this dtype.
        revision: of a hub id: a branch, a tag or a commit.

    Raises:
        MechInterpError: it cannot be fetched or read.
        UnsupportedModelError: TransformerLens cannot boot it.
        CheckpointError: a folder asks for more than it holds, or its tokenizer is damaged.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    name = str(source)
    at: dict[str, Any] = {"revision": revision} if revision else {}
    place = name
    if is_gguf := name.endswith(".gguf"):
        _need_gguf(name)
        place, at = str(Path(name).parent), {"gguf_file": Path(name).name}
    elif Path(name).is_dir():
        check_folder(Path(name))
    at |= {"trust_remote_code": False}  # without it, users are asked whether to run a folder's code
    with _said(f"{name!r} cannot be read as a Hugging Face model"):
        config = AutoConfig.from_pretrained(place, **at)
        config.transformers_weights = config.fusion_config = (
            None  # no file and no code of a config's choice
        )
        if is_gguf:
            check_size(Path(name), config)
        kind = (getattr(config, "architectures", None) or [""])[0]
        loader = (
            AutoModelForMaskedLM
            if kind.endswith(("ForMaskedLM", "ForPreTraining"))
            else AutoModelForCausalLM
            if is_gguf or kind.endswith(("ForCausalLM", "LMHeadModel"))
            else AutoModel
        )
        stored = getattr(config, "dtype", None) or torch.float32
        wide = torch.float32 if stored in (torch.float16, torch.bfloat16) else stored
        options = at | {"dtype": dtype or wide, "attn_implementation": "eager"}
        options |= {} if is_gguf else {"use_safetensors": True}
        with _our_bars():
            model, loaded = loader.from_pretrained(
                place, config=config, output_loading_info=True, **options
            )
    if reasons := unfit(loaded, getattr(config, "num_hidden_layers", 0)):
        raise CheckpointError(name, reasons)
    model.eval()
    tokenizer = _tokenizer(Path(name), place, at)
    bridge = bridge_around(model, tokenizer, place=place)
    if is_gguf:
        bridge.cfg.model_name = Path(name).stem
    return bridge


def bridge_around(model: Any, tokenizer: Any, *, place: str) -> TransformerBridge:
    """A TransformerBridge around a Hugging Face model, which it changes in place.

    Args:
        model: the Hugging Face model.
        tokenizer: a Hugging Face tokenizer, or None.
        place: the model's name or folder.

    Raises:
        UnsupportedModelError: TransformerLens cannot boot it; says what to do.
    """
    from transformer_lens.model_bridge import TransformerBridge

    dtype = next(model.parameters()).dtype
    size = model.config.get_text_config().vocab_size
    try:
        with some_tokenizer(copy.deepcopy(tokenizer), size) as needed:
            bridge = TransformerBridge.boot_transformers(
                place, hf_model=model, tokenizer=needed, device="cpu", dtype=dtype
            )
    except Exception as error:  # adapters raise whatever meets them: all of it means the same
        kind, release = type(model).__name__, version("transformer_lens")
        raise UnsupportedModelError(
            place,
            [
                f"TransformerLens {release} does not boot this kind of {kind}; give its weights as "
                "mia.Checkpoint(cfg, state_dict) under HookedTransformer's names"
            ],
        ) from error
    give_tokenizer(bridge, tokenizer)
    return bridge


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever a library raises about a model from outside, said as an error of ours."""
    try:
        yield
    except MechInterpError:
        raise
    except Exception as error:  # they raise of every class, down to RecursionError
        why = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in why:
            why = (
                "it needs code of its own, which is not run; load it with transformers yourself and give "
                "mia.convert a bridge: TransformerBridge.boot_transformers(name, hf_model=model)"
            )
        raise MechInterpError(f"{what}: {why}") from error


def _tokenizer(file: Path, place: str, at: dict[str, Any]) -> Any:
    """The tokenizer beside a model; None where there is none.

    Raises:
        CheckpointError: a folder's tokenizer is damaged.
    """
    from transformers import AutoTokenizer

    has_files = not file.is_dir() or any((file / name).is_file() for name in _TOKENIZERS)
    if not has_files and not (file / "tokenizer_config.json").is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **at)
        # Without its files transformers gives an empty one, but bytes and characters need none.
        return tokenizer if has_files or not tokenizer.vocab_files_names else None
    except Exception as error:
        if not file.is_dir() or not has_files:
            return None
        raise CheckpointError(
            str(file), [f"its tokenizer is damaged or unknown ({' '.join(str(error).split())})"]
        ) from error


def _need_gguf(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MechInterpError(
            f"{name!r} is read with the package gguf, which is not installed: "
            "pip install 'mechinterp_attn[gguf]'"
        )


@contextlib.contextmanager
def _our_bars() -> Iterator[None]:
    """Transformers' progress bars look like all others here, and keep quiet when those do."""
    from transformers.utils import logging

    def bar(_factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Progress:
        return Progress(*args, **{"desc": "loading weights"} | options)

    previous = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


@contextlib.contextmanager
def some_tokenizer(tokenizer: Any, size: int) -> Iterator[Any]:
    """Booting needs some tokenizer, readable from where it was saved, or the hub is asked for one."""
    if tokenizer is not None:
        yield tokenizer
        return
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<0>", eos_token="<0>", pad_token="<0>"
        ).save_pretrained(folder)
        yield AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
