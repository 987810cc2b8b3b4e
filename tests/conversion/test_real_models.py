"""Real models: published facts, and the Hugging Face models themselves."""

import itertools

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.conversion.reference import run_checkpoint
from mechinterp_attn.sources.folder import read_checkpoint

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play with her red ball"


@pytest.fixture(scope="module")
def stories(data):
    return mia.load(data / "models" / "stories260K")


@pytest.fixture(scope="module")
def stories_hf(data):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(data / "models" / "stories260K").eval()


def test_stories_tells_the_same_200_tokens(stories, stories_hf):
    tokens = stories.to_tokens(PROMPT)
    expected = stories_hf.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=200,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert expected.shape == (1, tokens.shape[1] + 200)
    assert torch.equal(stories.generate(tokens, 200, stop_at_eos=False), expected)
    text = stories.generate(PROMPT, 40)
    assert text == stories.to_string(expected[0, : tokens.shape[1] + 40])


def test_stories_has_the_same_loss(stories, stories_hf):
    tokens = stories.to_tokens(PROMPT)
    story = stories.generate(tokens, 200, temperature=1.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = float(stories_hf(story, labels=story).loss)
    assert float(stories(story, return_type="loss").detach()) == pytest.approx(expected, abs=1e-4)
    assert 0.5 < expected < 2.5  # its own draws: near the published 1.30 nats


def test_cached_generation_equals_uncached(stories):
    tokens = stories.to_tokens(PROMPT)
    slow = stories.generate(tokens, 30, use_past_kv_cache=False)
    assert torch.equal(stories.generate(tokens, 30), slow)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], 1)
    mask = (torch.arange(padded.shape[1]) >= 5)[None]
    assert torch.equal(stories.generate(padded, 30, attention_mask=mask)[:, 5:], slow)


def test_draws_repeat_with_their_generator(stories):
    def drawn(seed: int, **options):
        generator = torch.Generator().manual_seed(seed)
        return stories.generate(PROMPT, 20, temperature=1.0, generator=generator, **options)

    assert drawn(0) == drawn(0) != drawn(1)
    greedy = stories.generate(PROMPT, 20)
    assert drawn(0, top_k=1) == drawn(1, top_p=1e-9) == greedy


def test_penalties_are_hugging_faces(stories, stories_hf):
    tokens = stories.to_tokens(PROMPT)
    expected = stories_hf.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=40,
        repetition_penalty=1.3, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    penalised = stories.generate(tokens, 40, repetition_penalty=1.3, stop_at_eos=False)
    assert torch.equal(penalised, expected)
    assert not torch.equal(penalised, stories.generate(tokens, 40, stop_at_eos=False))
    once = stories.generate(tokens, 40, freq_penalty=1e6, stop_at_eos=False)[0]
    new = once[tokens.shape[1] :].tolist()
    assert len(set(new)) == len(new) == 40  # nothing is said twice


def test_texts_go_on_side_by_side_as_alone(stories):
    texts = [PROMPT, "Lily had a red ball. She"]
    assert stories.generate(texts, 20, return_type="str", stop_at_eos=False) == [
        stories.generate(text, 20, stop_at_eos=False) for text in texts
    ]


def test_a_stream_says_what_generate_says(stories):
    tokens = stories.to_tokens(PROMPT)
    whole = stories.generate(tokens, 20)
    chunks = list(stories.generate_stream(tokens, 20, max_tokens_per_yield=8))
    assert [chunk.shape[1] for chunk in chunks] == [tokens.shape[1] + 8, 8, 4]
    assert torch.equal(torch.cat(chunks, 1), whole)


def test_generation_stops_where_asked(stories):
    text = stories.generate(PROMPT, 60, stop_strings=".")
    assert text.endswith(".")
    assert text.count(".") == PROMPT.count(".") + 1
    seen = []

    def five_more(tokens, logits):
        seen.append(tokens.shape[1])
        return torch.tensor(len(seen) >= 5)

    tokens = stories.to_tokens(PROMPT)
    assert stories.generate(tokens, 60, stopping_criteria=five_more).shape[1] == tokens.shape[1] + 5
    comma = stories.generate(tokens, 60)[0, tokens.shape[1] + 3]
    stopped = stories.generate(tokens, 60, eos_token_id=int(comma))
    assert stopped[0, -1] == comma
    assert stopped.shape[1] <= tokens.shape[1] + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=5000), "more than this model's context of 512; ask for at most"),
        (dict(top_p=0.0), r"top_p=0.0; expected a number in \(0, 1\]"),
        (dict(temperature=-1.0), "temperature=-1.0"),
    ],
)
def test_generation_refuses(stories, options, message):
    with pytest.raises(mia.MechInterpError, match=message):
        stories.generate(PROMPT, **options)


@pytest.mark.parametrize("door", ["nano_sort_3l", "nano_sort_3l/hf"])
def test_nano_sort_sorts_all_729_inputs(data, door):
    model = mia.load(data / "models" / door)
    inputs = torch.tensor(list(itertools.product(range(3), repeat=6)))
    outputs = inputs.sort(-1).values
    logits = model(torch.cat([inputs, outputs[:, :5]], 1))
    right = (logits[:, 5:].argmax(-1) == outputs).all(-1)
    assert len(inputs) == 729
    assert int(right.sum()) == 729


def test_nano_sort_is_the_same_model_through_both_doors(data):
    folder = data / "models" / "nano_sort_3l"
    tokens = torch.randint(3, (8, 11), generator=torch.Generator().manual_seed(0))
    one, other = mia.load(folder)(tokens), mia.load(folder / "hf")(tokens)
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)  # float32, logits up to 9


def test_indhead_has_the_published_accuracy(data):
    """Random sequences whose last token occurred once before, with room for another token between:
    91.6 % continue with what followed it, for the source and, one by one, for the converted model."""
    folder = data / "models" / "indhead_2l"
    model = mia.load(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(26, (200_000, 8), generator=generator)
    last = tokens[:, -1:]
    where = (tokens[:, :-1] == last).float()
    once = where.sum(-1) == 1
    index = where.argmax(-1)
    follows = tokens.gather(1, (index + 1)[:, None])[:, 0]
    kept = once & (index < 6)
    predicted = model(tokens[kept])[:, -1].argmax(-1)
    expected = run_checkpoint(read_checkpoint(folder), tokens[kept])[0][:, -1].argmax(-1)
    assert torch.equal(predicted, expected)
    accuracy = float((predicted == follows[kept]).double().mean())
    assert accuracy == pytest.approx(0.916, abs=0.005)  # 36,000 sequences: standard error 0.0015


@pytest.mark.parametrize("name", mia.models()["name"])
def test_bundled_models_are_their_native_sources(name):
    source, model = mia.source_model(name), mia.load(name)
    card = mia.verify(model, source, "Mr. Dorling was a tall man. I had never seen Mr. Dorling before.")
    assert card.ok, str(card)
    assert card.top1_agreement == 1.0
    assert card.kl < 1e-9


def test_a_silu_model_is_literal_softmax_heads():
    """The paper's construction without any error, on a trained model."""
    source = mia.source_model("silu-2l")
    model = mia.convert(source, mlp="silu")
    assert model.provenance["fidelity"]["ok"]
    assert all(bank.rule.is_softmax for bank in model.banks if bank.kind == "mlp")
