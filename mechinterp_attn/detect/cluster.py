"""A pass over a corpus on Ray workers, each with every n-th document."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp_attn.detect.tally import Tally
from mechinterp_attn.detect.texts import Texts
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel

if TYPE_CHECKING:
    from mechinterp_attn.detect.corpus import _Settings


def count_on_ray(
    model: AttentionOnlyModel, texts: Texts, settings: _Settings, path: Path | None, workers: int
) -> list[Tally]:
    """The tallies of all shards, in order.

    Files must be where every worker can read them; other texts are sent to the workers.

    Raises:
        MechInterpError: Ray is not installed; fewer than one worker.
    """
    if workers < 1:
        raise MechInterpError(f"workers={workers}; expected at least 1, or None for this process")
    try:
        import ray
    except ImportError as error:
        raise MechInterpError(
            "workers= needs Ray: pip install 'mechinterp_attn[ray]', or leave workers out"
        ) from error
    started = not ray.is_initialized()
    if started:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
            ray.init(include_dashboard=False, log_to_driver=False, **own)
    try:
        given = texts if isinstance(texts, (str, os.PathLike)) else list(texts)
        parts = ray.put((model.spec, model.state_dict(), model.tokenizer, model.provenance))
        source = ray.put(given)
        count = ray.remote(_count)
        jobs = [
            count.remote(parts, source, settings.of_shard(i, workers), _shard_path(path, i, workers))
            for i in range(workers)
        ]
        tallies = ray.get(jobs)
    finally:
        if started:
            ray.shutdown()
    return [tally for tally in tallies if tally is not None]


def _count(parts: Any, texts: Any, settings: _Settings, path: Path | None) -> Tally | None:
    """One shard, in a worker; None where it has no windows."""
    from mechinterp_attn.detect.corpus import count

    spec, weights, tokenizer, provenance = parts
    model = AttentionOnlyModel(
        spec,
        {name: tensor.clone() for name, tensor in weights.items()},
        tokenizer=tokenizer,
        provenance=provenance,
    )
    try:
        return count(model, texts, settings, path)
    except MechInterpError as error:
        if "no window" in str(error):
            return None
        raise


def _shard_path(path: Path | None, shard: int, shards: int) -> Path | None:
    return None if path is None else path.with_name(f"{path.name}.{shard}of{shards}")
