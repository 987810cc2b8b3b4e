"""The model sees the ids that its source would, and every token can be told from every other.

Expected ids and logits are those of Hugging Face's tokenizer and model, called directly.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.vocabulary import Vocabulary
from tests.folders import BERT_TEXT, TEXT, byte_level, sentencepiece, wordpiece, write_folder

KINDS = ("qwen2", "gpt2", "llama", "llama-legacy", "llama-eos", "bert")
TEXTS = dict.fromkeys(KINDS, TEXT) | {"bert": BERT_TEXT} | dict.fromkeys(KINDS[2:5], "the Paris is in Rome")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return tmp_path_factory.mktemp(kind)


@pytest.fixture(scope="module")
def hugging_face(kind, folder):
    return write_folder(kind, folder)


@pytest.fixture(scope="module")
def model(hugging_face, folder):
    return mia.load(folder)


def test_a_folder_s_model_sees_hugging_face_s_ids(kind, model, hugging_face):
    source, tokenizer = hugging_face
    expected = tokenizer(TEXTS[kind], return_tensors="pt", return_token_type_ids=False)
    assert model.to_tokens(TEXTS[kind]).tolist() == expected["input_ids"].tolist()
    with torch.no_grad():
        logits = source(**expected).logits
    scale = float(logits.abs().max())
    assert float((model(TEXTS[kind]).detach() - logits).abs().max()) < 1e-4 * scale  # float32


def test_tokens_go_to_text_and_back(kind, model, hugging_face):
    ids = model.to_tokens(TEXTS[kind])
    assert torch.equal(model.to_tokens(model.to_string(ids[0])), ids)
    assert model.to_string(ids) == [model.to_string(ids[0])]
    assert model.typed(ids[0]).replace("].", "] .") == TEXTS[kind]  # BERT's decoder closes up


def test_what_is_added_is_said(kind, model):
    said = {
        "qwen2": "nothing",
        "gpt2": "nothing",
        "llama-eos": "'<s>' in front and '</s>' behind",
        "bert": "'[CLS]' in front and '[SEP]' behind",
    }
    assert model.added_text == said.get(kind, "'<s>' in front")
    assert model.provenance["special_tokens"] == model.added_text
    assert mia.paths.freeze(model, TEXTS[kind]).receipt.notes["special tokens"] == model.added_text


def test_a_saved_model_reads_texts_as_before(kind, model, hugging_face, tmp_path):
    _, tokenizer = hugging_face
    own = copy.copy(model)
    own.tokenizer = copy.deepcopy(model.tokenizer)
    own.tokenizer.padding_side = "left"
    own.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    own.save(tmp_path / "saved")
    again = mia.load(tmp_path / "saved")
    assert again.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert again.tokenizer.all_special_ids == tokenizer.all_special_ids
    assert again.tokenizer.padding_side == "left"
    assert again.tokenizer.chat_template == own.tokenizer.chat_template
    for bos in (None, False):
        assert torch.equal(again.to_tokens(TEXTS[kind], bos), model.to_tokens(TEXTS[kind], bos))
    assert again.added_text == model.added_text


def test_a_list_of_texts_is_masked(kind, model, hugging_face):
    """Logits of real tokens are those of each text alone, on either side of the padding (BERT's positions
    count it, as in Hugging Face's)."""
    texts = [TEXTS[kind], TEXTS[kind].split()[0]]
    alone = [model(text)[0].detach() for text in texts]
    for side in ("left", "right")[kind == "bert" :]:
        batch = model.to_batch(texts, padding_side=side)
        logits = model(batch.tokens, attention_mask=batch.mask)
        for row, real, expected in zip(logits, batch.real, alone, strict=True):
            assert float((row[real].detach() - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    for row, expected in zip(model(texts), alone, strict=True):
        side = "right" if kind == "bert" else model.tokenizer.padding_side
        own = row[-len(expected) :] if side == "left" else row[: len(expected)]
        assert float((own.detach() - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama"], indirect=True)
def test_the_loss_of_a_list_is_the_mean_over_real_tokens(kind, model, hugging_face):
    source, _ = hugging_face
    losses = []
    for text in (TEXTS[kind], " ".join(TEXTS[kind].split()[:2])):
        ids = model.to_tokens(text)
        with torch.no_grad():
            losses.append(F.cross_entropy(source(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    loss = model([TEXTS[kind], " ".join(TEXTS[kind].split()[:2])], return_type="loss")
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama"], indirect=True)
def test_a_bridge_s_model_sees_the_bridge_s_ids(kind, folder, hugging_face):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    before = dict(bridge.tokenizer.special_tokens_map)
    model = mia.convert(bridge, check=False)
    expected = bridge.to_tokens(TEXTS[kind])
    assert torch.equal(model.to_tokens(TEXTS[kind]), expected)
    assert bool(expected[0, 0] == bridge.tokenizer.bos_token_id) == (kind != "qwen2")
    assert dict(bridge.tokenizer.special_tokens_map) == before
    assert (model.bos_token_id is None) == (kind == "qwen2")
    bridge.cfg.default_prepend_bos = False
    bare = mia.convert(bridge, check=False).to_tokens(TEXTS[kind])
    assert torch.equal(bare, bridge.to_tokens(TEXTS[kind]))
    assert int(bare[0, 0]) == int(expected[0, int(kind != "qwen2")])


def test_a_bridge_of_bert_gets_its_special_tokens(tmp_path):
    """The bridge itself gives the bare words, which BERT was never trained on."""
    from transformer_lens.model_bridge import TransformerBridge

    _, tokenizer = write_folder("bert", tmp_path)
    model = mia.convert(TransformerBridge.boot_transformers(str(tmp_path), device="cpu"), check=False)
    assert model.to_tokens(BERT_TEXT)[0].tolist() == tokenizer(BERT_TEXT)["input_ids"]
    assert model.bos_token_id is None


@pytest.mark.parametrize("says", [True, False, None])
def test_a_checkpoint_says_whether_texts_begin_with_a_bos(says):
    from mechinterp_attn.sources.zoo import read_bundled

    given = read_bundled("attn-1l")
    cfg = dict(given.cfg) if says is None else dict(given.cfg) | {"default_prepend_bos": says}
    model = mia.convert(mia.Checkpoint(cfg, given.state_dict, given.tokenizer), check=False)
    bare = given.tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert model.to_tokens(TEXT)[0].tolist() == ([] if says is False else [0]) + bare
    assert model.to_tokens(TEXT, prepend_bos=True)[0].tolist() == [0, *bare]
    assert model.to_tokens(TEXT, prepend_bos=False)[0].tolist() == bare
    assert bool(mia.detect.random_repeats(model, draws=1, seed=0).front) == (says is not False)


@pytest.fixture(scope="module")
def gelu():
    return mia.load("gelu-2l")


def test_a_bos_that_is_written_out_is_not_doubled(gelu):
    once = gelu.to_tokens("Mr. Dor")
    for prepend_bos in (None, True, False):
        assert torch.equal(gelu.to_tokens("<|endoftext|>Mr. Dor", prepend_bos), once)
    llama = sentencepiece()
    llama = copy.deepcopy(llama)
    llama.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    talk = [{"role": "user", "content": "the Paris"}]
    other = copy.copy(gelu)
    other.tokenizer = llama
    prompt = llama.apply_chat_template(talk, tokenize=False)
    expected = llama(prompt, add_special_tokens=False)["input_ids"]
    assert expected[0] == 1 != expected[1]
    assert other.to_tokens(prompt)[0].tolist() == expected


def test_options_of_to_tokens_are_honoured(gelu):
    texts = ["Mr. Dorling was a tall man.", "I"]
    right, left = gelu.to_tokens(texts), gelu.to_tokens(texts, padding_side="left")
    assert right.shape == left.shape
    assert torch.equal(right[0], left[0])
    assert left[1, -2:].tolist() == right[1, :2].tolist() == gelu.to_tokens("I")[0].tolist()
    long = "the man " * 200
    whole = gelu.to_tokens(long)
    assert whole.shape[1] > gelu.spec.n_ctx
    assert torch.equal(gelu.to_tokens(long, truncate=True), whole[:, : gelu.spec.n_ctx])
    assert gelu.to_tokens("I", move_to_device=False).device.type == "cpu"
    with pytest.raises(TypeError, match="padding"):
        gelu.to_tokens("I", padding=True)
    with pytest.raises(MechInterpError, match="more than this model's context of 128"):
        gelu(long)


def test_a_text_cut_to_the_context_keeps_its_last_special_token(tmp_path):
    write_folder("bert", tmp_path)
    model = mia.load(tmp_path)
    ids = model.to_tokens("the " * 100, truncate=True)[0].tolist()
    assert ids == [2, *[5] * 46, 3]
    assert model("the " * 46).shape[1] == 48


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("\ud800 man", r"text 0 is not valid Unicode: a lone surrogate '\\ud800' at character 0"),
        (["man", "a\udc80"], "text 1 is not valid Unicode"),
        (None, "NoneType None|give tokens or text once"),
        (b"man", "bytes b'man'"),
        (["man", None], "text 1 is NoneType None; expected a text"),
        (["man", b"x"], "text 1 is bytes"),
        ([], "expected"),
        ([[1, 2], [3]], "expected a text, texts, or token ids .pos. or .batch, pos."),
        ([["a", "b"], ["c"]], "expected a text, texts, or token ids"),
        ({"a": 1}, "dict"),
        ([1.5, 2], "tokens must be integers"),
        ("", "text 0 is empty"),
        (["man", ""], "text 1 is empty"),
    ],
)
def test_what_is_no_text_and_no_tokens_is_refused(gelu, bad, message):
    for call in (gelu, gelu.as_tokens, gelu.to_batch, lambda x: mia.paths.freeze(gelu, x)):
        with pytest.raises(MechInterpError, match=message):
            call(bad)
    for call in (gelu.to_tokens, gelu.to_str_tokens) if isinstance(bad, str) else ():
        with pytest.raises(MechInterpError, match=message):
            call(bad)
    for call in (gelu.to_tokens, gelu.to_single_token) if bad is None or isinstance(bad, bytes) else ():
        with pytest.raises(MechInterpError, match="expected a text"):
            call(bad)


@pytest.mark.usefixtures("as_users_run_it")
def test_options_that_mean_nothing_are_refused(gelu, tmp_path):
    with pytest.raises(MechInterpError, match="padding_side='middle'; expected 'left' or 'right'"):
        gelu.to_tokens(["a", "b c"], padding_side="middle")
    write_folder("qwen2", tmp_path)
    with pytest.raises(MechInterpError, match="has no BOS token"):
        mia.load(tmp_path).to_tokens("man", prepend_bos=True)


@pytest.mark.parametrize(
    "tokenizer", [byte_level(bos=True), sentencepiece(), sentencepiece(legacy=True), wordpiece()]
)
def test_every_token_has_a_text_of_its_own(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    texts = vocabulary.texts(range(len(tokenizer)))
    assert len(set(texts)) == len(tokenizer)
    assert all(texts)
    assert [vocabulary.find(text) for text in texts] == list(range(len(tokenizer)))
    assert vocabulary.texts([len(tokenizer), 50300]) == [f"⟨id {len(tokenizer)}⟩", "⟨id 50300⟩"]
    special = {vocabulary.texts([i])[0] for i in tokenizer.all_special_ids}
    assert special == set(tokenizer.all_special_tokens)
    assert not special & set(vocabulary.texts(vocabulary.plain_ids.tolist()))
    assert len(vocabulary.plain_ids) == len(tokenizer) - len(special)


def test_gpt2_s_tokens(data):
    """Published facts about the vocabulary of GPT-2."""
    from transformers import PreTrainedTokenizerFast

    file = str(data / "tokenizers" / "gpt2" / "tokenizer.json")
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<|endoftext|>"))
    assert vocabulary.texts([15496, 995, 198, 220, 50256]) == [
        "Hello",
        " world",
        "\n",
        " ",
        "<|endoftext|>",
    ]
    assert vocabulary.texts([30325, 222]) == [" ⟨F0⟩⟨9F⟩⟨98⟩", "⟨80⟩"]  # " 😀"
    assert vocabulary.readable([40, 30325, 222, 7477]) == ["I", " 😀⟨1–3/4⟩", "😀⟨4/4⟩", " OK"]
    texts = vocabulary.texts(range(50257))
    assert len(set(texts)) == 50257
    assert sum("⟨" in text for text in texts) < 1000


def test_spaces_tell_tokens_apart(gelu):
    tokenizer = sentencepiece()
    model = copy.copy(gelu)
    model.tokenizer = tokenizer
    ids = tokenizer.convert_tokens_to_ids(["▁Paris", "Paris", "▁is", "is", "<0xF0>", "<0x0A>"])
    names = [" Paris", "Paris", " is", "is", "⟨F0⟩", "\n"]
    assert model.to_str_tokens(ids) == names
    assert [model.to_single_token(name) for name in names] == ids
    assert model.to_single_token("⟨id 777⟩") == 777
    with pytest.raises(MechInterpError, match=r"'Paris in' is 2 tokens, not one: \[' Paris', ' in'\]"):
        model.to_single_token("Paris in")


def test_pieces_of_words_keep_their_mark(gelu):
    model = copy.copy(gelu)
    model.tokenizer = wordpiece()
    assert model.to_str_tokens("running")[1:-1] == ["[UNK]"]
    assert model.to_str_tokens("runing paris")[1:-1] == ["run", "##ing", "paris"]
    assert [model.to_single_token(t) for t in ("ing", "##ing", "Paris")] == [15, 13, 11]


@pytest.mark.parametrize("text", ["I 😀 é 日本 ok", "مرحبا بالعالم", "👩‍👩‍👧 z"])
def test_characters_are_readable_across_their_tokens(gelu, text):
    parts = gelu.to_readable_tokens(text)
    whole = "".join(parts)
    for character in text.replace("‍", ""):
        assert character in whole
    assert "�" not in whole
    assert len(parts) == len(gelu.to_str_tokens(text)) == gelu.to_tokens(text).shape[1]
    assert gelu.to_readable_tokens("I 😀")[-4:] == ["😀⟨1/4⟩", "😀⟨2/4⟩", "😀⟨3/4⟩", "😀⟨4/4⟩"]
    assert gelu.to_readable_tokens(gelu.to_tokens("😀")[0, 1:4]) == ["⟨F0⟩", "⟨9F⟩", "⟨98⟩"]  # cut short
    assert gelu.typed(gelu.to_tokens(text)[0]) == text


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12))
def test_the_texts_of_tokens_make_the_text(text):
    """Bytes that stand as ⟨F0⟩ put back, the tokens' texts say what was typed."""
    tokenizer = byte_level(bos=True)
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written = [
        bytes.fromhex(part) if odd % 2 else part.encode()
        for token in vocabulary.texts(ids)
        for odd, part in enumerate(re.split("⟨([0-9A-F]{2})⟩", token))
    ]
    assert b"".join(written) == text.encode()
    assert set(text) <= set("".join(vocabulary.readable(ids)))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"], indirect=True)
def test_token_helpers_are_transformer_lens_s(kind, folder, hugging_face):
    """Against the bridge's own helpers on the same folder."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    model = mia.convert(bridge, check=False)
    texts = [TEXT, "the man was tall"]
    for text in texts:
        assert model.to_str_tokens(text) == bridge.to_str_tokens(text)
        assert model.to_str_tokens(text, prepend_bos=False) == bridge.to_str_tokens(text, prepend_bos=False)
        for mode in ("first", "last"):
            for bos in (None, False):
                for token in (" man", model.to_single_token(" man"), bridge.to_tokens(" man", False)[0, 0]):
                    expected = bridge.get_token_position(token, text, mode=mode, prepend_bos=bos)
                    assert model.get_token_position(token, text, mode=mode, prepend_bos=bos) == expected
    assert model.to_str_tokens(texts) == bridge.to_str_tokens(texts)
    rows = [model.to_tokens(text)[0] for text in texts]
    assert model.to_str_tokens(rows) == bridge.to_str_tokens(rows)
    assert model.to_string(torch.stack([rows[0], rows[0]])) == bridge.to_string(torch.stack([rows[0]] * 2))
    assert model.to_string([row.tolist() for row in rows]) == [bridge.to_string(row) for row in rows]
    assert model.to_string(rows[0].numpy()) == bridge.to_string(rows[0].numpy())
    assert model.to_str_tokens(rows[0].numpy()) == bridge.to_str_tokens(rows[0].numpy())
    for i in (0, 65, 400):
        assert model.to_single_str_token(i) == bridge.to_single_str_token(i)
    last = bridge.get_token_position(465, torch.tensor([465, 3, 465]), mode="last")
    assert model.get_token_position(465, torch.tensor([465, 3, 465]), mode="last") == last == 2


@pytest.mark.usefixtures("as_users_run_it")
def test_token_helpers_refuse_by_name(gelu):
    with pytest.raises(MechInterpError, match=r"token ' man' \(id 465\) does not occur in \["):
        gelu.get_token_position(" man", "I")
    with pytest.raises(MechInterpError, match="mode='middle'; expected 'first' or 'last'"):
        gelu.get_token_position(" man", "a man", mode="middle")
    with pytest.raises(MechInterpError, match=r"shape \(2, 2\); expected one row"):
        gelu.get_token_position(1, torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(MechInterpError, match=r"a token id is list \[1, 2\]; expected one integer"):
        gelu.to_single_str_token([1, 2])


def test_transformer_lens_s_test_prompt_works(gelu, capsys):
    from transformer_lens.utilities.exploratory_utils import test_prompt as shows

    shows("Mr. Dor", "ling", gelu, prepend_space_to_answer=False, top_k=3)
    said = capsys.readouterr().out
    assert "Mr" in said
    assert "Top 0th token" in said
