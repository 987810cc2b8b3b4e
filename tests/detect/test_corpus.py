"""Scores over a corpus: any batches, shards, order; kills; files; passages."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.detect import corpus
from tests.conftest import tiny_bridge
from tests.detect.test_scores import Words

HEADS = ["L0H1", "L1N3", ("L0H1", "L1H2")]


class Letters(Words):
    """``Words`` that also speaks."""

    def __call__(self, text, add_special_tokens):
        return super().__call__(text.strip(), add_special_tokens)

    def decode(self, ids, **_):
        return "".join("^" if i == 0 else chr(ord("a") + i - 1) for i in ids)


@pytest.fixture(scope="module")
def model():
    model = mia.convert(tiny_bridge())
    model.tokenizer = Letters()
    return model


@pytest.fixture(scope="module")
def texts():
    choose = random.Random(0)
    return ["".join(choose.choices("abcdefghijkl", k=choose.choice([1, 5, 30, 60]))) for _ in range(12)]


@pytest.fixture(scope="module")
def whole(model, texts):
    return mia.detect.over_corpus(model, texts, heads=HEADS, length=16, top_k=4, context=3)


def same(one, other, within=1e-12):
    """Equal but for the order of additions; ``within=0``: bit for bit, passages and all."""
    numbers = list(one.frame.select_dtypes("float").columns)
    assert (one.frame[numbers] - other.frame[numbers]).abs().max(axis=None) <= within
    assert one.frame[numbers].isna().equals(other.frame[numbers].isna())
    assert one.loss == pytest.approx(other.loss, rel=0, abs=within)
    assert (one.tokens, one.tally.windows) == (other.tokens, other.tally.windows)
    ablations = [result.ablations.set_index("head") for result in (one, other)]
    assert (ablations[0] - ablations[1]).abs().max(axis=None) <= within
    best, again = one.tally.best, other.tally.best
    if within == 0:
        assert best.value.equal(again.value)
        assert best.place.equal(again.place)
        assert best.tokens.equal(again.tokens)
        assert best.norms.equal(again.norms)
    assert (best.value - again.value).abs().nan_to_num(0).max() < 1e-6  # kept as float32


def test_it_is_the_same_as_scoring_the_windows_at_once(model, texts, whole):
    cut_up = [text[start : start + 15] for text in texts for start in range(0, len(text), 15)]
    scores = mia.detect.score_heads(model, tokens=cut_up)
    for column in ("previous_token", "induction", "entropy", "duplicate_token_weighted"):
        assert whole.frame[column].tolist() == pytest.approx(scores.frame[column].tolist(), abs=1e-12)
    expected = mia.detect.ablate(model, cut_up, HEADS)
    assert whole.loss == pytest.approx(expected.loss, abs=1e-5)
    assert whole.tokens == int(expected.counted.sum())
    changes = expected.frame["loss_change"].tolist()
    assert whole.ablations["loss_change"].tolist() == pytest.approx(changes, abs=1e-5)
    logits = expected.frame["logit_change"].tolist()
    assert whole.ablations["logit_change"].tolist() == pytest.approx(logits, abs=1e-5)


def test_estimates_are_those_of_ablate(model, texts, whole):
    cut_up = [text[start : start + 15] for text in texts for start in range(0, len(text), 15)]
    options = dict(heads=["L0H1", "L1N3", "L0H0"], length=16, top_k=4, context=3)
    result = mia.detect.over_corpus(model, texts, estimate=True, **options)
    expected = mia.detect.ablate(model, cut_up, exact=0).frame.set_index("head")["estimate"]
    assert result.frame["estimate"].tolist() == pytest.approx(expected[result.frame["head"]].tolist())
    both = result.frame.dropna(subset="loss_change")
    rank = result.receipt.notes["rank correlation of estimate and exact"]
    assert rank == pytest.approx(both["loss_change"].corr(both["estimate"], method="spearman"), abs=1e-3)


def centred(x):
    """As every norm behind it sees it: LayerNorm takes the mean out."""
    return x - x.mean(-1, keepdim=True)


def test_passages_are_where_the_head_writes_most(model, texts, whole):
    found = []
    for document, text in enumerate(texts):
        for start in range(0, len(text), 15):
            window = text[start : start + 15]
            _, cache = model.run_with_cache(window)
            z = centred(cache["blocks.1.attn.hook_z"][0, 1:, 2] @ model["L1H2"].W_O)
            post = cache["blocks.0.mlp.hook_post"][0, 1:, 7].abs() * centred(model["L0N7"].W_O).norm()
            for i, (head, neuron) in enumerate(zip(z.norm(dim=-1).tolist(), post.tolist(), strict=True)):
                around = window[max(0, i - 3) : i], window[i], window[i + 1 : i + 4]
                found.append((head, neuron, document, start + i, around))
    for head, place in (("L1H2", 0), ("L0N7", 1)):
        expected = sorted(found, key=lambda row: -row[place])[:4]
        passages = whole.passages(head)
        assert list(passages["rank"]) == [1, 2, 3, 4]
        assert passages["norm"].tolist() == pytest.approx([row[place] for row in expected], rel=1e-6)
        assert list(passages["document"]) == [row[2] for row in expected]
        assert list(passages["position"]) == [row[3] for row in expected]
        assert [text.lstrip("^") for text in passages["before"]] == [row[4][0] for row in expected]
        assert list(passages["token"]) == [row[4][1] for row in expected]
        assert list(passages["after"]) == [row[4][2] for row in expected]
        for row in passages.itertuples():  # token by token, with what the head writes at each
            assert "".join(row.tokens) == row.before + row.token + row.after
            assert row.norms[len(row.before)] == pytest.approx(row.norm)
            here = {(one[2], one[3]): one[place] for one in found}
            after = [here[row.document, row.position + i + 1] for i in range(len(row.after))]
            assert row.norms[len(row.before) + 1 :] == pytest.approx(after, rel=1e-6)


def test_batch_size_changes_nothing(model, texts, whole):
    for batch in (1, 5):
        same(
            whole,
            mia.detect.over_corpus(model, texts, heads=HEADS, length=16, top_k=4, context=3, batch=batch),
        )


def test_neither_pieces_nor_the_order_of_documents_matter(model, texts, whole, monkeypatch):
    options = dict(heads=HEADS, length=16, top_k=4, context=3)
    backwards = mia.detect.over_corpus(model, texts[::-1], **options)
    same(whole, backwards)
    monkeypatch.setattr(corpus, "PIECE", 48)
    same(whole, mia.detect.over_corpus(model, texts, batch=3, **options))


@pytest.mark.parametrize("die_at", [1, 8])
def test_an_interrupted_pass_goes_on_where_it_was(model, texts, tmp_path, monkeypatch, die_at):
    monkeypatch.setattr(corpus, "PIECE", 48)
    options = dict(heads=HEADS[:2], estimate=True, length=16, top_k=4, context=3, batch=2)
    whole = mia.detect.over_corpus(model, texts, **options)

    def until_killed():
        for i, text in enumerate(texts):
            if i == die_at:
                raise KeyboardInterrupt
            yield text

    path = tmp_path / "pass.safetensors"
    with pytest.raises(KeyboardInterrupt):
        mia.detect.over_corpus(model, until_killed(), resume=path, **options)
    resumed = mia.detect.over_corpus(model, texts, resume=path, **options)
    same(whole, resumed, within=0)
    again = mia.detect.over_corpus(model, texts, resume=path, **options)  # all done: nothing more
    same(whole, again, within=0)


def test_a_pass_goes_on_with_its_own_model_settings_and_texts_only(model, texts, tmp_path):
    options = dict(heads=HEADS[:2], length=16, top_k=4, context=3, resume=tmp_path / "pass")
    mia.detect.over_corpus(model, texts, limit=4, **options)
    further = mia.detect.over_corpus(model, texts, limit=7, **options)  # a higher limit goes further
    same(further, mia.detect.over_corpus(model, texts[:7], **(options | dict(resume=None))))
    with pytest.raises(MechInterpError, match=r"texts up to document 6 are not the ones .* have changed"):
        mia.detect.over_corpus(model, [*texts[:6], "abcabc", *texts[7:]], **options)
    replaced = ["".join(reversed(text)) for text in texts[:6]]  # all but the last one that was counted
    with pytest.raises(MechInterpError, match=r"texts up to document 6 are not the ones .* have changed"):
        mia.detect.over_corpus(model, [*replaced, *texts[6:]], **options)
    with pytest.raises(MechInterpError, match=r"up to document 6 are not the ones .* limit is smaller"):
        mia.detect.over_corpus(model, texts, limit=2, **options)
    with pytest.raises(MechInterpError, match=r"other work \(top: 4 there, 3 here\)"):
        mia.detect.over_corpus(model, texts, **(options | dict(top_k=3)))
    other = mia.convert(tiny_bridge(seed=9))
    other.tokenizer = Letters()
    with pytest.raises(MechInterpError, match=r"other work .*model: "):
        mia.detect.over_corpus(other, texts, **options)
    swapped = mia.convert(tiny_bridge())  # the same numbers in another order: their sums are the same
    swapped.tokenizer = Letters()
    with torch.no_grad():
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            weight = getattr(swapped.banks[0], name)
            weight.copy_(weight[[1, 0, 2, 3]].clone())
    with pytest.raises(MechInterpError, match=r"other work .*model: "):
        mia.detect.over_corpus(swapped, texts, **options)
    hooked = model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
    with hooked, pytest.raises(MechInterpError, match="resume= does not go with a model that has hooks"):
        mia.detect.over_corpus(model, texts, **options)


SENTENCE = "It was the best of times, it was the worst of times, it was the age of wisdom. "
PASS = """
import sys, time
import mechinterp_attn as mia
from mechinterp_attn.detect import corpus

