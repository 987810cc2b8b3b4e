"""The command line: make the tokenizer, or train models with it."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from mechinterp_attn.errors import CheckpointError
from mechinterp_attn.sources import corpus
from mechinterp_attn.sources.saved import output_folder, write_atomic
from mechinterp_attn.sources.training.recipe import ARCHITECTURES, Recipe, config, recipe
from mechinterp_attn.sources.training.run import make_model


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mechinterp_attn.sources.training",
        description="Train the bundled tokenizer and models.",
    )
    parser.add_argument(
        "names", nargs="+", choices=["tokenizer", *ARCHITECTURES], metavar="NAME", help="in this order"
    )
    parser.add_argument("--corpus", type=Path, required=True, help="litbank.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="where NAME/ is made")
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    novels = corpus.read_novels(options.corpus)
    tokenizer_file = output_folder(options.out) / "tokenizer.json"
    if "tokenizer" in options.names:
        tokenizer = corpus.train_tokenizer(novels)
        write_atomic(tokenizer_file, lambda path: tokenizer.save(str(path)))
    names = [name for name in options.names if name != "tokenizer"]
    if not names:
        return
    if not tokenizer_file.exists():
        raise CheckpointError(str(options.out), ["no tokenizer.json: give the name tokenizer first"])
    tokens = corpus.encode(Tokenizer.from_file(str(tokenizer_file)), novels)
    first_held_out = (tokens == corpus.BOS).nonzero()[-corpus.N_HELD_OUT].item()
    length = config(names[0])["n_ctx"] + 1
    held_out = corpus.windows(tokens[first_held_out:], length)
    for name in names:
        how = recipe(name, tokens=options.tokens, seed=options.seed)
        make_model(name, how, tokens[:first_held_out], held_out, options.out)


if __name__ == "__main__":
    main()
