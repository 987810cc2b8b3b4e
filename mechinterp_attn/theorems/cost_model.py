"""What the attention-only form costs: heads, parameters, arithmetic, memory, counted exactly.

Three forms of the same model (Huben & Morris 2023, discussion):

- original: MLPs as MLPs.
- two-key: every neuron head computes its two scores, against itself and the bias token, and no
  others. Its arithmetic is the MLP's own, and its pattern is one number per token.
- dense: every neuron head as a general attention kernel sees it, all T x T scores and weights.

A multiply-add is two FLOPs; only matrix products are counted. Causal masks save nothing: a dense
kernel computes all pairs. Every head has its own row of the table's numbers, neurons included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.spec import NormKind


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a transformer's public config that decide its cost.

    Attributes:
        name: of the model.
        n_layers: how many blocks.
        d_model: width of the stream.
        n_heads: attention heads per block.
        d_mlp: neurons per block.
        d_vocab: tokens in the vocabulary.
        n_ctx: longest context.
        n_kv_heads: heads of keys and values, where queries share them; None for n_heads.
        d_head: None for d_model / n_heads.
        gated: the MLP has a gate beside its input matrix.
        positions: learned position embeddings (n_ctx of them) are parameters.
        tied: the unembedding is the embedding.
        norm: LayerNorm has gain and bias, RMSNorm a gain.
        biases: on the attention and MLP matrices.
        heads_per_neuron: softmax heads that stand for a neuron, 1 but for fitted mixtures.
        n_parameters: as published, to check the count against; None where it was not.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    gated: bool = False
    positions: bool = False
    tied: bool = False
    norm: NormKind = "LN"
    biases: bool = True
    heads_per_neuron: int = 1
    n_parameters: int | None = None

    @property
    def head_width(self) -> int:
        """Dimension of an attention head."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values of their own."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


def _gpt2(name: str, layers: int, d: int, heads: int, parameters: int | None, **other: Any) -> Shape:
    shape = {"d_vocab": 50257, "n_ctx": 1024} | other
    return Shape(
        name=name,
        n_layers=layers,
        d_model=d,
        n_heads=heads,
        d_mlp=4 * d,
        positions=True,
        tied=True,
        n_parameters=parameters,
        **shape,
    )


def _pythia(size: str, layers: int, d: int, heads: int, parameters: int, vocab: int = 50304) -> Shape:
    return Shape(
        name=f"Pythia-{size}",
        n_layers=layers,
        d_model=d,
        n_heads=heads,
        d_mlp=4 * d,
        d_vocab=vocab,
        n_ctx=2048,
        n_parameters=parameters,
    )


