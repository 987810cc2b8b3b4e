"""The streamed search for the strongest compositions: memory, precision, interruption, several workers."""

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import mechinterp_attn as mia
from mechinterp_attn.circuits import composition_scores, distributed
from mechinterp_attn.circuits.blocks import Top
from mechinterp_attn.circuits.groups import groups_of
from mechinterp_attn.circuits.pair_search import search_job
from tests.circuits.test_composition import random_model
from tests.conftest import tiny_bridge

C = mia.circuits


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


@pytest.mark.parametrize("kind", ["Q", "V"])
@pytest.mark.parametrize("rank_by", ["score", "z"])
def test_streamed_search_lists_the_best_of_the_dense_table(model, kind, rank_by):
    every = C.composition(model, kind)
    best = C.composition(model, kind, top_k=30, rank_by=rank_by)
    expected = every.frame.sort_values(rank_by, ascending=False, kind="stable").head(30)
    assert best.frame[rank_by].to_numpy() == pytest.approx(expected[rank_by].to_numpy(), abs=1e-10)
    assert set(zip(best.frame["src"], best.frame["dst"], strict=True)) == set(
        zip(expected["src"], expected["dst"], strict=True)
    )
    histograms = best.histograms
    assert histograms is not None
    assert histograms.groupby(["src", "dst"])["share"].sum().to_numpy() == pytest.approx(1.0)
    # between attention banks the histogram is exact
    own = every.frame[every.frame["src"].str.match("L0H") & every.frame["dst"].str.match("L1H")]["score"]
    shares = histograms[(histograms["src"] == "L0H") & (histograms["dst"] == "L1H")]
    below = shares[shares["right"] <= own.median()]["share"].sum()
    assert below == pytest.approx((own < shares[shares["right"] <= own.median()]["right"].max()).mean())


def test_float32_search_over_several_blocks_and_units():
    """Wide enough for several blocks; a small max_bytes makes several units; answers agree."""
    model = random_model(d_mlp=2500, d_model=64, n_layers=2).float()
    whole = C.composition(model, "V", "mlp", "mlp", top_k=40)
    assert "float32" in whole.receipt.notes["dtype"]
    one, two = model.banks[1], model.banks[3]
    write = one.W_out.detach().double()
    read = two.W_in.detach().double()
    cosines = (write / write.norm(dim=1, keepdim=True)) @ (read / read.norm(dim=0))
    expected = cosines.abs().flatten().topk(40).values
    assert whole.frame["score"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-12)
    tight = C.composition(model, "V", "mlp", "mlp", top_k=40, max_bytes=4_000_000)
    assert tight.frame.drop(columns="z").equals(whole.frame.drop(columns="z"))
    assert (
        mia.plan(C.composition, model, "V", top_k=3, max_bytes=4_000_000).chunks
        > mia.plan(C.composition, model, "V", top_k=3).chunks
    )


