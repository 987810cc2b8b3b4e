"""Circuits over the vocabulary against dense float64 matrices."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import mechinterp_attn as mia
from mechinterp_attn.circuits import streaming
from mechinterp_attn.circuits.streaming import block_shape, top_entries, top_of_rows
from mechinterp_attn.model.select import resolve_head
from tests.circuits import dense
from tests.conftest import tiny_bridge

C = mia.circuits
FLOAT64 = 1e-10  # sums of a few hundred float64 products of order one


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


@pytest.fixture(scope="module")
def rotary_gqa():
    generator = torch.Generator().manual_seed(3)
    cfg = dict(n_layers=2, n_heads=4, n_key_value_heads=2, d_model=16, d_head=8, n_ctx=12, d_vocab=11)
    cfg |= dict(d_mlp=10, act_fn="silu", normalization_type="RMS", positional_embedding_type="rotary")
    cfg |= dict(d_vocab_out=7)
    shapes = {"embed.W_E": (11, 16), "unembed.W_U": (16, 7)}
    for layer in range(2):
        at = f"blocks.{layer}"
        shapes |= {f"{at}.attn.W_Q": (4, 16, 8), f"{at}.attn.W_O": (4, 8, 16)}
        shapes |= {f"{at}.attn.W_K": (2, 16, 8), f"{at}.attn.W_V": (2, 16, 8)}
        shapes |= {f"{at}.attn.b_Q": (4, 8), f"{at}.attn.b_K": (2, 8)}
        shapes |= {f"{at}.mlp.W_in": (16, 10), f"{at}.mlp.W_out": (10, 16), f"{at}.ln1.w": (16,)}
    state = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return mia.convert(mia.Checkpoint(cfg, state))


@pytest.mark.parametrize("head", ["L0H1", "L1H3", "L0N5", "L1N0", "L0H2 > L1H1", "L0H0 > L0N3 > L1H2"])
@pytest.mark.parametrize("which", ["OV", "QK"])
@pytest.mark.parametrize("over", ["all", "rows", "columns"])
@pytest.mark.parametrize("largest", [True, False])
def test_top_entries_are_those_of_the_dense_circuit(model, head, which, over, largest):
    top = C.ov_top if which == "OV" else C.qk_top
    if which == "QK" and "N" in head.split()[-1] and ">" not in head:
        return  # one key per query: test_a_neurons_queries_are_ranked_once_each
    found = top(model, head, top_k=4, over=over, largest=largest)
    table = dense.over_vocabulary(model, resolve_head(model, head), which)
    frame = found.frame
    listed = table[frame["source_id"].tolist(), frame["token_id"].tolist()]
    torch.testing.assert_close(torch.tensor(frame["value"].to_numpy()), listed, rtol=0, atol=FLOAT64)
    every = {"all": table.reshape(1, -1), "rows": table, "columns": table.T}[over]
    expected = every.topk(4, largest=largest).values.flatten()
    torch.testing.assert_close(listed, expected, rtol=0, atol=FLOAT64)
    assert frame["rank"].tolist() == [1, 2, 3, 4] * len(every)
    assert found.receipt.ok


def test_grouped_heads_other_outputs_and_rotary_offsets(rotary_gqa):
    model = rotary_gqa
    table = dense.over_vocabulary(model, model["L1H3"], "OV")
    assert table.shape == (11, 7)
    found = C.ov_top(model, "L1H3", top_k=77).frame
    assert found["value"].to_numpy() == pytest.approx(table.flatten().sort(descending=True).values)
    assert set(found["token"]) == {f"<{i}>" for i in range(7)}  # outputs are no input tokens
    # With an offset: the scores that the model itself computes for two tokens that far apart, its
    # norm scale and key bias taken out (RMS: token vectors of mean square 1).
    bank, index = model.heads.find("L0H2")
    for offset in (0, 1, 5):
        expected = torch.empty(11, 11, dtype=torch.float64)
        for key in range(11):
            x = model.W_E.detach()
            q = bank.turned(x @ bank.W_Q[index].detach() + bank.b_Q[index].detach(), offset + 2)
            k = bank.turned(x[key] @ bank.W_K[index // 2].detach(), 2)
            expected[:, key] = q @ k  # the query's bias is in q
        found = C.qk_top(model, "L0H2", offset=offset, top_k=11, over="rows").frame
        # only the distance matters, so both may stand two positions further on; rotary tables are
        # float32, hence the tolerance
        again = expected[found["source_id"].tolist(), found["token_id"].tolist()]
        assert found["value"].to_numpy() == pytest.approx(again.numpy(), abs=2e-5)


def test_sources_can_be_chosen_and_keep_their_order(model):
    table = dense.over_vocabulary(model, model["L1H0"], "OV")
    frame = C.ov_top(model, "L1H0", sources=[7, 2], over="rows", top_k=2).frame
    assert frame["source_id"].tolist() == [7, 7, 2, 2]
    assert frame["value"].to_numpy() == pytest.approx(table[[7, 2]].topk(2).values.flatten().numpy())


def test_entries_blocks_and_statistics(model):
    circuit = C.qk_circuit(model, "L1H2")
    table = dense.over_vocabulary(model, model["L1H2"], "QK")
    assert circuit.entry(3, 8) == pytest.approx(float(table[3, 8]))
    block = circuit.block([3, 1], [8, 0, 8])
    torch.testing.assert_close(block.values, table[[3, 1]][:, [8, 0, 8]], rtol=0, atol=FLOAT64)
    assert block.frame.shape == (2, 3)
    assert len(block.plot().data) == 1
    numbers = circuit.statistics()
    table = table - table.mean(1, keepdim=True)  # as softmax sees it
    eigenvalues = torch.linalg.eigvals(table)
    expected = {
        "frobenius_norm": table.norm(),
        "spectral_norm": torch.linalg.matrix_norm(table, 2),
        "mean": table.mean(),
        "diagonal_mean": table.diagonal().mean(),
        "diagonal_share": table.diagonal().square().sum() / table.square().sum(),
        "positive_diagonal": (table.diagonal() > 0).double().mean(),
        "top1_on_diagonal": (table.argmax(1) == torch.arange(len(table))).double().mean(),
        "copying_score": eigenvalues.real.sum() / eigenvalues.abs().sum(),
    }
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(float(value), abs=1e-9), name


@pytest.mark.parametrize("largest", [True, False])
def test_a_neurons_queries_are_ranked_once_each(model, largest):
    """It sees its own token only: over all, the tokens that make it fire most, each once."""
    z = (model.W_E.detach() @ model["L1N4"].W_Q + model["L1N4"].b_Q)[:, 0]
    frame = C.qk_top(model, "L1N4", top_k=5, largest=largest).frame
    assert frame["value"].to_numpy() == pytest.approx(z.topk(5, largest=largest).values.numpy())
    assert frame["source_id"].tolist() == z.topk(5, largest=largest).indices.tolist()
    assert frame["token_id"].tolist() == frame["source_id"].tolist()
    frame = C.qk_top(model, "L1N4", top_k=1, over="rows", sources=[7, 2]).frame
    assert frame["source_id"].tolist() == frame["token_id"].tolist() == [7, 2]
    with pytest.raises(mia.MechInterpError, match="expected 1 to 13"):
        C.qk_top(model, "L1N4", top_k=14)


def test_a_neuron_is_read_as_when_it_fires_and_what_it_writes(model):
    """QK: its pre-activation for every token; OV: rank 1, what it reads times what it writes."""
    head = model["L0N9"]
    z = model.W_E.detach() @ head.W_Q + head.b_Q
    frame = C.qk_top(model, "L0N9", top_k=1, over="rows").frame
    assert frame["value"].to_numpy() == pytest.approx(z[:, 0].numpy())
    singular = torch.linalg.svdvals(dense.over_vocabulary(model, head, "OV"))
    assert float(singular[1] / singular[0]) < 1e-12


def test_float32_search_is_ranked_by_float64_values():
    """Big enough to be searched in float32, several blocks wide; the values listed are float64."""
    generator = torch.Generator().manual_seed(0)
    cfg = dict(n_layers=1, n_heads=1, d_model=32, d_head=16, n_ctx=4, d_vocab=12000, attn_only=True)
    cfg |= dict(normalization_type=None)
    shapes = {"embed.W_E": (12000, 32), "unembed.W_U": (32, 12000), "pos_embed.W_pos": (4, 32)}
    shapes |= {f"blocks.0.attn.W_{x}": (1, 32, 16) for x in "QKV"} | {"blocks.0.attn.W_O": (1, 16, 32)}
    state = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    model = mia.convert(mia.Checkpoint(cfg, state), check=False)
    found = C.ov_top(model, "L0H0", top_k=50)
    assert "search float32" in found.receipt.notes["dtype"]
    assert found.receipt.ok
    head = model["L0H0"]
    left, right = model.W_E.double() @ head.W_V.double(), head.W_O.double() @ model.W_U.double()
    right = right - right.mean(1, keepdim=True)
    best = torch.cat([(part @ right).flatten().topk(50).values for part in left.split(1000)])
    expected = best.topk(50).values
    torch.testing.assert_close(torch.tensor(found.frame["value"].to_numpy()), expected, rtol=1e-12, atol=0)
    rows = C.ov_top(model, "L0H0", top_k=3, over="rows", sources=list(range(0, 12000, 7)))
    expected = (left[::7] @ right).topk(3).values.flatten()
    torch.testing.assert_close(torch.tensor(rows.frame["value"].to_numpy()), expected, rtol=1e-12, atol=0)
    rough = C.ov_top(model, "L0H0", top_k=5, precision="bfloat16")
    assert "bfloat16" in rough.receipt.notes["dtype"]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 5000),
    rank=st.integers(1, 4),
    k=st.integers(1, 30),
    sign=st.sampled_from([1, -1]),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 9),
)
def test_streamed_ranking_equals_sorting_the_product(rows, columns, rank, k, sign, levels, seed):
    """Several blocks, ragged edges, many ties (two levels), more asked for than a block holds."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-levels, levels, (rows, rank), generator=generator).double()
    right = torch.randint(-levels, levels, (rank, columns), generator=generator).double()
    table = left @ right
    whole = min(k, table.numel())
    found = top_entries(left, right, whole, sign=sign)
    assert torch.equal(found.value, (sign * table).flatten().topk(whole).values * sign)
    assert torch.equal(table[found.row, found.column], found.value)
    assert len(set(zip(found.row.tolist(), found.column.tolist(), strict=True))) == whole
    each = min(k, columns)
    found = top_of_rows(left, right, each, sign=sign)
    assert torch.equal(found.value.view(rows, each), (sign * table).topk(each).values * sign)
    assert torch.equal(table[found.row, found.column], found.value)


