"""From HookedTransformer's config names to a ``Spec``, or every reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from typing_extensions import TypedDict

from mechinterp_attn.core.errors import CheckpointError, UnsupportedModelError
from mechinterp_attn.core.fields import short, wrong_fields
from mechinterp_attn.model.gates import GATES
from mechinterp_attn.model.spec import LARGEST, NormKind, NormOver, Positions, RotaryTable, Spec

NORMS: dict[str | None, NormKind] = {
    "LN": "LN", "LNPre": "LN", "RMS": "RMS", "RMSPre": "RMS", None: None,
}  # fmt: skip

# Parts that TransformerLens can describe and this package does not convert: cfg field, the values
# that mean "absent", and what to call it.
_UNSUPPORTED = (
    ("num_experts", (None, 0), "a mixture of experts"),
    ("rope_scaling", (None,), "scaled rotary positions given as rope_scaling"),
)


def spec_from_config(cfg: Mapping[str, Any], name: str) -> Spec:
    """The shapes and rules that a config describes.

    Besides HookedTransformer's names it knows ``windows`` (one per layer) and the fields of ``Spec`` that
    HookedTransformer has no names for: ``rotaries``, ``rotary_of``, ``stream_norm``, ``embed_norm``,
    ``qk_norm``, ``qkv_clip``, ``alibi_slopes``, ``sinks``, ``query_growth``, ``prediction_head``,
    ``final_norm``, ``float32_inside`` and others.

    Raises:
        CheckpointError: with every missing or impossible field.
        UnsupportedModelError: with every unsupported part.
    """
    check_fields(cfg, name)
    _refuse_unsupported(cfg, name)
    norm = NORMS[cfg.get("normalization_type")]
    stream_norm: NormKind = NORMS[cfg.get("stream_norm")]
    positions = cast(Positions, _positions(cfg))
    attn_only = bool(cfg.get("attn_only"))
    has_final_norm = cfg.get("final_norm", (norm or stream_norm) is not None)
    final: NormKind = "RMS" if cfg.get("final_rms") else norm or stream_norm
    d_vocab_out = cfg.get("d_vocab_out") or -1
    pre_norm = None if stream_norm or cfg.get("pre_norm") is False else norm
    spec = Spec(
        n_layers=cfg["n_layers"],
        n_heads=cfg["n_heads"],
        n_kv_heads=cfg.get("n_key_value_heads") or cfg["n_heads"],
        d_model=cfg["d_model"],
        d_head=cfg["d_head"],
        d_mlp=0 if attn_only else cfg["d_mlp"],
        n_ctx=cfg["n_ctx"],
        d_vocab=cfg["d_vocab"],
        d_vocab_out=d_vocab_out if d_vocab_out > 0 else cfg["d_vocab"],
        act_fn=None if attn_only else cfg["act_fn"],
        norm=pre_norm,
        final_norm=final if has_final_norm else None,
        eps=float(cfg.get("eps", 1e-5)),
        positions=positions,
        causal=cfg.get("attention_dir", "causal") == "causal",
        attn_scale=_attn_scale(cfg),
        rotary_dim=(cfg.get("rotary_dim") or cfg["d_head"]) if positions == "rotary" else 0,
        rotary_base=float(cfg.get("rotary_base") or 10000),
        rotary_adjacent=bool(cfg.get("rotary_adjacent_pairs", False)),
        rotaries=_rotaries(cfg) if positions == "rotary" else (),
        rotary_of=_rotary_of(cfg, positions),
        alibi=tuple(cfg.get("alibi_slopes") or ()),
        alibi_bfloat16=bool(cfg.get("alibi_bfloat16")),
        sinks=bool(cfg.get("sinks")),
        query_growth=tuple(cfg["query_growth"]) if cfg.get("query_growth") else None,
        float32_inside=bool(cfg.get("float32_inside", False)),
        gated=bool(cfg.get("gated_mlp")) and not attn_only,
        parallel=bool(cfg.get("parallel_attn_mlp")) and not attn_only,
        post_norm=norm if cfg.get("use_normalization_before_and_after") else None,
        stream_norm=stream_norm,
        embed_norm=NORMS[cfg.get("embed_norm") or ("LN" if cfg.get("post_embedding_ln") else None)],
        qk_norm=NORMS[cfg.get("qk_norm") or ("RMS" if cfg.get("use_qk_norm") else None)],
        qk_norm_over=cfg.get("qk_norm_over", "head"),
        qk_norm_last=bool(cfg.get("qk_norm_last")),
        qkv_clip=_cap(cfg.get("qkv_clip")),
        experts=cfg.get("experts") or 0,
        experts_used=cfg.get("experts_used") or 0,
        d_expert=cfg.get("d_expert") or 0,
        router_renormed=bool(cfg.get("router_renormed")),
        shared_gate=bool(cfg.get("shared_gate")),
        prediction_head=bool(cfg.get("prediction_head")),
        scale_by_layer=bool(cfg.get("scale_attn_by_inverse_layer_idx")),
        windows=_windows(cfg),
        score_cap=_cap(cfg.get("attn_scores_soft_cap")),
        logit_cap=_cap(cfg.get("output_logits_soft_cap")),
    )
    if wrong := spec.contradictions():
        raise CheckpointError(name, [f"config has {reason}" for reason in wrong])
    return spec


class _Fields(TypedDict, total=False):
    """What a config may say besides its sizes; other fields are not read."""

    act_fn: str | None
    attn_only: bool | None
    gated_mlp: bool | None
    parallel_attn_mlp: bool | None
    normalization_type: str | None
    stream_norm: str | None
    embed_norm: str | None
    qk_norm: str | None
    use_qk_norm: bool | None
    pre_norm: bool | None
    final_norm: bool | None
    final_rms: bool | None
    use_normalization_before_and_after: bool | None
    post_embedding_ln: bool | None
    prediction_head: bool | None
    eps: float
    positional_embedding_type: str | None
    attention_dir: str
    use_attn_scale: bool | None
    attn_scale: float | None
    scale_attn_by_inverse_layer_idx: bool | None
    attn_scores_soft_cap: float | None
    output_logits_soft_cap: float | None
    use_local_attn: bool | None
    attn_types: list[str] | None
    window_size: int | None
    windows: list[int | None] | None
    n_key_value_heads: int | None
    d_vocab_out: int | None
    rotary_dim: int | None
    rotary_base: float | None
    rotary_adjacent_pairs: bool | None
    rotaries: list[RotaryTable] | None
    rotary_of: list[int | None] | None
    alibi_slopes: list[float] | None
    alibi_bfloat16: bool | None
    sinks: bool | None
    query_growth: tuple[float, int] | None
    qk_norm_over: NormOver
    qk_norm_last: bool | None
    qkv_clip: float | None
    experts: int | None
    experts_used: int | None
    d_expert: int | None
    router_renormed: bool | None
    shared_gate: bool | None
    use_NTK_by_parts_rope: bool | None
    NTK_by_parts_low_freq_factor: float
    NTK_by_parts_high_freq_factor: float
    NTK_by_parts_factor: float
    NTK_original_ctx_len: int
    float32_inside: bool | None
    default_prepend_bos: bool | None
    bos_token: str | None


def check_fields(cfg: Mapping[str, Any], name: str) -> None:
    """Refuse a config with a field that is missing, of the wrong type or out of range.

    Raises:
        CheckpointError: with every such field.
    """
    need = ["n_layers", "n_heads", "d_model", "d_head", "n_ctx", "d_vocab"]
    need += [] if cfg.get("attn_only") else ["d_mlp"]
    names = need if cfg.get("attn_only") else [*need, "act_fn"]
    wrong = [f"config has no {n!r}" for n in names if cfg.get(n) is None]
    for n in need:
        value, least = cfg.get(n), 0 if n == "n_layers" else 1  # no layers: embedding and unembedding alone
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            expected = "an integer from 0" if n == "n_layers" else "a positive integer"
            wrong.append(f"config has {n}={short(value)}, expected {expected}")
        elif value > LARGEST[n]:
            wrong.append(f"config has {n}={short(value)}, expected at most {LARGEST[n]:,}")
    known = {n: cfg[n] for n in _Fields.__annotations__ if n in cfg}
    wrong += wrong_fields(_Fields, known, what="config has ")
    for n in ("n_key_value_heads", "d_vocab_out", "rotary_dim", "window_size", "NTK_original_ctx_len"):
        if isinstance(known.get(n), int) and not -1 <= known[n] <= (
            most := LARGEST.get(n, LARGEST["n_ctx"])
        ):
            wrong.append(f"config has {n}={short(known[n])}, expected at most {most:,}")
    wrong += [
        f"config has {n}={value}, expected a finite number"
        for n, value in known.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if not wrong and known.get("use_NTK_by_parts_rope"):
        parts = [f"NTK_by_parts_{part}" for part in ("low_freq_factor", "high_freq_factor", "factor")]
        wrong += [
            f"config has no {n!r}, which use_NTK_by_parts_rope needs" for n in parts if n not in known
        ]
        if not wrong and (known[parts[0]] == known[parts[1]] or known[parts[2]] <= 0):
            wrong.append(f"config has {', '.join(f'{n}={known[n]}' for n in parts)}, which make no table")
    if wrong:
        raise CheckpointError(name, wrong)


def _refuse_unsupported(cfg: Mapping[str, Any], name: str) -> None:
    reasons = []
    if not cfg.get("attn_only"):
        gate = GATES.get(cfg["act_fn"])
        if gate is None:
            reasons.append(f"activation {cfg['act_fn']!r} (supported: {', '.join(sorted(GATES))})")
        elif gate.weight is None and not cfg.get("gated_mlp"):
            reasons.append(
                f"activation {cfg['act_fn']!r} outside a gated MLP (it is not 0 at 0, so it is no "
                "weight times a value)"
            )
        elif gate.name.startswith("solu") and cfg.get("gated_mlp"):
            reasons.append(f"activation {cfg['act_fn']!r} in a gated MLP")
    if cfg.get("normalization_type") not in NORMS:
        reasons.append(f"normalization {cfg['normalization_type']!r} (supported: LN, RMS, none)")
    known = (*get_args(get_args(Positions)[0]), None)
    if _positions(cfg) not in known:
        reasons.append(
            f"positions {cfg['positional_embedding_type']!r} (supported: {', '.join(known[:-1])}, none)"
        )
    if cfg.get("attention_dir", "causal") not in ("causal", "bidirectional"):
        reasons.append(f"attention_dir {cfg['attention_dir']!r}")
    n_kv = cfg.get("n_key_value_heads") or cfg["n_heads"]
    if cfg["n_heads"] % n_kv:
        reasons.append(f"{cfg['n_heads']} heads cannot share {n_kv} key-value heads evenly")
    for field, absent, what in _UNSUPPORTED:
        if cfg.get(field) not in absent:
            reasons.append(f"{what} ({field}={cfg[field]!r})")
    reasons += cfg.get("unsupported", ())
    if reasons:
        raise UnsupportedModelError(name, reasons)


def _positions(cfg: Mapping[str, Any]) -> str | None:
    kind = cfg.get("positional_embedding_type", "standard")
    return None if kind in (None, "none") else kind


def _attn_scale(cfg: Mapping[str, Any]) -> float:
    """What scores are divided by: sqrt(d_head) unless the config says otherwise."""
    if not cfg.get("use_attn_scale", True):
        return 1.0
    scale = cfg.get("attn_scale") or -1.0
    return float(scale) if scale > 0 else math.sqrt(cfg["d_head"])


def _cap(value: float | None) -> float | None:
    return float(value) if value is not None and value > 0 else None


def _windows(cfg: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One per layer; empty where no layer's window is shorter than the context."""
    windows = list(cfg.get("windows") or ())
    if not windows and cfg.get("use_local_attn"):
        types = cfg.get("attn_types") or ["local"] * cfg["n_layers"]
        windows = [cfg.get("window_size") if kind == "local" else None for kind in types]
    windows = [None if w is None or w >= cfg["n_ctx"] else int(w) for w in windows]
    return tuple(windows) if any(w is not None for w in windows) else ()


