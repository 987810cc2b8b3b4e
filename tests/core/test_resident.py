"""A plan's bytes against a process's resident memory, as the system counts it: the tables included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mechinterp_attn as mia

SCRIPT = """
import json, re, torch
import mechinterp_attn as mia
from pathlib import Path

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.manual_seed(0)
cfg = dict(n_layers=1, n_heads=2, d_model=32, d_head=16, n_ctx=64, d_vocab=12000, attn_only=True)
W = lambda *shape: torch.randn(*shape) / 8
state = {"embed.W_E": W(12000, 32), "unembed.W_U": W(32, 12000), "pos_embed.W_pos": W(64, 32)}
state |= {f"blocks.0.attn.W_{s}": W(2, 32, 16) for s in "QKV"} | {"blocks.0.attn.W_O": W(2, 16, 32)}
model = mia.convert(mia.Checkpoint(cfg, state), check=False)
tokens = torch.randint(12000, (64,))
frozen = mia.paths.freeze(model, tokens)
c, found = mia.circuits, {}
calls = {
    "ov_top": (c.ov_top, (model, "L0H0"), {"over": "rows", "top_k": 40}),
    "bigrams": (c.bigrams, (model,), {"top_k": 40}),
    "orders": (mia.paths.orders, (frozen,), {}),
}
for name, (function, args, options) in calls.items():
    few = options | ({"sources": [1], "top_k": 1} if "top_k" in options else {})
    function(*args, **few)  # what a first call alone takes: code, caches, threads
    made = mia.plan(function, *args, **options)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = kib("VmRSS")
    kept = function(*args, **options)
    found[name] = made.bytes, 1024 * (kib("VmHWM") - before)
    del kept
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it")
def test_a_plan_is_enough_for_the_process():
    env = os.environ | {"PYTHONPATH": str(Path(mia.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-1000:]
    for name, (planned, taken) in json.loads(done.stdout.splitlines()[-1]).items():
        assert taken <= planned + 2**25, (name, planned, taken)  # 32 MiB: what the allocator keeps