PUBLIC = (
    _gpt2("GPT-2 small", 12, 768, 12, 124_439_808),
    _gpt2("GPT-2 medium", 24, 1024, 16, 354_823_168),
    _gpt2("GPT-2 large", 36, 1280, 20, 774_030_080),
    _gpt2("GPT-2 XL", 48, 1600, 25, 1_557_611_200),
    _pythia("70m", 6, 512, 8, 70_426_624),
    _pythia("160m", 12, 768, 12, 162_322_944),
    _pythia("410m", 24, 1024, 16, 405_334_016),
    _pythia("1b", 16, 2048, 8, 1_011_781_632),
    _pythia("1.4b", 24, 2048, 16, 1_414_647_808),
    _pythia("2.8b", 32, 2560, 32, 2_775_208_960),
    _pythia("6.9b", 32, 4096, 32, 6_857_302_016, 50432),
    _pythia("12b", 36, 5120, 40, 11_846_072_320, 50688),
    Shape(
        name="Llama-3-8B",
        n_layers=32,
        d_model=4096,
        n_heads=32,
        n_kv_heads=8,
        d_mlp=14336,
        d_vocab=128256,
        n_ctx=8192,
        gated=True,
        norm="RMS",
        biases=False,
        n_parameters=8_030_261_248,
    ),
    _gpt2("GPT-3", 96, 12288, 96, None, n_ctx=2048),
)
"""Public configs, written down as numbers. GPT-3's parameters were published as 175 billion only."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Costs(Result):
    """One row per form of the model.

    Attributes:
        frame: ``model``, ``form`` ("original", "two-key", "dense"), ``attention_heads``,
            ``mlp_heads``, ``heads_per_attention_head`` (all heads over attention heads),
            ``parameters``, ``attention_share``, ``mlp_share``, ``other_share`` (of the parameters;
            "other" are embeddings and norms), ``attention_head_share``, ``mlp_head_share``,
            ``attention_flops``, ``mlp_flops``, ``other_flops``, ``flops`` (per token), and
            ``pattern_bytes`` (weights of all heads for one sequence).
        n_tokens: length of the sequence the numbers are for.
    """

    title: ClassVar[str] = "Costs of the original, two-key and dense forms"
    n_tokens: int


def costs(
    model_or_config: AttentionOnlyModel | Shape | str,
    *,
    n_tokens: int | None = None,
    bytes_per_number: int = 4,
) -> Costs:
    """Heads, parameters, FLOPs per token and bytes of patterns of a model in its three forms.

    Args:
        model_or_config: a model, a ``Shape``, or the name of one of ``public_costs``'s. A model's
            parameters are counted in its tensors, with the gains of the norms that were folded into
            them. What folding hides is counted in the usual way: biases on the matrices behind a
            LayerNorm, an unembedding of its own and no bias on it, one norm in a parallel block.
        n_tokens: length of the sequence; by default the model's whole context.
        bytes_per_number: of the stored patterns; 4 for float32.

    Raises:
        MechInterpError: an unknown name, or a length below 1.
    """
    shape = _shape(model_or_config)
    T = shape.n_ctx if n_tokens is None else n_tokens
    if T < 1:
        raise MechInterpError(f"n_tokens={n_tokens}; expected at least 1")
    L, D, m = shape.n_layers, shape.d_model, shape.d_mlp
    attention_heads, neuron_heads = L * shape.n_heads, L * m * shape.heads_per_neuron
    q = shape.n_heads * shape.head_width
    weights = _matrices(shape)
    if isinstance(model_or_config, AttentionOnlyModel):
        counted, d_vocab_out = _in_tensors(model_or_config), model_or_config.spec.d_vocab_out
    else:
        counted, d_vocab_out = _in_config(shape), shape.d_vocab
    parameters = sum(counted.values())
    # What a bias-token head adds to the MLP's parameters is nothing: its key is a constant, its
    # query and value are W_in (a gated neuron's are W_gate and W_in).
    attention_flops = L * (2 * weights["attention"] + 2 * 2 * T * q)
    other_flops = 2 * D * d_vocab_out
    mlp_flops = {"original": 2 * L * weights["mlp"]}
    mlp_flops["two-key"] = mlp_flops["original"]
    mlp_flops["dense"] = mlp_flops["original"] + 2 * 2 * T * neuron_heads
    numbers = {"original": 0, "two-key": neuron_heads * T, "dense": neuron_heads * T**2}
    n_heads = attention_heads + neuron_heads
    rows = []
    for form in ("original", "two-key", "dense"):
        heads = attention_heads if form == "original" else n_heads
        share = attention_heads / heads if heads else math.nan
        rows.append(
            {
                "model": shape.name,
                "form": form,
                "attention_heads": attention_heads,
                "mlp_heads": heads - attention_heads,
                "heads_per_attention_head": heads / attention_heads if attention_heads else math.nan,
                "parameters": parameters,
                "attention_share": counted["attention"] / parameters,
                "mlp_share": counted["mlp"] / parameters,
                "other_share": counted["other"] / parameters,
                "attention_head_share": share,
                "mlp_head_share": 1 - share,
                "attention_flops": attention_flops,
                "mlp_flops": mlp_flops[form],
                "other_flops": other_flops,
                "flops": attention_flops + mlp_flops[form] + other_flops,
                "pattern_bytes": bytes_per_number * (attention_heads * T**2 + numbers[form]),
            }
        )
    checks: tuple[Check, ...] = ()
    if shape.n_parameters is not None:
        off = abs(parameters - shape.n_parameters)
        checks = (Check("parameters against the published number", float(off), 0.0),)
    notes = {"tokens": T, "bytes per number": bytes_per_number, "a multiply-add": "2 FLOPs"}
    return Costs(frame=pd.DataFrame(rows), receipt=Receipt(checks, notes), n_tokens=T)


def public_costs(*, n_tokens: int | None = None) -> pd.DataFrame:
    """``costs`` of public configs: GPT-2 small to XL, Pythia 70m to 12b, Llama-3-8B and GPT-3.

    The numbers come from their published configs; nothing is downloaded.

    Args:
        n_tokens: length of the sequence; the whole context by default.
    """
    tables = [costs(shape, n_tokens=n_tokens).frame for shape in PUBLIC]
    return pd.concat(tables, ignore_index=True)


def _matrices(shape: Shape) -> dict[str, int]:
    """Entries of the matrices of one block's attention and MLP."""
    q, kv = shape.n_heads * shape.head_width, shape.kv_heads * shape.head_width
    reads = 2 if shape.gated else 1
    return {
        "attention": 2 * shape.d_model * (q + kv),
        "mlp": (reads + 1) * shape.d_model * shape.d_mlp,
    }