@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("k", [1, 3, 4, 5, 30, 150])
@pytest.mark.parametrize("columns", [150, 160, 288, 301])
def test_small_blocks_in_groups_of_32_miss_nothing(monkeypatch, columns, k, levels):
    """First blocks of 128 columns, in 4 groups, then blocks of 32: fewer groups than are asked for, just as
    many, more; ends that no group fits; lists that fill only after several blocks.
    """
    monkeypatch.setattr(streaming, "block_shape", lambda device: (8, 32))
    generator = torch.Generator().manual_seed(columns + k)
    left = torch.randint(-levels, levels, (21, 3), generator=generator).double()
    right = torch.randint(-levels, levels, (3, columns), generator=generator).double()
    table = left @ right
    for sign in (1, -1):
        found = top_of_rows(left, right, k, sign=sign)
        assert torch.equal(found.value.view(21, k), (sign * table).topk(k).values * sign)
        assert torch.equal(table[found.row, found.column], found.value)
        assert all(len(set(part.tolist())) == k for part in found.column.view(21, k))
        found = top_entries(left, right, k, sign=sign)
        assert torch.equal(found.value, (sign * table).flatten().topk(k).values * sign)
        assert torch.equal(table[found.row, found.column], found.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: C.ov_top(m, "L1H9"), "no head L1H9.*near it: L1"),
        (lambda m: C.ov_top(m, "head 3"), "'head 3' is not a head label"),
        (lambda m: C.ov_top(m, "L0H0", top_k=170), "top_k=170 is out of range; expected 1 to 169"),
        (lambda m: C.qk_top(m, "L0H0", top_k=14, over="rows"), "expected 1 to 13"),
        (
            lambda m: C.ov_top(m, "L0H0", sources=[13]),
            r"tokens \[13\]: expected at least one, out of 0..12",
        ),
        (lambda m: C.ov_top(m, "L0H0", sources=[]), "expected at least one"),
        (lambda m: C.qk_top(m, "L0H0", offset=24), "offset=24; expected 0 to 23"),
        (lambda m: C.virtual_head(m, "L1H0", "L0H0"), "L0H0 does not read what L1H0 writes"),
        (lambda m: C.virtual_head(m, "L0H1", "L0H0"), "L0H0 does not read what L0H1 writes"),
        (lambda m: C.virtual_head(m, "L0N1", "L0H0"), "L0H0 does not read what L0N1 writes"),
        (lambda m: C.virtual_head(m, "L0H1"), "at least 2 heads, got 1"),
    ],
)
def test_bad_input_is_answered_with_what_to_do(model, call, message):
    with pytest.raises(mia.MechInterpError, match=message):
        call(model)


