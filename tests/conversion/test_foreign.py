"""Folders from strangers: whatever is wrong with one is said, at once, and nothing in it runs."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import mechinterp_attn as mia
from mechinterp_attn.core.errors import CheckpointError
from mechinterp_attn.model.saved import sha256, sha256_of_config
from mechinterp_attn.sources.zoo import bundled_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One good folder of every kind: TransformerLens's convention, one of ours, Hugging Face's."""
    from tests.folders import write_folder

    home = tmp_path_factory.mktemp("good")
    shutil.copytree(bundled_folder("relu-1l"), home / "tl")
    shutil.copy(bundled_folder("relu-1l").parent / "tokenizer.json", home / "tl")
    mia.load("relu-1l").save(home / "own")
    write_folder("llama", home / "hf")
    return home


PRINT = "import pathlib; pathlib.Path('ran').touch()\n"
CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": "code.T"}


@pytest.mark.parametrize("model_type", ["llama", "its-own"])
def test_no_code_of_a_folder_runs_and_nobody_is_asked(folder_of, model_type, monkeypatch, tmp_path):
    folder = folder_of("hf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    (folder / "code.py").write_text(PRINT, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(PRINT, encoding="utf-8")
    change(folder, auto_map=CODE, model_type=model_type)
    if model_type == "llama":  # a family that transformers knows is its own, whatever the folder says
        assert mia.load(folder).spec.n_layers == 2
    else:
        with pytest.raises(mia.MechInterpError, match="it needs code of its own, which is not run"):
            mia.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["tl", "hf"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_no_pickle_is_read(folder_of, kind, name, tmp_path):
    """Under its own name or another's; the pickle would leave a trace."""

    class Trace:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    folder = folder_of(kind)
    (folder / "model.safetensors").unlink()
    torch.save({"embed.W_E": Trace()}, folder / name)
    with pytest.raises(CheckpointError, match=r"pickles are not read|not safetensors"):
        mia.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["tl", "hf"])
@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/other.safetensors", "a.bin", 3, None])
def test_shards_stay_in_their_folder(folder_of, kind, shard):
    folder = folder_of(kind)
    (folder.parent / "other").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "other" / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json (names|has)"):
        mia.load(folder)


@pytest.fixture
def folder_of(folders, tmp_path):
    """A copy of a good folder, to be spoilt."""

    def copy(kind):
        return shutil.copytree(folders / kind, tmp_path / kind)

    return copy


def change(folder, **fields):
    """Other values in config.json, under a checksum that fits in our own format."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for name, value in fields.items():
        inner = config["spec"] if "spec" in config and name not in config else config
        inner[name] = value
    if "sha256" in config:
        config["sha256"] = {n: sha256(folder / n) for n in ("model.safetensors", "tokenizer.json")}
        config["sha256"]["config.json"] = sha256_of_config(config)
    file.write_text(json.dumps(config), encoding="utf-8")


def cut(file, n):
    file.write_bytes(file.read_bytes()[:n])


def tensors(folder, edit):
    held = load_file(folder / "model.safetensors")
    edit(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    if "sha256" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        change(folder)


def header(folder, text):
    """A safetensors file with this header and nothing behind it."""
    raw = text.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


def put(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def values(**fields):
    return lambda folder: change(folder, **fields)


DEEP = "[" * 100_000 + "]" * 100_000
NESTED = {"a": {"a": {"a": [1, 2, {"a": None}]}}}
TWICE = '{"n_layers": 1, "n_layers": 2}'
SIZES = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")
WRONG = (10**9, 10**12, 10**30, -1, "2", 2.5, True, [2], NESTED)

BAD = [
    *(
        ("tl", f"{n}={v!r}", values(**{n: v}), f"{n}|1000000000,")
        for n, v in zip(SIZES * 2, WRONG * 2, strict=False)
    ),
    *(("tl", f"n_layers={v!r}", values(n_layers=v), "n_layers") for v in WRONG),
    ("tl", "eps=nan", put("config.json", '{"eps": NaN}'), "NaN is no JSON number"),
    ("tl", "eps=infinite", put("config.json", '{"eps": 1e999}'), "1e999 is no JSON number"),
    ("tl", "eps<0", values(eps=-1.0), "eps=-1.0"),
    ("tl", "eps text", values(eps="small"), "eps='small'"),
    ("tl", "act_fn list", values(act_fn=["gelu"]), "act_fn=..gelu"),
    ("tl", "act_fn unknown", values(act_fn="sine"), "activation 'sine'"),
    ("tl", "act_fn missing", values(act_fn=None), "no 'act_fn'"),
    ("tl", "norm list", values(normalization_type=[1]), "normalization_type"),
    ("tl", "positions object", values(positional_embedding_type={}), "positional_embedding_type"),
    ("tl", "gated text", values(gated_mlp="yes"), "gated_mlp='yes'"),
    ("tl", "rotary_dim", values(positional_embedding_type="rotary", rotary_dim=10**9), "rotary_dim"),
    ("tl", "rotary_base", values(positional_embedding_type="rotary", rotary_base="10k"), "rotary_base"),
    ("tl", "windows text", values(windows="all"), "windows='all'"),
    ("tl", "windows short", values(windows=[1, 2, 3]), "3 windows"),
    ("tl", "local", values(use_local_attn=True, window_size=[4]), "window_size"),
    ("tl", "half a table", values(use_NTK_by_parts_rope=True), "no 'NTK_by_parts_low_freq_factor'"),
    ("tl", "kv heads", values(n_key_value_heads=3), "cannot share 3"),
    ("tl", "bos_token", values(bos_token=[1]), "bos_token"),
    ("tl", "twice", put("config.json", TWICE), "'n_layers' stands twice"),
    ("tl", "deep", put("config.json", DEEP), "nested too deeply"),
    ("tl", "deep value", put("config.json", f'{{"a": {DEEP}}}'), "nested too deeply"),
    ("tl", "list", put("config.json", "[]"), "not a JSON object"),
    ("tl", "empty", put("config.json", ""), "is not JSON"),
    ("tl", "half", lambda f: cut(f / "config.json", 40), "is not JSON"),
    ("tl", "no text", lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "not UTF-8"),
    ("tl", "digits", put("config.json", '{"n_layers": 1' + "0" * 5000 + "}"), "5001 digits"),
    (
        "tl",
        "folder for a file",
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "no conf",
    ),
    ("tl", "no weights", lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    ("tl", "empty weights", lambda f: cut(f / "model.safetensors", 0), "damaged or not safetensors"),
    ("tl", "half the weights", lambda f: cut(f / "model.safetensors", 5000), "damaged or not safetensors"),
    ("tl", "a pickle", lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04N."), "not safetensors"),
    (
        "tl",
        "header of 2^60",
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60)),
        "damaged",
    ),
    ("tl", "header deep", lambda f: header(f, DEEP), "damaged"),
    (
        "tl",
        "header beyond the file",
        lambda f: header(f, '{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'),
        "damaged",
    ),
    (
        "tl",
        "shape",
        lambda f: tensors(f, lambda t: t.update({"embed.W_E": t["embed.W_E"][:-1].clone()})),
        "shape",
    ),
    ("tl", "missing", lambda f: tensors(f, lambda t: t.pop("embed.W_E")), "missing tensor embed.W_E"),
    ("tl", "unknown", lambda f: tensors(f, lambda t: t.update(x=torch.ones(1))), "unknown tensor x"),
    (
        "tl",
        "integers",
        lambda f: tensors(f, lambda t: t.update({"embed.W_E": t["embed.W_E"].int()})),
        "dtype",
    ),
    (
        "tl",
        "8 bits",
        lambda f: tensors(f, lambda t: t.update({"embed.W_E": t["embed.W_E"].to(torch.float8_e4m3fn)})),
        "dtype",
    ),
    ("tl", "nan", lambda f: tensors(f, lambda t: t["embed.W_E"].fill_(torch.nan)), "embed.W_E is nan at"),
    ("tl", "tokenizer", put("tokenizer.json", "{"), "tokenizer.json is damaged"),
    ("tl", "tokenizer of nothing", put("tokenizer.json", "{}"), "tokenizer.json is damaged"),
    ("tl", "deep tokenizer", put("tokenizer.json", DEEP), "tokenizer.json is damaged"),
    *(
        ("own", f"{n}={v!r}", values(**{n: v}), f"{n}|1000000000,")
        for n, v in zip(SIZES * 2, WRONG * 2, strict=False)
    ),
    ("own", "spec list", values(spec=[]), "spec"),
    ("own", "spec deep", put("config.json", f'{{"spec": {DEEP}}}'), "nested too deeply"),
    ("own", "version", values(version="2"), "format version '2'"),
    (
        "own",
        "sums",
        put("config.json", '{"format": "mechinterp_attn.model.attention_only", "version": 2}'),
        "sha256",
    ),
    ("own", "windows", values(windows=[0]), "a window of 0"),
    ("own", "mixtures", values(mixtures=[[1]]), "mixtures"),
    ("own", "half", lambda f: cut(f / "model.safetensors", 5000), "model.safetensors is damaged"),
    ("own", "other special", values(special_tokens={"file": "/etc/passwd"}), "special_tokens.file"),
    (
        "own",
        "tokenizer",
        lambda f: (put("tokenizer.json", "{}")(f), change(f)),
        "tokenizer.json is damaged",
    ),
    (
        "own",
        "shape",
        lambda f: tensors(f, lambda t: t.update({"embed.W_E": t["embed.W_E"][:-1].clone()})),
        "shape",
    ),
    *(("hf", f"layers={v!r}", values(num_hidden_layers=v), "num_hidden_layers") for v in WRONG if v != 2.5),
    ("hf", "width", values(hidden_size=10**9), "hidden_size=1000000000, but the widest"),
    ("hf", "heads", values(num_attention_heads=-4), "num_attention_heads=-4"),
    ("hf", "vocabulary", values(vocab_size=10**10), "vocab_size"),
    ("hf", "context", values(max_position_embeddings=10**12), "max_position_embeddings"),
    ("hf", "fewer layers", values(num_hidden_layers=1), "there are 1 layers"),
    ("hf", "more layers", values(num_hidden_layers=3), "missing tensor model.layers.2"),
    ("hf", "other width", values(intermediate_size=40), "."),
    ("hf", "model_type", values(model_type="no-such-model"), "no-such-model"),
    ("hf", "model_type list", values(model_type=["llama"]), "."),
    ("hf", "act", values(hidden_act="no-such"), "no-such"),
    ("hf", "act number", values(hidden_act=3), "."),
    ("hf", "architectures", values(architectures=3), "."),
    ("hf", "rope", values(rope_parameters="x"), "."),
    ("hf", "twice", put("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), "stands twice"),
    ("hf", "deep", put("config.json", f'{{"model_type": {DEEP}}}'), "nested too deeply"),
    ("hf", "half the weights", lambda f: cut(f / "model.safetensors", 5000), "damaged or not safetensors"),
    (
        "hf",
        "missing",
        lambda f: tensors(f, lambda t: t.pop("model.norm.weight")),
        "missing tensor model.norm",
    ),
    ("hf", "tokenizer", put("tokenizer.json", "{"), "tokenizer"),
    ("hf", "tokenizer of nothing", put("tokenizer.json", "{}"), "tokenizer"),
    ("hf", "adapter", put("adapter_config.json", "{}"), "it has an adapter"),
    ("hf", "other weights", values(transformers_weights="pytorch_model.bin"), "transformers_weights"),
    (
        "hf",
        "processes",
        lambda f: (f / "shard-00001-model-00001-of-00001.safetensors").touch(),
        "many processes",
    ),
]


@pytest.mark.parametrize(
    ("kind", "what", "spoil", "message"), BAD, ids=[f"{k}: {w}"[:60] for k, w, *_ in BAD]
)
def test_a_bad_folder_is_refused_by_name(folder_of, kind, what, spoil, message):
    folder = folder_of(kind)
    spoil(folder)
    with pytest.raises(mia.MechInterpError, match=message) as caught:
        mia.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 4000


def test_the_good_folders_load(folders):
    for kind in ("tl", "own", "hf"):
        assert mia.load(folders / kind).to_tokens("a").numel()
