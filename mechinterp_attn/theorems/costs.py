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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Check, Receipt, Result
from mechinterp_attn.spec import NormKind

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a transformer's public config that decide its cost.

    Attributes:
        n_kv_heads: heads of keys and values, where queries share them; None for n_heads.
        d_head: None for d_model / n_heads.
        gated: the MLP has a gate beside its input matrix.
        positions: learned position embeddings (n_ctx of them) are parameters.
        tied: the unembedding is the embedding.
        norm: LayerNorm has gain and bias, RMSNorm a gain.
        biases: on the attention and MLP matrices.
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
    n_parameters: int | None = None

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
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

    def plot(self) -> Figure:
        """FLOPs per token of the three forms, by part."""
        from mechinterp_attn.view.figures.theorems import cost_bars

        return cost_bars(self)


def costs(
    model_or_config: AttentionOnlyModel | Shape | str,
    *,
    n_tokens: int | None = None,
    bytes_per_number: int = 4,
) -> Costs:
    """Heads, parameters, FLOPs per token and bytes of patterns of a model in its three forms.

    Args:
        model_or_config: a model, a ``Shape``, or the name of one of ``public_costs``'s.
        n_tokens: length of the sequence; by default the model's whole context.
        bytes_per_number: of the stored patterns; 4 for float32.

    Raises:
        MechInterpError: an unknown name, or a length below 1.
    """
    shape = _shape(model_or_config)
    T = shape.n_ctx if n_tokens is None else n_tokens
    if T < 1:
        raise MechInterpError(f"n_tokens={n_tokens}; expected 1 or more")
    L, D, m = shape.n_layers, shape.d_model, shape.d_mlp
    attention_heads, neurons = L * shape.n_heads, L * m
    q, kv = shape.n_heads * shape.head_width, shape.kv_heads * shape.head_width
    reads = 2 if shape.gated else 1
    matrices = {"attention": 2 * D * q + 2 * D * kv, "mlp": (reads + 1) * D * m}
    biases = {"attention": q + 2 * kv + D, "mlp": reads * m + D}
    of_part = {part: L * (matrices[part] + shape.biases * biases[part]) for part in matrices}
    if m == 0:
        of_part["mlp"] = 0
    norms = (2 if m else 1) * L + 1
    gains = {None: 0, "RMS": D, "LN": 2 * D}[shape.norm]
    embeddings = shape.d_vocab * D * (1 if shape.tied else 2) + shape.positions * shape.n_ctx * D
    parameters = sum(of_part.values()) + norms * gains + embeddings
    # What a bias-token head adds to the MLP's parameters is nothing: its key is a constant, its
    # query and value are W_in (a gated neuron's are W_gate and W_in).
    attention_flops = L * (2 * matrices["attention"] + 2 * 2 * T * q)
    other_flops = 2 * D * shape.d_vocab
    mlp_flops = {"original": 2 * L * matrices["mlp"]}
    mlp_flops["two-key"] = mlp_flops["original"]
    mlp_flops["dense"] = mlp_flops["original"] + 2 * 2 * T * neurons
    numbers = {"original": 0, "two-key": neurons * T, "dense": neurons * T**2}
    n_heads = attention_heads + neurons
    rows = []
    for form in ("original", "two-key", "dense"):
        heads = attention_heads if form == "original" else n_heads
        rows.append(
            {
                "model": shape.name,
                "form": form,
                "attention_heads": attention_heads,
                "mlp_heads": heads - attention_heads,
                "heads_per_attention_head": heads / attention_heads,
                "parameters": parameters,
                "attention_share": of_part["attention"] / parameters,
                "mlp_share": of_part["mlp"] / parameters,
                "other_share": 1 - sum(of_part.values()) / parameters,
                "attention_head_share": attention_heads / heads,
                "mlp_head_share": 1 - attention_heads / heads,
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
    """
    tables = [costs(shape, n_tokens=n_tokens).frame for shape in PUBLIC]
    return pd.concat(tables, ignore_index=True)


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
    )