def test_a_plan_says_the_cost_and_runs_nothing(model):
    plan = mia.plan(C.ov_top, model, "L0H0")
    assert plan.flops == 2 * 13 * 13 * 4
    assert plan.chunks == 1
    assert "GFLOP" in str(plan)


@pytest.mark.parametrize(("free", "side"), [(2**20, 512), (8 * 2**30, 11520), (141 * 2**30, 16384)])
def test_blocks_on_a_gpu_follow_its_free_memory(monkeypatch, free, side):
    """A sixteenth of it, neither tiny nor beyond 1 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    assert block_shape(torch.device("cuda")) == (side, side)


def test_a_search_ends_where_no_entry_can_be_larger():
    """Norms fall fast: rows and columns beyond the bound are never multiplied, and nothing is missed."""
    generator = torch.Generator().manual_seed(0)
    fall, fall_right = (torch.logspace(0, -3, n, dtype=torch.float64) for n in (2000, 20000))
    shuffled = torch.randperm(2000, generator=generator)
    left = torch.randn(2000, 8, generator=generator, dtype=torch.float64) * fall[shuffled, None]
    right = torch.randn(8, 20000, generator=generator, dtype=torch.float64) * fall_right
    made = []
    real = torch.mm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "mm", lambda a, b, out: (made.append(len(a) * b.shape[1]), real(a, b, out=out))[1]
        )
        found = top_entries(left, right, 40)
        assert sum(made) < left.shape[0] * right.shape[1] / 4
        made.clear()
        rows = top_of_rows(left, right, 3)
        assert sum(made) < left.shape[0] * right.shape[1] / 2
    table = left @ right
    torch.testing.assert_close(found.value, table.flatten().topk(40).values, rtol=1e-12, atol=0)
    torch.testing.assert_close(rows.value.view(-1, 3), table.topk(3).values, rtol=1e-12, atol=0)
