"""The command line: make the tokenizer, the statistics of the corpus in its tokens, and the models."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from mechinterp_attn.core.errors import CheckpointError
from mechinterp_attn.core.files import write_file

from . import novels as corpus
from .recipe import ARCHITECTURES, Recipe, config, recipe
from .run import make_model, write_statistics


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="Make the bundled tokenizer, corpus statistics and models.",
    )
    names = ["tokenizer", "statistics", *ARCHITECTURES]
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--corpus", type=Path, required=True, help="litbank.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="where NAME/ is made")
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    novels = corpus.read_novels(options.corpus)
    options.out.mkdir(exist_ok=True)
    tokenizer_file = options.out / "tokenizer.json"
    if "tokenizer" in options.names:
        tokenizer = corpus.train_tokenizer(novels)
        write_file(tokenizer_file, lambda path: tokenizer.save(str(path)))
    names = [name for name in options.names if name != "tokenizer"]
    if not names:
        return
    if not tokenizer_file.exists():
        raise CheckpointError(str(options.out), ["no tokenizer.json: give the name tokenizer first"])
    tokens = corpus.encode(Tokenizer.from_file(str(tokenizer_file)), novels)
    first_held_out = (tokens == corpus.BOS).nonzero()[-corpus.N_HELD_OUT].item()
    training, unseen = tokens[:first_held_out], tokens[first_held_out:]
    if "statistics" in names:
        write_statistics(training, unseen, options.out)
    for name in (name for name in names if name != "statistics"):
        how = recipe(name, tokens=options.tokens, seed=options.seed)
        held_out = corpus.windows(unseen, config(name)["n_ctx"] + 1)
        make_model(name, how, training, held_out, options.out)


if __name__ == "__main__":
    main()
