"""A corpus shared among Ray's workers: the same numbers, errors, order."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core import cluster
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.detect import corpus
from tests.detect.test_corpus import SENTENCE, same


@pytest.fixture(scope="module")
def two_workers():
    """A local cluster; a machine on which Ray itself cannot start one has nothing to say about us."""
    ray = pytest.importorskip("ray")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:
        ray.shutdown()
        pytest.skip(f"Ray cannot start a local cluster here: {error}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has, so that sums inside a product are taken alike
    yield ray
    torch.set_num_threads(threads)
    ray.shutdown()


def test_ray_workers_give_the_very_numbers_of_one_process(tmp_path, two_workers, monkeypatch):
    """Two workers of a local cluster against one process, bit for bit; and a pass begun by one and
    finished by the others."""
    monkeypatch.setattr(corpus, "PIECE", 512)
    model = mia.load("gelu-2l")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": SENTENCE * n}) + "\n" for n in (40, 4, 9, 100, 2, 60)))
    options = dict(heads=["L1H1", ("L0H2", "L1H1")], estimate=True, top_k=3, context=4)
    serial = mia.detect.over_corpus(model, path, **options)
    assert serial.tally.windows * 128 > 8 * 512  # more pieces than workers
    same(serial, mia.detect.over_corpus(model, path, workers=2, **options), within=0)
    begun = tmp_path / "begun"
    mia.detect.over_corpus(model, path, limit=3, resume=begun, **options)
    copy = shutil.copy(begun, tmp_path / "copy")
    alone = mia.detect.over_corpus(model, path, resume=copy, **options)
    finished = mia.detect.over_corpus(model, path, resume=begun, workers=2, **options)
    same(alone, finished, within=0)
    same(serial, finished, within=1e-6)  # the limit cut batches elsewhere, whose sums are float32
    assert two_workers.is_initialized()  # a cluster that was there is left running
    hooked = model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z)])
    with (
        hooked,
        pytest.raises(MechInterpError, match=r"model that has hooks \(at blocks\.0\.attn\.hook_z\)"),
    ):
        mia.detect.over_corpus(model, path, workers=2)


def test_a_worker_s_error_is_ours(two_workers):
    with pytest.raises(MechInterpError, match="document 1 has no 'text'"):
        mia.detect.over_corpus(mia.load("gelu-2l"), ["It was", {"body": "x"}], workers=2)


class Engine:
    """A stand-in for Ray whose workers answer in an order that is no order."""

    def __init__(self):
        self.answers, self.busy, self.choose = {}, set(), random.Random(0)

    def worker(self, name):
        def remote(piece):
            assert name not in self.busy  # one piece at a time
            self.busy.add(name)
            ref = object()
            self.answers[ref] = name, piece * 10
            return ref

        return SimpleNamespace(do=SimpleNamespace(remote=remote))

    def wait(self, refs):
        ready = self.choose.choice(refs)
        return [ready], [ref for ref in refs if ref is not ready]

    def get(self, ref):
        name, answer = self.answers.pop(ref)
        self.busy.remove(name)
        return answer


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_pieces_come_back_in_order_and_few_are_read_ahead(workers):
    engine, read = Engine(), []

    def pieces():
        for piece in range(30):
            read.append(piece)
            yield piece

    given = cluster._in_order(engine, [engine.worker(i) for i in range(workers)], pieces())
    for expected in range(30):
        assert next(given) == expected * 10
        assert len(read) <= expected + 1 + cluster.AHEAD * workers
    assert next(given, None) is None


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MechInterpError, match=r"workers=2 needs Ray.*pip install 'mechinterp_attn\[ray\]'"):
        mia.detect.over_corpus(mia.load("gelu-2l"), ["abc"], workers=2)
