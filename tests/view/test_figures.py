"""Figures hold the numbers of their results, and no text in them is markup."""

import numpy as np
import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.view.figures.detect import score_heatmap
from mechinterp_attn.view.figures.style import safe_text


def test_score_heatmap_is_the_score_of_every_attention_head(model):
    scores = mia.detect.score_heads(model)
    (heat,) = score_heatmap(scores, "previous_token").data
    own = scores.frame.query("kind == 'attention'").set_index(["layer", "index"])["previous_token"]
    np.testing.assert_array_equal(heat.z, own.unstack().to_numpy())
    assert heat.customdata[1][2] == "L1H2"
    assert (heat.zmin, heat.zmax) == (0, 1)


def test_score_heatmap_names_the_scores(model):
    with pytest.raises(MechInterpError, match=r"no score .charm.; there are .*induction"):
        score_heatmap(mia.detect.score_heads(model), "charm")


def test_text_in_a_figure_is_not_markup():
    assert safe_text("<b>\u202e&") == "&lt;b&gt;⟨U+202E⟩&amp;"
