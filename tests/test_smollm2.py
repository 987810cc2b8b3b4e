"""SmolLM2-135M-Instruct, a model that people use: skipped where `make real` has not fetched it."""

import torch
import torch.nn.functional as F

PROMPT = "When Mary and John went to the store, John gave a drink to"


def test_the_real_model_converts_and_knows_the_indirect_object(smollm2):
    assert smollm2.provenance["fidelity"]["ok"]
    assert (smollm2.n_heads, smollm2.spec.n_layers) == (30 * (9 + 1536), 30)
    logits = smollm2(smollm2.to_tokens(PROMPT))[0, -1]
    assert smollm2.tokenizer.decode(int(logits.argmax())) == " Mary"


def test_a_sentence_costs_what_the_source_pays(smollm2, smollm2_folder):
    from transformers import LlamaForCausalLM

    tokens = smollm2.to_tokens("The capital of France is Paris, and the capital of Italy is Rome.")
    source = LlamaForCausalLM.from_pretrained(smollm2_folder).double().eval()
    with torch.no_grad():
        expected = float(F.cross_entropy(source(tokens).logits[0, :-1], tokens[0, 1:]))
        found = float(smollm2(tokens, return_type="loss"))
    assert abs(found - expected) < 3e-5  # float32 beside float64, a loss of 2.8 nats
    assert expected < 3
