"""Rankings list the tokens that texts are made of: no special tokens, no padding rows, unless asked for."""

import pytest
import torch

import mechinterp_attn as mia
from tests.folders import write_folder

PADDING = 20


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def model(request, tmp_path_factory):
    """Its padding rows, which no tokenizer knows, and its special tokens are by far the largest."""
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(request.param, folder, padding_rows=PADDING)
    found = mia.load(folder)
    with torch.no_grad():
        for i in left_out(found):
            found.W_E[i] *= 30
            found.W_U[:, i] *= 30
    return found


def left_out(model) -> set[int]:
    """Special tokens by the tokenizer's own list, and the ids behind its last one."""
    return {*model.tokenizer.all_special_ids, *range(len(model.tokenizer), model.spec.d_vocab)}


def rankings(model, **options):
    """Every ranking over the vocabulary: its table and the columns of ids in it."""
    c = mia.circuits
    pair = ["source_id", "token_id"]
    for over in ("all", "rows", "columns"):
        yield c.ov_top(model, "L0H1", over=over, top_k=3, **options), pair
        yield c.qk_top(model, "L1H2", over=over, top_k=3, **options), pair
    yield c.qk_top(model, "L1N3", **options), pair
    yield c.ov_top(model, "L1N3", largest=False, **options), pair
    yield c.bigrams(model, top_k=3, **options), pair
    yield c.skip_trigrams(model, **options), [*pair, "destination_id"]
    yield c.factoring_bugs(model, "L0H1", **options), [*pair, "destination_id", "other_token_id"]
    yield c.reads_and_writes(model, ["L0N0", "L1N5"], **options), ["token_id"]
    yield c.singular_directions(model, "L0H2", **options), ["token_id"]
    if model.spec.positions == "standard":
        for query in ("token", "position"):
            yield c.token_positions(model, "L0H0", query=query, **options), ["token_id"]


def test_what_is_no_text_is_left_out_and_listed_when_asked_for(model):
    hidden = left_out(model)
    for (short, columns), (whole, _) in zip(
        rankings(model), rankings(model, special_tokens=True), strict=True
    ):
        assert short.receipt.ok
        assert whole.receipt.ok
        for name in columns:
            assert not hidden & set(short.frame[name]), (short.title, name)
        if len(whole.frame):
            assert hidden & set(whole.frame[columns].to_numpy().ravel()), whole.title
        assert f"{len(hidden)} ids" in short.receipt.notes["left out"]
        assert "left out" not in whole.receipt.notes


def test_they_are_the_ranking_of_the_rest(model):
    """Against the whole circuit, its unlisted rows and columns taken out."""
    kept = torch.tensor([i for i in range(model.spec.d_vocab) if i not in left_out(model)])
    circuit = mia.circuits.ov_circuit(model, "L0H1")
    table = (circuit.left() @ circuit.right())[kept][:, kept]
    best = table.flatten().topk(20)
    found = mia.circuits.ov_top(model, "L0H1", top_k=20).frame
    torch.testing.assert_close(torch.tensor(found["value"].to_numpy()), best.values, rtol=1e-9, atol=1e-9)
    assert found["source_id"].tolist() == kept[best.indices // len(kept)].tolist()
    assert found["token_id"].tolist() == kept[best.indices % len(kept)].tolist()


def test_a_source_that_is_named_is_listed(model):
    end = model.tokenizer.all_special_ids[0]
    found = mia.circuits.ov_top(model, "L0H1", sources=[end], top_k=4).frame
    assert set(found["source_id"]) == {end}
    assert not left_out(model) & set(found["token_id"])


def test_a_default_lists_what_there_is(model):
    """A vocabulary of five: nothing is refused for having fewer than ten."""
    from tests.conftest import tiny_bridge

    small = mia.convert(tiny_bridge(d_vocab=5), check=False)
    c = mia.circuits
    assert len(c.bigrams(small).frame) == 25
    assert len(c.ov_top(small, "L0H1", over="rows").frame) == 25
    assert set(c.reads_and_writes(small, "L0N1").frame["rank"]) == {1, 2, 3, 4, 5}
    assert set(c.singular_directions(small, "L0H1").frame["rank"]) == {1, 2, 3, 4, 5}
    assert len(c.skip_trigrams(small).frame) == 5
    with pytest.raises(mia.MechInterpError, match="top_k=6 is out of range; expected 1 to 5"):
        c.bigrams(small, top_k=6)