corpus.PIECE = 512

def texts():
    for n in {lengths}:
        time.sleep({pause})
        yield {sentence!r} * n

mia.detect.over_corpus(mia.load("gelu-2l"), texts(), heads=["L1H1"], top_k=3, resume=sys.argv[1])
"""


def test_a_process_killed_in_the_middle_loses_nothing_and_counts_nothing_twice(tmp_path, monkeypatch):
    """SIGKILL, which no handler sees, between one write of the file and the next; then resumed here."""
    monkeypatch.setattr(corpus, "PIECE", 512)
    lengths = [1 + 7 * i % 11 for i in range(16)]
    path = tmp_path / "pass"
    script = PASS.format(lengths=lengths, pause=0.5, sentence=SENTENCE)
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stderr=subprocess.DEVNULL)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # not before it was through
    model, texts = mia.load("gelu-2l"), [SENTENCE * n for n in lengths]
    options = dict(heads=["L1H1"], top_k=3)
    with safe_open(path, "pt") as file:
        counted = int(file.get_tensor("tokens"))
    resumed = mia.detect.over_corpus(model, texts, resume=path, **options)
    whole = mia.detect.over_corpus(model, texts, **options)
    assert 0 < counted < whole.tokens
    same(whole, resumed, within=1e-9)  # the killed process may have run with other threads


def test_a_file_that_is_no_pass(model, texts, tmp_path):
    path = tmp_path / "pass"
    path.write_text("not a pass")
    with pytest.raises(MechInterpError, match="it is not a pass over a corpus"):
        mia.detect.over_corpus(model, texts, resume=path)


def test_files_and_datasets(model, texts, whole, tmp_path):
    options = dict(heads=HEADS, length=16, top_k=4, context=3)
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"id": i, "body": text}) + "\n\n" for i, text in enumerate(texts)))
    same(whole, mia.detect.over_corpus(model, lines, field="body", **options))
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": texts})
    same(whole, mia.detect.over_corpus(model, data, **options), within=0)
    same(whole, mia.detect.over_corpus(model, data.to_iterable_dataset(), **options), within=0)
    limited = mia.detect.over_corpus(model, data, limit=3, **options)
    same(limited, mia.detect.over_corpus(model, texts[:3], **options))
    with pytest.raises(MechInterpError, match=r"texts is a mapping with 'train'; give .* texts\['train'\]"):
        mia.detect.over_corpus(model, datasets.DatasetDict(train=data), **options)


def test_documents_of_token_ids(model, texts, whole):
    """As they come out of tokenised data sets, and for models without a tokenizer."""
    rows = [model.to_tokens(text)[0] for text in texts]  # with the BOS, which is not doubled
    options = dict(heads=HEADS, length=16, top_k=4, context=3)
    same(whole, mia.detect.over_corpus(model, [{"ids": row} for row in rows], field="ids", **options))
    silent = mia.convert(tiny_bridge())
    found = mia.detect.over_corpus(silent, [[3, 1, 2, 3, 1], torch.tensor([5, 6])], top_k=2)
    assert found.tokens == 5
    assert found.passages("L0H0")["tokens"][0][0].startswith("<")
    with pytest.raises(MechInterpError, match=r"document 0 has token id 99; expected \[pos\], ids 0..12"):
        mia.detect.over_corpus(silent, [[99, 3]])
    with pytest.raises(MechInterpError, match="document 0 is a float; expected a text, token ids"):
        mia.detect.over_corpus(silent, [3.5])


def test_text_files_are_cut_at_line_ends(tmp_path):
    from mechinterp_attn.detect.texts import documents

    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of a long book\n" for i in range(10_000)))
    pieces = list(documents(path))
    assert len(pieces) > 2
    assert all(piece.endswith("\n") for piece in pieces)
    assert "".join(pieces) == path.read_text()


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("nowhere.txt", {}, "no text file nowhere.txt"),
        (
            [{"body": "ab"}],
            {},
            "document 0 has no 'text', only 'body'; name the field of the text with field=",
        ),
        ([""], {}, "no window of at least 2 tokens"),
        (["abc"], dict(length=99, top_k=0), "length=99; expected 2 to 24.*; top_k=0; expected at least 1"),
        (["abc"], dict(heads=["L7H7"]), "no head L7H7"),
        (["abc"], dict(workers=0), "workers=0; expected at least 1"),
        (["abc"], dict(max_bytes=100), "one sequence of 24 tokens needs about .* raise max_bytes"),
    ],
)
def test_bad_input_says_what_to_do(model, texts, options, message):
    with pytest.raises(MechInterpError, match=message):
        mia.detect.over_corpus(model, texts, **options)


def test_a_broken_line_is_named(model, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "abc"}\n{"text": \n')
    with pytest.raises(MechInterpError, match="line 2: not JSON"):
        mia.detect.over_corpus(model, path)
