"""Models built by hand whose heads are known: one head of every kind, and a planted neuron."""

import torch

import mechinterp_attn as mia

V, P = 8, 32  # tokens in the vocabulary, positions in the context
TOKEN, POSITION, PREVIOUS, OUT = 0, V, V + P, V + P + V  # where each part of the stream begins
D_MODEL, D_HEAD, D_MLP = OUT + V, V + P + 1, 4
CONSTANT = D_HEAD - 1  # the coordinate of a head where queries are 1
PLANTED, FIRES_ON, SPEAKS_FOR = "L0N2", 3, 5

# What each head does. Heads that are not here have no weights: they attend to all tokens alike.
ROLES = {
    "L0H0": "previous_token",
    "L0H1": "duplicate_token",
    "L0H2": "current_token",
    "L0H3": "first_token",
    "L1H0": "induction",
}


def known_heads(*, neurons: bool = False, act_fn: str = "relu", tokenizer=None, **config):
    """Two layers without norms; the stream is [token | position | previous token | output], one-hot.

    The unembedding reads only the output slot, so logits are what the induction head copies, and
    with ``neurons`` what the planted neuron says: it fires on one token and raises another's logit.
    Where the duplicate head finds nothing it rests on the first token.
    """
    W = {
        "embed.W_E": torch.zeros(V, D_MODEL),
        "pos_embed.W_pos": torch.zeros(P, D_MODEL),
        "unembed.W_U": torch.zeros(D_MODEL, V),
    }
    W["embed.W_E"][:, TOKEN : TOKEN + V] = torch.eye(V)
    W["pos_embed.W_pos"][:, POSITION : POSITION + P] = torch.eye(P)
    W["unembed.W_U"][OUT:] = torch.eye(V)
    for layer in range(2):
        at = f"blocks.{layer}.attn"
        for name in "QKV":
            W[f"{at}.W_{name}"] = torch.zeros(4, D_MODEL, D_HEAD)
        W[f"{at}.W_O"] = torch.zeros(4, D_HEAD, D_MODEL)
        W[f"{at}.b_Q"] = torch.zeros(4, D_HEAD)
        W[f"{at}.b_Q"][:, CONSTANT] = 1
        if neurons:
            W[f"blocks.{layer}.mlp.W_in"] = torch.zeros(D_MODEL, D_MLP)
            W[f"blocks.{layer}.mlp.b_in"] = torch.full((D_MLP,), -5.0)
            W[f"blocks.{layer}.mlp.W_out"] = torch.zeros(D_MLP, D_MODEL)
    query, key, value, out = (W[f"blocks.0.attn.W_{name}"] for name in "QKVO")
    token, position = torch.arange(V), torch.arange(P)
    # L0H0: position i asks for i - 1; moves the token into the slot of the previous token.
    query[0, POSITION + position, position] = 60.0
    key[0, POSITION + position[:-1], position[1:]] = 1.0
    value[0, TOKEN + token, token] = 1.0
    out[0, token, PREVIOUS + token] = 1.0
    # L0H1: the same token, but not at the same position.
    query[1, TOKEN + token, token] = 80.0
    key[1, TOKEN + token, token] = 1.0
    query[1, POSITION + position, V + position] = 40.0
    key[1, POSITION + position, V + position] = -1.0
    key[1, POSITION, CONSTANT] = 60.0
    # L0H2: the same position.  L0H3: the first position.
    query[2, POSITION + position, position] = 60.0
    key[2, POSITION + position, position] = 1.0
    key[3, POSITION, CONSTANT] = 60.0
    # L1H0: the key is the token before, which L0H0 brought; copies the token to the output.
    query, key, value, out = (W[f"blocks.1.attn.W_{name}"] for name in "QKVO")
    query[0, TOKEN + token, token] = 80.0
    key[0, PREVIOUS + token, token] = 1.0
    key[0, POSITION, CONSTANT] = -200.0  # L0H0 could only bring the first token itself there
    value[0, TOKEN + token, token] = 1.0
    out[0, token, OUT + token] = 10.0
    if neurons:
        W["blocks.0.mlp.W_in"][TOKEN + FIRES_ON, 2] = 10.0  # pre-activation 5 there, -5 elsewhere
        W["blocks.0.mlp.W_out"][2, OUT + SPEAKS_FOR] = 4.0
    cfg = dict(
        n_layers=2, n_heads=4, d_model=D_MODEL, d_head=D_HEAD, n_ctx=P, d_vocab=V, attn_only=not neurons,
        d_mlp=D_MLP if neurons else None, act_fn=act_fn, normalization_type=None, use_attn_scale=False,
    )  # fmt: skip
    W = {name: tensor.double() for name, tensor in W.items()}
    return mia.convert(mia.Checkpoint(cfg | config, W, tokenizer, "known-heads"))