@pytest.mark.parametrize("way", ["global", "legacy", "by backend"])
def test_a_callers_own_precision_is_left_as_it_was(way):
    """Torch has three ways to set it, and refuses to read one where another was used."""
    model, cuda = random_model(d_model=64, n_heads=4).float(), torch.backends.cuda.matmul
    before = cuda.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        if way == "global":
            torch.set_float32_matmul_precision("high")
        elif way == "legacy":
            cuda.allow_tf32 = True
        else:
            cuda.fp32_precision = "tf32"
        own = cuda.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        assert C.composition(model, "V", top_k=5).receipt.ok
        assert (cuda.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == own
    finally:
        torch.set_float32_matmul_precision("highest")
        cuda.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_coarser_arithmetic_only_where_it_is_asked_for(precision):
    """The search is coarser, the receipt says so, and what is listed is float64 all the same."""
    model = random_model(d_model=64, n_heads=4).float()
    before = torch.get_float32_matmul_precision()
    found = C.composition(model, "V", top_k=5, precision=precision)
    assert found.receipt.notes["dtype"] == f"values float64, search {precision}"
    assert found.receipt.ok
    assert torch.get_float32_matmul_precision() == before
    plain = C.composition(model, "V", top_k=5)
    assert found.frame["score"].to_numpy() == pytest.approx(plain.frame["score"].to_numpy(), abs=1e-12)
    assert "bfloat16" not in str(plain.receipt)
    assert "tf32" not in str(plain.receipt)


def test_max_bytes_too_small_says_the_least_that_works(model):
    with pytest.raises(
        mia.MechInterpError, match=r"max_bytes=1,000 is too small; [\d,]+ is the smallest"
    ) as error:
        C.composition(model, "V", top_k=5, max_bytes=1000)
    least = int(str(error.value).split("; ")[1].split()[0].replace(",", ""))
    assert len(C.composition(model, "V", top_k=5, max_bytes=least).frame) == 5
    with pytest.raises(mia.MechInterpError, match="too small"):
        C.composition(model, "V", top_k=5, max_bytes=least - 1)


def test_a_search_can_be_interrupted_and_resumed(model, tmp_path, monkeypatch):
    whole = C.composition(model, "V", top_k=25)
    file = tmp_path / "search.safetensors"
    module = composition_scores
    real, calls = module.run_unit, []

    def stop_at_third(job, unit, sink):
        calls.append(unit)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(job, unit, sink)

    monkeypatch.setattr(module, "run_unit", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        C.composition(model, "V", top_k=25, resume=file)
    assert file.exists()
    monkeypatch.setattr(module, "run_unit", real)
    runs = []
    monkeypatch.setattr(module, "run_unit", lambda *a: (runs.append(a[1]), real(*a)))
    again = C.composition(model, "V", top_k=25, resume=file)
    assert len(runs) == 1  # two of three units were done
    assert again.frame.equals(whole.frame)
    assert again.histograms.equals(whole.histograms)
    with pytest.raises(mia.MechInterpError, match=r"belongs to other work .kind: .V. there, .Q. here"):
        C.composition(model, "Q", top_k=25, resume=file)
    with torch.no_grad():
        changed = mia.convert(tiny_bridge())
        changed.banks[0].W_O[0, 0, 0] += 1e-6
    with pytest.raises(mia.MechInterpError, match=r"belongs to other work .weights: "):
        C.composition(changed, "V", top_k=25, resume=file)
    file.write_bytes(b"not a state")
    with pytest.raises(mia.MechInterpError, match="it is not a composition search"):
        C.composition(model, "V", top_k=25, resume=file)


KILLED = """
import sys, time
import torch
from tests.circuits.test_composition import C, random_model
from mechinterp_attn.circuits import composition_scores
from mechinterp_attn.core import resume
resume.EVERY = 0.0
real = composition_scores.run_unit
composition_scores.run_unit = lambda *given: (time.sleep(0.5), real(*given))
C.composition(random_model(n_layers=6), "V", top_k=25, resume=sys.argv[1])
"""


def test_a_killed_search_is_resumed(tmp_path):
    """A real kill, from outside, which no handler sees."""
    file = tmp_path / "search.safetensors"
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(file)], cwd=root)
    try:
        for _ in range(1200):
            if file.exists() or child.poll() is not None:
                break
            time.sleep(0.1)
    finally:
        child.kill()
        child.wait()
    assert file.exists()
    with safe_open(file, framework="pt") as state:
        done = len(json.loads(state.metadata()["state"])["progress"])
    model = random_model(n_layers=6)
    whole = C.composition(model, "V", top_k=25)
    assert 0 < done < mia.plan(C.composition, model, "V", top_k=25).chunks
    again = C.composition(model, "V", top_k=25, resume=file)
    assert again.frame.equals(whole.frame)
    assert again.histograms.equals(whole.histograms)


def test_two_ray_workers_give_the_serial_answer():
    """On a real local cluster. It is left out only where Ray is not installed or does not start."""
    ray = pytest.importorskip("ray", reason="the ray extra is not installed")
    model = mia.convert(tiny_bridge())
    model.banks[0].hook_z.add_hook(lambda z, hook: z)  # the caller's own hooks do not travel
    serial = C.composition(model, "V", top_k=25)
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:  # Ray raises a bare Exception where a node does not come up in time
        pytest.skip(f"a local Ray cluster does not start here: {error}")
    try:
        spread = C.composition(model, "V", top_k=25, workers=2)
        pair = C.composition(model, "K", ["L0H0 > L0N3", "L0H1"], ["L1H1"], top_k=1, workers=2)
    finally:
        ray.shutdown()
    assert spread.frame.equals(serial.frame)
    assert spread.histograms.equals(serial.histograms)
    assert pair.frame.equals(C.composition(model, "K", ["L0H0 > L0N3", "L0H1"], ["L1H1"], top_k=1).frame)


def test_a_unit_does_not_depend_on_where_it_runs(model):
    """What Ray's workers do, without a cluster: the job is pickled, its units run apart and out of
    order, and the parts merge to the serial answer."""
    groups = groups_of(model, None)
    job = search_job(model, "V", groups, groups, 25, "score", 2**30, "float32")
    sink = Top(job)
    sent = distributed._of_plain_tensors(job)
    for unit in reversed(job.units()):
        there, its_unit = pickle.loads(pickle.dumps((sent, unit)))
        sink.merge(pickle.loads(pickle.dumps(distributed._worker(there)(its_unit))))
    serial = C.composition(model, "V", top_k=25).frame["score"]
    found = sink.best.entries.value.sqrt().sort(descending=True).values[:25]
    assert found.numpy() == pytest.approx(serial.to_numpy(), abs=1e-12)
