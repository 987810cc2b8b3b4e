"""The training comparison: its modules are what the page says, and its page says what was measured."""

import importlib.util
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training_comparison.md"
FIGURES = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "attention_only_training.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def runs():
    return pd.read_csv(FIGURES / "training_runs.csv")


def table(first: str) -> dict[str, list[str]]:
    """The rows of the page's table whose head starts with ``first``: the first cell, the others."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def test_untied_neuron_heads_are_softmax_heads_and_generalise_the_silu_mlp(script):
    torch.manual_seed(0)
    mlp, heads = script.MLP(24).double(), script.NeuronHeads(24).double()
    x = torch.randn(2, 5, script.D_MODEL, dtype=torch.float64)
    scores = torch.stack(
        [heads.query(x), torch.zeros(2, 5, 24, dtype=torch.float64)], -1
    )  # self, bias token
    values = torch.stack([heads.value(x), torch.zeros(2, 5, 24, dtype=torch.float64)], -1)
    literal = heads.out((scores.softmax(-1) * values).sum(-1))
    assert torch.allclose(heads(x), literal, atol=1e-14)  # float64 rounding
    for own in (heads.query, heads.value):
        own.load_state_dict(mlp.read.state_dict())
    heads.out.load_state_dict(mlp.out.state_dict())
    assert torch.allclose(heads(x), mlp(x), atol=1e-14)


def test_every_variant_is_causal(script):
    for variant in script.VARIANTS:
        model = script.Model(variant, seed=0).double()
        tokens = torch.arange(1, 17)[None]
        changed = tokens.clone()
        changed[0, 9:] += 100
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :9], after[:, :9]), variant.name
        assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_variants_of_the_page_are_those_of_the_script_and_the_runs(script, runs):
    """Parameters counted in the models, FLOPs by PyTorch's counter, heads by hand."""
    rows = table("variant")
    assert list(rows) == [variant.name for variant in script.VARIANTS]
    for variant in script.VARIANTS:
        model = script.Model(variant, seed=0)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.ones(1, script.N_CTX, dtype=torch.long))
        counted = {
            "heads": 4 * variant.sublayers.count("a") + variant.width * variant.sublayers.count("u"),
            "parameters": sum(p.numel() for p in model.parameters()),
            "forward_flops_per_token": counter.get_total_flops() // script.N_CTX,
        }
        said = [int(cell.replace(",", "")) for cell in rows[variant.name][1:]]
        own = runs.loc[runs["variant"] == variant.name, list(counted)].drop_duplicates()
        assert said == list(counted.values()) == own.to_numpy().tolist()[0]
        assert len(own) == 1


def test_the_results_of_the_page_are_those_of_the_runs(runs):
    rows = table("trained")
    assert list(rows) == list(runs["variant"].unique())
    base = runs[runs["variant"] == "MLP"].set_index("seed")
    for name, own in runs.groupby("variant"):
        own = own.set_index("seed")
        behind = own["loss"] - base["loss"]
        seeds, loss, against, wall = rows[name]
        assert int(seeds) == len(own) >= 3
        assert loss == f"{own['loss'].mean():.3f} ({spread(own['loss'], '.3f')})"
        if name != "MLP":
            assert against == f"{behind.mean():+.3f} ({spread(behind, '+.3f')})"
        assert wall == f"{own['wall_seconds'].mean():.0f} s ({spread(own['wall_seconds'], '.0f')})"


def test_the_speeds_of_the_page_are_those_of_the_timing(runs):
    rows, tokens = table("alone"), runs["tokens"].iloc[0]
    rates = pd.read_csv(FIGURES / "training_speed.csv").groupby("variant")["tokens_per_second"].median()
    assert set(rows) == set(rates.index)
    for name, cells in rows.items():
        rate, ratio = rates[name], rates[name] / rates["MLP"]
        assert cells == [f"{rate:,.0f}", f"{ratio:.2f}", f"{tokens / rate:.0f} s"]


def spread(values, form):
    return f"{values.min():{form}} to {values.max():{form}}"


def test_curves_end_where_the_runs_do(runs):
    curves = pd.read_csv(FIGURES / "training_curves.csv")
    ends = curves.groupby(["variant", "seed"])[["tokens", "loss"]].last()
    assert ends.equals(runs.set_index(["variant", "seed"])[["tokens", "loss"]].sort_index())


def test_the_page_names_a_figure_that_is_there():
    for image in re.findall(r"\{image\} (\S+)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / image).exists()
