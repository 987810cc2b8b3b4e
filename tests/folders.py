"""Small Hugging Face folders, each with a model and a tokenizer of another kind."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = "a tall man"
BERT_TEXT = "the capital of france is [MASK] ."
BERT_WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "capital", "of", "france", "is"),
    *(".", "paris", "##s", "##ing", "run", "ing"),
]
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
PIECES = (
    "▁Paris",
    "Paris",
    "▁the",
    "the",
    "▁is",
    "is",
    "▁in",
    "▁Rome",
    "Rome",
    "▁",
    "▁[",
    "]",
    "INST",
    "/",
)


@cache
def byte_level(*, bos: bool, eos: str = "<|endoftext|>"):
    """The bundled byte-level BPE without its template: Qwen2's kind, or GPT-2's where there is a BOS."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = files("mechinterp_attn") / "sources" / "weights" / "tokenizer.json"
    rules = json.loads(file.read_text(encoding="utf-8")) | {"post_processor": None}
    named = {"bos_token": eos} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)), eos_token=eos, pad_token=eos, **named
    )


@cache
def sentencepiece(*, legacy: bool = False, eos: bool = False, bos: bool = True):
    """Llama's kind: ▁ for spaces, byte fallback, <s> in front of every text; ``legacy`` as in Llama 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = dict(SPECIAL)
    for piece in (*PIECES, *(f"<0x{i:02X}>" for i in range(256))):
        vocab.setdefault(piece, len(vocab))
    scores = [(p, 0.0 if i < 3 else -20.0 if p.startswith("<0x") else -1.0) for p, i in vocab.items()]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def wordpiece():
    """BERT's: [CLS] in front, [SEP] behind, no BOS at all."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(BERT_WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **names)


def write_folder(kind: str, folder: Path, *, padding_rows: int = 0):
    """A model with weights far from trivial and its tokenizer; gives back both as Hugging Face has them."""
    import transformers as hf

    tokenizer = {
        "qwen2": lambda: byte_level(bos=False),
        "gpt2": lambda: byte_level(bos=True),
        "llama": sentencepiece,
        "llama-legacy": lambda: sentencepiece(legacy=True),
        "llama-eos": lambda: sentencepiece(eos=True),
        "bert": wordpiece,
    }[kind]()
    n = len(tokenizer) + padding_rows
    grouped = dict(SMALL, num_key_value_heads=2, max_position_embeddings=48, vocab_size=n)
    torch.manual_seed(0)
    if kind == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**grouped, initializer_range=0.3))
    elif kind.startswith("llama"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**grouped, initializer_range=0.3))
    elif kind == "bert":
        config = hf.BertConfig(**SMALL, max_position_embeddings=48, vocab_size=n, initializer_range=0.3)
        model = hf.BertForMaskedLM(config)
    else:
        config = hf.GPT2Config(
            n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=48, vocab_size=n, initializer_range=0.3
        )
        model = hf.GPT2LMHeadModel(config)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, hf.AutoTokenizer.from_pretrained(folder)
