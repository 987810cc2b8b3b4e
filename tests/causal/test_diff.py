"""What changed between two models, against models made by hand with some heads exchanged, in float64."""

import copy

import pytest
import torch
from typer.testing import CliRunner

import mechinterp_attn as mia
from mechinterp_attn.circuits.changes import rounded, weight_changes
from tests.conftest import random_tokens, tiny_bridge

KINDS = {
    "gelu": {},
    "gated, grouped, turned": dict(
        act_fn="silu", gated_mlp=True, normalization_type="RMS", n_key_value_heads=2,
        positional_embedding_type="rotary", rotary_dim=4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return mia.convert(tiny_bridge(**KINDS[request.param]))


@pytest.fixture(scope="module")
def task(model):
    clean, corrupt = random_tokens(model, 5, 9), random_tokens(model, 5, 9, seed=1)
    return mia.Task(clean, corrupt=corrupt, answer=[1, 2, 3, 4, 5], against=[6, 7, 8, 9, 10])


def edited(model, *labels, size=0.3, seed=7):
    """A copy in which what some heads write is changed at random."""
    out = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for label in labels:
        bank, index = out.heads.find(label)
        W = bank.W_O if bank.mixes_positions else bank.W_out
        W.data[index] += size * torch.randn(W[index].shape, generator=generator, dtype=torch.float64)
    return out


def noisy(model, seed=3):
    """A copy in which everything has changed."""
    out = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in out.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return out


@pytest.mark.parametrize("label", ["L0H2", "L1H3", "L0N5", "L1N20"])
def test_a_planted_edit_is_found(model, task, label):
    """Alone it changed; where everything else was rounded too, it is first by far."""
    found = mia.diff(model, edited(model, label), task, edges=0)
    assert found.receipt.ok
    assert found.top(1)["head"].item() == label == found.frame["head"][0]
    others = found.frame[found.frame["head"] != label]
    assert (others[["OV", "QK", "output"]] == 0).all(axis=None)
    assert (others["z"] <= 0).all()
    assert found.receipt.notes["changed"] == 1
    row = found.frame.iloc[0]
    change = float(found.after.mean() - found.before.mean())
    assert row["gained"] == pytest.approx(change, abs=1e-5) == row["lost"]  # metrics are float32
    small = edited(model, label, size=0.02)
    for bank in small.banks:
        for parameter in bank.parameters():
            generator = torch.Generator().manual_seed(bank.step)
            parameter.data = rounded(parameter.data, torch.finfo(torch.bfloat16).eps, generator)
    found = mia.diff(model, small, task, rounding=torch.bfloat16, exact=0, edges=0)
    assert label in list(found.top(5)["head"])
    assert found.top(1)["z"].item() > found.receipt.notes["largest z of a rounded copy"]


def test_a_rounded_copy_stays_within_its_null(model, task):
    """Nothing was edited: no head stands out by much more than the null's own copies do."""
    copied = copy.deepcopy(model)
    for number, bank in enumerate(copied.banks):
        for parameter in bank.parameters():
            generator = torch.Generator().manual_seed(100 + number)
            parameter.data = rounded(parameter.data, torch.finfo(torch.bfloat16).eps, generator)
    found = mia.diff(model, copied, task, rounding=torch.bfloat16, exact=0, edges=0)
    assert found.frame["z"].max() < 2 * found.receipt.notes["largest z of a rounded copy"]
    assert 1e-4 < found.frame["output"].median() < 1e-2  # bfloat16 rounds by up to 2^-9


def test_gained_and_lost_are_weights_exchanged_by_hand(model, task):
    """One head of a model in which everything changed, put into the other by copying its weights."""
    tuned = noisy(model)
    found = mia.diff(model, tuned, task, exact=len(model.heads), edges=0)
    rows = found.frame.set_index("head")
    for label in ("L0H1", "L1H2", "L0N3", "L1N7"):
        for host, guest, column in ((model, tuned, "gained"), (tuned, model, "lost")):
            made = copy.deepcopy(host)
            (bank, index), (other, _) = made.heads.find(label), guest.heads.find(label)
            with put(bank, other, index):
                scored = task.score(made).mean()
            plain = task.score(host).mean()
            expected = scored - plain if column == "gained" else plain - scored
            assert rows.loc[label, column] == pytest.approx(float(expected), abs=2e-5), (label, column)


class put:
    """A bank whose head is another's: both banks run, and the head's part is exchanged."""

    def __init__(self, bank, other, index):
        self.bank, self.other, self.index = bank, other, index

    def __enter__(self):
        def part(bank, args):
            """What one head of a bank writes: the output with it less the output without it."""
            mine = copy.deepcopy(bank)
            mine._forward_hooks.clear()
            whole = mine(*args)
            (mine.W_O if bank.mixes_positions else mine.W_out).data[self.index] = 0
            return whole - mine(*args)

        def hook(bank, args, out):
            return out - part(bank, args) + part(self.other, args)

        self.handle = self.bank.register_forward_hook(hook)

    def __exit__(self, *error):
        self.handle.remove()


def test_estimates_are_the_slope(model, task):
    """A small edit: the estimate is what was measured, to first order."""
    found = mia.diff(model, edited(model, "L0H1", "L1N3", "L0N9", size=1e-3), task, edges=0)
    measured = found.frame.dropna(subset=["gained"])
    assert sorted(measured["head"]) == ["L0H1", "L0N9", "L1N3"]
    for side in ("gained", "lost"):  # float32 metrics of order 1; second order terms
        torch.testing.assert_close(
            torch.tensor(measured[side].tolist()), torch.tensor(measured[f"{side}_estimate"].tolist()),
            atol=1e-5, rtol=0.05,
        )  # fmt: skip


def test_weights_are_compared_as_dense_products_in_any_basis(model):
    """Another basis of a head's own space is no change; a change is that of the dense matrices."""
    turned, tuned = copy.deepcopy(model), noisy(model)
    for bank in turned.banks:
        if bank.mixes_positions:  # one basis for all heads that share values
            basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
            bank.W_V.data, bank.b_V.data = bank.W_V @ basis, bank.b_V @ basis
            bank.W_O.data = basis.T @ bank.W_O
    for bank, same, other in zip(model.banks, turned.banks, tuned.banks, strict=True):
        # Squares of 1e-16: roots of what is left of them.
        assert float(weight_changes(bank, same)["OV"].max()) < 1e-6
        for index in (0, 3):
            one, two = bank.head(index), other.head(index)
            dense = [
                torch.cat([head.W_V, head.b_V[None]]) @ of.stacked("O")[index]
                for head, of in ((one, bank), (two, other))
            ]
            expected = float((dense[1] - dense[0]).norm() / dense[0].norm())
            assert float(weight_changes(bank, other)["OV"][index]) == pytest.approx(expected, rel=1e-9)


def test_a_corpus_edges_and_all_heads_together():
    """Texts instead of a task; all changed heads carry the whole change where nothing else changed."""
    model = mia.load("gelu-2l")
    tuned = copy.deepcopy(model)
    tuned.blocks[0].attn.W_O.data[2] *= 0.5
    tuned.blocks[1].neurons.W_out.data[41] *= 2
    found = mia.diff(
        model, tuned, ["The man said that he had gone to the house.", "She saw the sea."], edges=50
    )
    assert set(found.frame["head"][:2]) == {"L0H2", "L1N41"} == set(found.top(2)["head"])
    assert found.together["gained_share"].iloc[-1] == pytest.approx(1, abs=1e-2)  # float32
    assert (found.rest["change"] == 0).all()
    assert found.edges["change"].abs().is_monotonic_decreasing
    assert found.receipt.ok
    assert set(found.circuit(10)) == {"both", "only_self", "only_other"}
    assert not any(point.has_hooks() for m in (model, tuned) for point in m.hook_dict.values())


def test_models_that_cannot_be_compared_are_refused_with_every_reason(model, task):
    other = mia.convert(tiny_bridge(n_layers=1, d_mlp=32)).float()
    with pytest.raises(mia.MechInterpError) as error:
        mia.diff(model, other, task)
    for said in ("n_layers is 2 and 1", "d_mlp is 24 and 32", "dtype is torch.float64 and torch.float32"):
        assert said in str(error.value)
    with pytest.raises(mia.MechInterpError, match="at least 2 draws"):
        mia.diff(model, model, task, draws=1)
    with pytest.raises(mia.MechInterpError, match="edges=1000"):
        mia.diff(model, model, task, exact=0, edges=0).circuit(3)
    bundled = mia.load("gelu-2l")
    renamed = copy.copy(bundled)
    renamed.tokenizer = copy.deepcopy(bundled.tokenizer)
    renamed.tokenizer.add_tokens(["new"])
    with pytest.raises(mia.MechInterpError, match="tokenizers differ"):
        mia.diff(bundled, renamed, ["a text"])


def test_the_command(tmp_path):
    from mechinterp_attn.cli import app

    model = mia.load("gelu-2l")
    model.save(tmp_path / "base")
    model.blocks[1].attn.W_O.data[3] *= 0.5
    model.save(tmp_path / "tuned")
    words = ["diff", str(tmp_path / "base"), str(tmp_path / "tuned"), "induction", "--prompts", "4"]
    done = CliRunner().invoke(app, [*words, "--exact", "1", "--top", "1", "--json", "-q"])
    assert done.exit_code == 0, done.output
    assert '"L1H3"' in done.output
