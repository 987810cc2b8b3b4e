"""Tokenizers written in Python, and sentencepiece's own: ids, texts and saved models as with others.

Expected ids are those of the tokenizer called directly.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import CheckpointError, MechInterpError
from tests.folders import BERT_WORDS, write_folder

PROMPT = "the man is in Rome 😀"
WORDS = ["the Paris is in Rome , the man is tall .", "how are you the man", "Rome is tall and is big"]


def _pieces(folder: Path, name: str, **numbers) -> str:
    """A sentencepiece model of byte pairs with byte fallback, trained on three lines."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(WORDS * 20), model_prefix=str(folder / "made"), model_type="bpe",
        vocab_size=340, byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **numbers,
    )  # fmt: skip
    return str((folder / "made.model").rename(folder / name))


def _merges(folder: Path) -> tuple[str, str]:
    """Words of letters, the last of which carries the end of the word, as GPT-1 has them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["<unk>", *letters, *(f"{one}</w>" for one in letters), "th", "the", "the</w>", "is</w>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\ni s</w>\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def make(kind: str, folder: Path):
    import transformers as hf
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    if kind == "gpt_sw3":
        file = _pieces(folder, "spiece.model", unk_id=0, pad_id=1, bos_id=2, eos_id=3)
        names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
        return hf.GPTSw3Tokenizer(file, **names)
    if kind == "byt5":
        return hf.ByT5Tokenizer(extra_ids=2)
    if kind == "bert":
        (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
        return BertTokenizerLegacy(str(folder / "vocab.txt"))
    if kind == "gpt1":
        return hf.OpenAIGPTTokenizer(*_merges(folder))
    file = _pieces(folder, "tokenizer.model")
    settings = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return hf.AutoTokenizer.from_pretrained(folder)


ADDED = {"byt5": "'</s>' behind", "bert": "'[CLS]' in front and '[SEP]' behind", "llama": "'<s>' in front"}
SLOW = ("gpt_sw3", "byt5", "bert")


@pytest.fixture(scope="module", params=[*SLOW, "gpt1", "llama"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    """A GPT-2 with a tokenizer of this kind beside it."""
    home = tmp_path_factory.mktemp(kind)
    write_folder("gpt2", home)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (home / file).unlink()
    make(kind, tmp_path_factory.mktemp("made")).save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return mia.load(folder)


def test_a_folder_s_model_sees_the_tokenizer_s_ids(kind, model, tokenizer):
    expected = tokenizer(PROMPT)["input_ids"]
    assert hasattr(tokenizer, "backend_tokenizer") == (kind not in SLOW)
    assert model.to_tokens(PROMPT)[0].tolist() == expected
    assert model.added_text == ADDED.get(kind, "nothing")
    alone = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert model.to_tokens(PROMPT, prepend_bos=False)[0].tolist() == alone


def test_every_token_has_a_text_of_its_own(kind, model, tokenizer):
    vocabulary = model.vocabulary
    texts = vocabulary.texts(range(vocabulary.size))
    assert len(set(texts)) == len(texts) == len(tokenizer)
    assert [vocabulary.find(text) for text in texts] == list(range(len(texts)))
    assert not set(vocabulary.plain_ids.tolist()) & set(tokenizer.all_special_ids)


@pytest.mark.filterwarnings("ignore:This sequence already has")  # ByT5, of an </s> that is written out
def test_a_prompt_reads_as_it_was_typed(kind, model, tokenizer):
    readable = model.to_readable_tokens(PROMPT)
    bytes_of_one = [f"😀⟨{i}/4⟩" for i in (1, 2, 3, 4)]
    if kind in ("gpt_sw3", "byt5", "llama"):
        assert model.typed(model.to_tokens(PROMPT)[0]) == PROMPT
        assert [part for part in readable if "😀" in part] == bytes_of_one
        assert model.to_str_tokens("😀", prepend_bos=False)[-4:] == ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "⟨80⟩"]
        assert model.to_tokens(model.to_string(model.to_tokens(PROMPT)[0])).tolist() == (
            model.to_tokens(PROMPT).tolist()
        )
    if kind == "gpt1":  # the end of a word is a space: the same letters within one are another token
        assert readable[:1] == ["the "]
        assert model.to_single_token("the ") == tokenizer.convert_tokens_to_ids("the</w>")
        assert model.to_single_token("the") == tokenizer.convert_tokens_to_ids("the")
        assert model.to_str_tokens("this") == ["th", "is "]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    texts = [PROMPT, "the"]
    batch = model.to_batch(texts, padding_side=side)
    logits = model(batch.tokens, attention_mask=batch.mask)
    for text, row, real in zip(texts, logits, batch.real, strict=True):
        torch.testing.assert_close(row[real], model(text)[0], rtol=1e-4, atol=1e-4)  # float32


def test_a_saved_model_reads_texts_as_before(kind, model, tokenizer, tmp_path):
    own = copy.copy(model)
    own.tokenizer = copy.deepcopy(model.tokenizer)
    own.tokenizer.padding_side = "left"
    own.save(tmp_path / "saved")
    again = mia.load(tmp_path / "saved")
    again.save(tmp_path / "twice")  # from files that are no longer where they were read
    for one in (again, mia.load(tmp_path / "twice")):
        assert torch.equal(one.to_tokens(PROMPT), model.to_tokens(PROMPT))
        assert one.tokenizer.padding_side == "left"
        assert one.tokenizer.special_tokens_map == tokenizer.special_tokens_map
        assert one.vocabulary.texts(range(one.vocabulary.size)) == (
            model.vocabulary.texts(range(model.vocabulary.size))
        )
        assert torch.equal(one.vocabulary.plain_ids, model.vocabulary.plain_ids)
        assert one.added_text == model.added_text


@pytest.mark.parametrize("kind", ["gpt_sw3"], indirect=True)
def test_a_saved_tokenizer_is_under_the_checksum(model, tmp_path):
    model.save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")  # of nobody that was saved here
    assert torch.equal(mia.load(tmp_path / "saved").to_tokens("the"), model.to_tokens("the"))
    (tmp_path / "saved" / "spiece.model").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"spiece\.model is damaged or not the file that was saved"):
        mia.load(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["sha256"]["../spiece.model"] = config["sha256"].pop("spiece.model")
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"a checksum of '\.\./spiece\.model', which is no file of"):
        mia.load(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["gpt_sw3"], indirect=True)
def test_a_tokenizer_that_cannot_be_saved_is_refused_by_name(model, tmp_path):
    class Letters:
        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) % 50 for letter in text]}

    own = copy.copy(model)
    own.tokenizer = Letters()
    with pytest.raises(MechInterpError, match="a tokenizer of type Letters cannot be saved"):
        own.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "GPTSw3Tokenizer"])
def test_a_tokenizer_without_its_files_is_none(name, tmp_path):
    """Transformers would make an empty one of it."""
    write_folder("gpt2", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    assert mia.load(tmp_path).tokenizer is None