def _in_config(shape: Shape) -> dict[str, int]:
    """Parameters of attention, MLPs and the rest, by the config's numbers."""
    L, D, m = shape.n_layers, shape.d_model, shape.d_mlp
    q, kv = shape.n_heads * shape.head_width, shape.kv_heads * shape.head_width
    biases = {"attention": q + 2 * kv + D, "mlp": (2 if shape.gated else 1) * m + D if m else 0}
    counted = {part: L * (n + shape.biases * biases[part]) for part, n in _matrices(shape).items()}
    norms = (2 if m else 1) * L + 1
    embeddings = shape.d_vocab * D * (1 if shape.tied else 2) + shape.positions * shape.n_ctx * D
    counted["other"] = norms * _gains(shape.norm, D) + embeddings
    return counted


def _in_tensors(model: AttentionOnlyModel) -> dict[str, int]:
    """Parameters of attention, MLPs and the rest, in a model's tensors. Conversion makes biases of zeros
    where the source has none; behind a norm without a bias they are still zero, and not counted.
    """
    spec = model.spec
    counted = {"attention": 0, "mlp": 0, "other": 0}
    for name, tensor in model.named_parameters():
        part = "attention" if ".attn." in name else "mlp" if ".neurons." in name else "other"
        last = name.rpartition(".")[2]
        if last == "b_U":  # a LayerNorm's own bias ends up in it
            there = spec.final_norm != "LN" and bool(tensor.any())
        elif last in ("b_O", "b_out"):
            there = bool(tensor.any())
        elif last.startswith("b_"):
            there = spec.norm == "LN" or bool(tensor.any())
        else:
            there = True
        counted[part] += tensor.numel() * there
    folded_norms = 0 if spec.norm is None else (1 if spec.attn_only or spec.parallel else 2) * spec.n_layers
    counted["other"] += folded_norms * _gains(spec.norm, spec.d_model)
    counted["other"] += _gains(spec.final_norm, spec.d_model)
    return counted


def _gains(norm: NormKind, d_model: int) -> int:
    """Parameters of one norm."""
    return {None: 0, "RMS": d_model, "LN": 2 * d_model}[norm]


def _shape(source: AttentionOnlyModel | Shape | str) -> Shape:
    if isinstance(source, Shape):
        return source
    if isinstance(source, str):
        found = {shape.name.lower(): shape for shape in PUBLIC}
        if source.lower() not in found:
            names = ", ".join(shape.name for shape in PUBLIC)
            raise MechInterpError(f"no public config {source!r}; there are {names}; or give a Shape")
        return found[source.lower()]
    spec = source.spec
    return Shape(
        name=str(source.provenance.get("name", "unnamed")),
        n_layers=spec.n_layers,
        d_model=spec.d_model,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        d_head=spec.d_head,
        d_mlp=spec.d_mlp,
        d_vocab=spec.d_vocab,
        n_ctx=spec.n_ctx,
        gated=spec.gated,
        positions=spec.positions == "standard",
        norm=spec.norm,
        heads_per_neuron=max((bank.parts for bank in source.banks), default=1),
    )
