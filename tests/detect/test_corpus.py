"""Scores over a corpus: any batches, shards, order; kills; files; passages; Ray."""

import json
import random

import pytest

import mechinterp_attn as mia
from mechinterp_attn.detect import corpus
from mechinterp_attn.errors import MechInterpError
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
    return mia.detect.over_corpus(model, texts, heads=HEADS, length=16, top=4, context=3)


def same(one, other):
    numbers = ["written", "entropy", "previous_token", "induction", "induction_weighted", "loss_change"]
    assert (one.frame[numbers] - other.frame[numbers]).abs().max(axis=None) < 1e-12
    assert one.frame[numbers].isna().equals(other.frame[numbers].isna())
    assert one.loss == pytest.approx(other.loss, abs=1e-12)
    assert one.tokens == other.tokens
    assert (one.ablations["loss_change"] - other.ablations["loss_change"]).abs().max() < 1e-12
    assert (one.tally.best.value - other.tally.best.value).abs().max() < 1e-6  # kept as float32


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


def test_passages_are_where_the_head_writes_most(model, texts, whole):
    found = []
    for document, text in enumerate(texts):
        for start in range(0, len(text), 15):
            window = text[start : start + 15]
            _, cache = model.run_with_cache(window)
            z = cache["blocks.1.attn.hook_z"][0, 1:, 2] @ model["L1H2"].W_O
            post = cache["blocks.0.mlp.hook_post"][0, 1:, 7].abs() * model["L0N7"].W_O.norm()
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


def test_batch_size_changes_nothing(model, texts, whole):
    for batch in (1, 5):
        same(
            whole,
            mia.detect.over_corpus(model, texts, heads=HEADS, length=16, top=4, context=3, batch=batch),
        )


def test_shards_add_up_and_order_does_not_matter(model, texts, whole):
    settings = corpus._Settings(
        heads=tuple(HEADS), length=16, batch=3, top=4, context=3, limit=None, field="text", max_bytes=2**30
    )
    shards = [corpus.count(model, texts, settings.of_shard(i, 3), None) for i in (2, 0, 1)]
    same(whole, corpus._result(model, shards[0] + shards[1] + shards[2], settings))
    assert (shards[0] + shards[1] + shards[2]).best.place.equal(whole.tally.best.place)
    backwards = mia.detect.over_corpus(model, texts[::-1], heads=HEADS, length=16, top=4, context=3)
    same(whole, backwards)


@pytest.mark.parametrize("die_at", [1, 5, 11])
def test_a_killed_pass_goes_on_where_it_was(model, texts, whole, tmp_path, monkeypatch, die_at):
    monkeypatch.setattr(corpus, "SAVE_EVERY", 1)

    def until_killed():
        for i, text in enumerate(texts):
            if i == die_at:
                raise KeyboardInterrupt
            yield text

    options = dict(heads=HEADS, length=16, top=4, context=3, batch=2, save=tmp_path / "pass.safetensors")
    with pytest.raises(KeyboardInterrupt):
        mia.detect.over_corpus(model, until_killed(), **options)
    resumed = mia.detect.over_corpus(model, texts, **options)
    same(whole, resumed)
    assert resumed.tally.windows == whole.tally.windows
    again = mia.detect.over_corpus(model, texts, **options)  # all done: nothing is counted twice
    same(whole, again)
    with pytest.raises(MechInterpError, match=r"other settings \(top: 4 there, 3 here\)"):
        mia.detect.over_corpus(model, texts, **(options | dict(top=3)))
    other = mia.convert(tiny_bridge(seed=9))
    other.tokenizer = Letters()
    with pytest.raises(MechInterpError, match=r"other settings .*model: "):
        mia.detect.over_corpus(other, texts, **options)


def test_a_file_that_is_no_pass(model, texts, tmp_path):
    path = tmp_path / "pass"
    path.write_text("not a pass")
    with pytest.raises(MechInterpError, match="is not a saved pass over a corpus"):
        mia.detect.over_corpus(model, texts, save=path)


def test_files_and_datasets(model, texts, whole, tmp_path):
    options = dict(heads=HEADS, length=16, top=4, context=3)
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"id": i, "body": text}) + "\n\n" for i, text in enumerate(texts)))
    same(whole, mia.detect.over_corpus(model, lines, field="body", **options))
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": texts})
    same(whole, mia.detect.over_corpus(model, data, **options))
    limited = mia.detect.over_corpus(model, data, limit=3, **options)
    same(limited, mia.detect.over_corpus(model, texts[:3], **options))


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
        ([{"body": "ab"}], {}, "document 0 has no text under 'text'; name its field with field="),
        ([""], {}, "no window of at least 2 tokens"),
        (["abc"], dict(length=99, top=0), "length=99; expected 2 to 24.*; top=0; expected at least 1"),
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


@pytest.fixture
def two_workers():
    """A local cluster; a machine on which Ray itself cannot start one has nothing to say about us."""
    ray = pytest.importorskip("ray")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:
        ray.shutdown()
        pytest.skip(f"Ray cannot start a local cluster here: {error}")
    yield
    ray.shutdown()


def test_two_ray_workers_count_the_same(tmp_path, two_workers):
    """A local cluster of two workers on a bundled model and a text file, against one process."""
    model = mia.load("gelu-2l")
    path = tmp_path / "texts.jsonl"
    sentence = "It was the best of times, it was the worst of times, it was the age of wisdom. "
    path.write_text("".join(json.dumps({"text": sentence * n}) + "\n" for n in (1, 4, 9, 2)))
    options = dict(heads=["L1H3"], top=3, context=4)
    serial = mia.detect.over_corpus(model, path, **options)
    shared = mia.detect.over_corpus(model, path, workers=2, save=tmp_path / "pass", **options)
    assert shared.tokens == serial.tokens
    assert shared.loss == pytest.approx(serial.loss, abs=1e-6)
    numbers = ["induction", "previous_token", "current_token_weighted", "written", "entropy"]
    assert (shared.frame[numbers] - serial.frame[numbers]).abs().max(axis=None) < 1e-4  # float32
    assert shared.ablations["loss_change"].item() == pytest.approx(
        serial.ablations["loss_change"].item(), abs=1e-5
    )
    assert (shared.tally.best.value - serial.tally.best.value).abs().max() < 1e-3
    assert len(list(tmp_path.glob("pass.*of2"))) == 2