def _rotary_of(cfg: Mapping[str, Any], positions: str | None) -> tuple[int | None, ...]:
    """One per layer; empty where every layer turns by the first table."""
    used = tuple(cfg.get("rotary_of") or ())
    return used if positions == "rotary" and any(table != 0 for table in used) else ()


def _rotaries(cfg: Mapping[str, Any]) -> tuple[RotaryTable, ...]:
    """The rotary tables; none where there is one and it follows from the base."""
    given = cfg.get("rotaries")
    if not given:
        return _by_parts(cfg)
    lists, tables = ("frequencies", "beyond", "stretch"), []
    for table in given:
        plain: dict[str, Any] = {n: tuple(v) if v and n in lists else v for n, v in table.items()}
        tables.append(RotaryTable(**plain))
    return tuple(tables)


def _by_parts(cfg: Mapping[str, Any]) -> tuple[RotaryTable, ...]:
    """Llama 3's frequencies, stretched by parts; none where they follow from the base."""
    if not cfg.get("use_NTK_by_parts_rope"):
        return ()
    dim = cfg.get("rotary_dim") or cfg["d_head"]
    low, high = cfg["NTK_by_parts_low_freq_factor"], cfg["NTK_by_parts_high_freq_factor"]
    context = cfg.get("NTK_original_ctx_len", 8192)
    plain = 1.0 / (cfg["rotary_base"] ** (torch.arange(0, dim, 2).float() / dim))
    stretched = plain / cfg["NTK_by_parts_factor"]
    # How many turns fit in the original context decides: few are stretched, many are kept.
    share = ((context * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (RotaryTable(tuple(((1 - share) * stretched + share * plain).tolist())),)
