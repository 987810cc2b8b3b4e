"""Bidirectional classifiers of Hugging Face, small and random: norms behind (BERT) or in front (RoBERTa).

Their class is read at the first token, as [CLS] is. They are patched here by plain PyTorch hooks on Hugging
Face's own modules, which share no code with the converted model.
"""

import torch

import mechinterp_attn as mia
from tests.conftest import jitter

SHAPE = dict(
    vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12,
    max_position_embeddings=18, num_labels=3, attn_implementation="eager",
)  # fmt: skip
LABELS = ["negative", "neutral", "positive"]
LENGTHS = (9, 5, 7, 9)


class Classifier:
    """A Hugging Face model in float64, its converted form, and runs of it with heads replaced.

    Args:
        kind: "bert", or "roberta" with norms in front.
    """

    def __init__(self, kind: str):
        import transformers

        family = {"bert": "Bert", "roberta": "RobertaPreLayerNorm"}[kind]
        config = getattr(transformers, f"{family}Config")(**SHAPE)
        self.hf = getattr(transformers, f"{family}ForTokenClassification")(config).double().eval()
        jitter(self.hf, seed=3, noise=0.4)
        self.in_front = kind == "roberta"
        self.base = self.hf.base_model
        self.layers = self.base.encoder.layer
        self.model = mia.convert(self._checkpoint())

    def _checkpoint(self) -> mia.Checkpoint:
        config, embeddings = self.hf.config, self.base.embeddings
        heads, d = config.num_attention_heads, config.hidden_size
        norm = "normalization_type" if self.in_front else "stream_norm"
        first = 2 if self.in_front else 0  # RoBERTa's positions begin behind its padding
        cfg = dict(
            n_layers=2, n_heads=heads, d_model=d, d_head=d // heads, d_mlp=12, n_ctx=16, d_vocab=23,
            d_vocab_out=3, act_fn="gelu", embed_norm="LN", eps=config.layer_norm_eps,
            attention_dir="bidirectional", final_norm=self.in_front,
        ) | {norm: "LN"}  # fmt: skip
        positions = embeddings.position_embeddings.weight[first : first + 16]
        state = {
            "embed.W_E": embeddings.word_embeddings.weight,
            "pos_embed.W_pos": positions + embeddings.token_type_embeddings.weight[0],
            "unembed.W_U": self.hf.classifier.weight.T,
            "unembed.b_U": self.hf.classifier.bias,
        } | _norm("embed_norm", embeddings.LayerNorm)
        if self.in_front:
            state |= _norm("ln_final", self.base.LayerNorm)
        for number, layer in enumerate(self.layers):
            at = f"blocks.{number}"
            attention, out = layer.attention, layer.attention.output.dense
            for name in ("query", "key", "value"):
                linear = getattr(attention.self, name)
                state[f"{at}.attn.W_{name[0].upper()}"] = linear.weight.T.unflatten(1, (heads, -1)).permute(
                    1, 0, 2
                )
                state[f"{at}.attn.b_{name[0].upper()}"] = linear.bias.unflatten(0, (heads, -1))
            state |= {f"{at}.attn.W_O": out.weight.T.unflatten(0, (heads, -1)), f"{at}.attn.b_O": out.bias}
            for name, linear in (("in", layer.intermediate.dense), ("out", layer.output.dense)):
                state |= {f"{at}.mlp.W_{name}": linear.weight.T, f"{at}.mlp.b_{name}": linear.bias}
            one, two = (
                (attention, layer.intermediate) if self.in_front else (attention.output, layer.output)
            )
            state |= _norm(f"{at}.ln1", one.LayerNorm) | _norm(f"{at}.ln2", two.LayerNorm)
        return mia.Checkpoint(cfg, {name: tensor.detach().contiguous() for name, tensor in state.items()})

    def task(self, **options) -> mia.Task:
        """Prompts of unequal lengths, their classes by name."""
        clean, corrupt = self.prompts(0), self.prompts(1)
        return mia.Task(
            clean, corrupt=corrupt, answer=["positive", "negative", "neutral", "negative"],
            against=["negative", "neutral", "positive", "positive"], labels=LABELS, position=0, **options,
        )  # fmt: skip

    def prompts(self, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(2, 23, (n,), generator=generator).tolist() for n in LENGTHS]

    def padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """As a tokenizer gives them: padded on the right with id 1, under a mask."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return dict(input_ids=ids, attention_mask=mask)

    def place(self, label: str) -> tuple[torch.nn.Linear, slice]:
        """The layer that reads what a head holds, and where in its input."""
        number, kind, index = int(label[1]), label[2], int(label[3:])
        layer, k = self.layers[number], 4
        if kind == "N":
            return layer.output.dense, slice(index, index + 1)
        return layer.attention.output.dense, slice(k * index, k * index + k)

    @torch.no_grad()
    def holds(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """What every head holds, ``[n, pos, d_head]``."""
        seen: dict[str, torch.Tensor] = {}
        handles = []
        for label in self.model.heads:
            dense, at = self.place(label)

            def keep(module, args, label=label, at=at):
                seen[label] = args[0][..., at].clone()

            handles.append(dense.register_forward_pre_hook(keep))
        self.hf(**self.padded(rows))
        for handle in handles:
            handle.remove()
        return seen

    @torch.no_grad()
    def logits(self, rows: list[list[int]], put: dict[str, torch.Tensor], hooks=()) -> torch.Tensor:
        """Logits at the first token with some heads holding something else.

        Args:
            put: by head, ``[n, pos, d_head]`` or what is broadcast to it.
            hooks: more of them: a module and its forward hook.
        """
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        for label, value in put.items():
            dense, at = self.place(label)

            def hook(module, args, at=at, value=value):
                x = args[0].clone()
                x[..., at] = value
                return (x,)

            handles.append(dense.register_forward_pre_hook(hook))
        out = self.hf(**self.padded(rows)).logits[:, 0]
        for handle in handles:
            handle.remove()
        return out

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """The logit difference of ``task``."""
        rows = torch.arange(4)
        return logits[rows, [2, 0, 1, 0]] - logits[rows, [0, 1, 2, 2]]


def _norm(name: str, module: torch.nn.LayerNorm) -> dict[str, torch.Tensor]:
    return {f"{name}.w": module.weight, f"{name}.b": module.bias}
