"""A metric of one's own over a corpus: every window by itself, without padding, by plain hooks."""

import pytest
import torch

import mechinterp_attn as mia
from tests.causal.classifiers import Classifier
from tests.conftest import random_tokens, tiny_bridge

HEADS = ["L0H1", "L1N3", "L1H2"]


def first_three(logits):
    """Reads the first token's logits, where no padding is."""
    return logits[:, 0, 2] - logits[:, 0, 1] + logits[:, 1, 0].exp()


def by_hand(model, windows, metric):
    out = []
    for label in HEADS:
        bank, index = model.heads.find(label)

        def cut(z, hook, index=index):
            z = z.clone()
            z[:, :, index] = 0
            return z

        changes = [
            metric(model.run_with_hooks(window[None], fwd_hooks=[(bank.hook("z"), cut)]))
            - metric(model(window[None]))
            for window in windows
        ]
        out.append(float(torch.cat(changes).double().mean()))
    return out


def test_what_cuts_do_to_a_metric():
    """Beside the losses, which stay as they are; whatever the batches."""
    model = mia.convert(tiny_bridge())
    documents = [random_tokens(model, 1, n, seed=n)[0] for n in (12, 5, 8, 3)]
    windows = [doc[start : start + 8] for doc in documents for start in range(0, len(doc), 8)]
    windows = [window for window in windows if len(window) > 1]
    plain = mia.detect.over_corpus(model, documents, heads=HEADS, length=8)
    for batch in (1, 3, 8):
        found = mia.detect.over_corpus(
            model, documents, heads=HEADS, length=8, metric=first_three, batch=batch
        )
        assert found.ablations["metric_change"].tolist() == pytest.approx(
            by_hand(model, windows, first_three), abs=1e-10
        )
        for column in ("loss_change", "logit_change"):
            assert found.ablations[column].tolist() == pytest.approx(plain.ablations[column].tolist())
    assert found.frame.set_index("head")["metric_change"][HEADS].tolist() == pytest.approx(
        found.ablations["metric_change"].tolist()
    )
    assert found.receipt.notes["metric"] == "first_three"
    assert found.receipt.ok


def test_classifiers_have_a_metric_though_no_losses():
    known = Classifier("bert")
    model, documents = known.model, [torch.tensor(row) for row in known.prompts(0)]

    def margin(logits):
        return logits[:, 0, 2] - logits[:, 0, 0]

    found = mia.detect.over_corpus(model, documents, heads=HEADS, metric=margin)
    expected = by_hand(model, documents, margin)
    assert found.ablations["metric_change"].tolist() == pytest.approx(expected, abs=1e-10)
    assert "loss_change" not in found.frame
    with pytest.raises(
        mia.MechInterpError, match=r"heads=\['L0H1'\]: next-token losses, but .* give metric="
    ):
        mia.detect.over_corpus(model, documents, heads=["L0H1"])


@pytest.mark.usefixtures("as_users_run_it")
def test_refusals(tmp_path):
    model = mia.convert(tiny_bridge())
    documents = [random_tokens(model, 1, 8)[0]]
    for options, said in (
        (dict(metric=first_three), "name some with heads="),
        (dict(metric="kl", heads=["L0H1"]), "metric='kl'; expected a function of the logits"),
        (dict(metric=lambda logits: logits.mean(), heads=["L0H1"]), r"the metric gave \(\) for logits"),
        (
            dict(metric=first_three, heads=["L0H1"], resume=tmp_path / "pass.safetensors"),
            "resume= does not go with metric=",
        ),
    ):
        with pytest.raises(mia.MechInterpError, match=said):
            mia.detect.over_corpus(model, documents, **options)
