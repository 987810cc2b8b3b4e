"""Slips that the tests must notice, one by one: a file, what stands there, what is put in its place, and
the tests that should fail then.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One slip.

    Attributes:
        name: in a table.
        file: inside ``mechinterp_attn/``.
        old: text that stands in the file exactly once.
        new: what is put in its place.
        tests: arguments of pytest: files, and ``-k`` with an expression after a blank.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


GUARDS = "tests/test_guards.py -k "
SEEN = "tests/circuits/test_seen.py -k "
COMPOSITION = "tests/circuits/test_composition.py -k "
ABLATION = "tests/detect/test_ablation.py -k "
INDUCTION = "tests/detect/test_induction.py -k "
WEIGHTS = "tests/detect/test_weights.py -k "
INVARIANT = "tests/test_invariance.py -k "
RESULTS = "tests/core/test_results.py -k "

# Those that once passed all tests.
SURVIVED = [
    Mutant("participation altered", "circuits/groups.py",
           "(product * product.mT).sum((1, 2)) / trace.square()",
           "(product * product.mT).sum((1, 2)) / trace.square() / 2", COMPOSITION + "very_heads_turned"),
    Mutant("copying z without its mean", "circuits/copying.py",
           "((score - mean) / spread)", "(score / spread)", GUARDS + "copying_is_counted"),
    Mutant("rank-1 copying null off by sqrt(d)", "circuits/copying.py",
           "float(middle.norm()) / seen_width(model)", "float(middle.norm()) / seen_width(model) ** 0.5",
           GUARDS + "neurons_copy"),
    Mutant("trace_z undivided", "detect/weights.py",
           "trace / (ov[i] * spread).clamp_min(1e-300)", "trace", GUARDS + "a_trace_is"),
    Mutant("loss_z without its mean", "detect/induction_circuit.py",
           '(frame["loss_change"] - mean) / std', 'frame["loss_change"] / std',
           GUARDS + "interventions_are_counted"),
    Mutant("gain_z with abs", "detect/removals.py", "return gain, gain / error",
           "return gain, abs(gain) / error", GUARDS + "has_a_sign"),
    Mutant("mean ablation counts padding", "causal/cuts.py",
           'z = cache[bank.hook("z")][part.real].double().sum(0)',
           'z = cache[bank.hook("z")].double().sum((0, 1))', GUARDS + "means_are_over"),
    Mutant("the bound of paths halved", "paths/best_first.py",
           "bound = bound * (1 + 1e-4)", "bound = bound * 0.5", GUARDS + "knows_what"),
    Mutant("paths that are cut away forgotten", "paths/best_first.py",
           "self._dropped = max(self._dropped, float(beyond.max()))", "pass",
           GUARDS + "not_forgotten"),
    Mutant("induction's threshold 5 -> 1", "detect/induction_circuit.py", "STANDS_OUT = 5.0",
           "STANDS_OUT = 1.0",
           GUARDS + "interventions_are_counted"),
    Mutant("gate_bound halved", "conversion/modes.py", "return float((W.norm(dim=0)",
           "return 0.5 * float((W.norm(dim=0)", GUARDS + "gate_can_read"),
    Mutant("NTK low and high swapped", "sources/config.py",
           'low, high = cfg["NTK_by_parts_low', 'high, low = cfg["NTK_by_parts_low', GUARDS + "llama_3"),
    Mutant("the report's headline at position 0", "view/report/causes.py",
           "logits = self.frozen.logits[self.position].double()",
           "logits = self.frozen.logits[0].double()", GUARDS + "report_names"),
    Mutant("rows_within divided by 4", "causal/batches.py", "return max_bytes // need",
           "return max(1, max_bytes // need // 4)", GUARDS + "as_many_rows"),
    Mutant("composition heatmap without its baseline", "view/charts.py",
           'frame["score"] - frame["baseline"]', 'frame["score"]',
           GUARDS + "heatmap"),
]  # fmt: skip

# The same kinds of slips in other places.
OTHERS = [
    Mutant("paths that the queue drops forgotten", "paths/best_first.py",
           "self._dropped = max(self._dropped, float(group.most[end]))", "pass", GUARDS + "not_forgotten"),
    Mutant("induction's attention 0.4 -> 0.04", "detect/induction_circuit.py", "ATTENDS = 0.4",
           "ATTENDS = 0.04",
           INDUCTION + "shuffled_weights"),
    Mutant("named though repetition is worth nothing", "detect/induction_circuit.py",
           "& (cut.gain_z >= STANDS_OUT)", "", GUARDS + "repetition_must_help"),
    Mutant("copying null without singular values", "circuits/copying.py",
           "W_O.T @ (singular * W_V)", "W_O.T @ W_V", GUARDS + "copying_null"),
    Mutant("logits against nothing", "circuits/ends.py",
           "(W_U[:, part].double() - mean)", "(W_U[:, part].double())", WEIGHTS + "dense_matrices"),
    Mutant("z off the spread of the squares", "circuits/null.py",
           "variance.sqrt() / (2 * mean**0.5), (mean - score**2).clamp_min(0).sqrt()",
           "variance.sqrt() / (2 * mean**0.5), (mean - score**2).clamp_min(0)",
           COMPOSITION + "random_heads_have"),
    Mutant("expected by chance out of one pair", "circuits/chance.py",
           "self.expected += counts[i, j] *", "self.expected +=", COMPOSITION + "expected_to_be_large"),
    Mutant("best z by the score", "circuits/blocks.py",
           "squares = squares.sqrt_().sub_(mean).div_(spread)", "squares = squares.sqrt_()",
           "tests/circuits/test_composition_search.py -k streamed_search"),
    Mutant("query biases left out", "model/heads.py",
           "return x @ self.W_Q.to(x.dtype) + self.b_Q.to(x.dtype)", "return x @ self.W_Q.to(x.dtype)",
           SEEN + "bias_alone or one_meaning"),
    Mutant("norms behind a sublayer left out", "model/heads.py", "W = norm.freeze(None).turn(W)", "pass",
           "tests/circuits/test_families.py -k test_composition"),
    Mutant("written means kept", "model/heads.py",
           "return W - W.mean(-1, keepdim=True) if self.mean_unseen else W", "return W",
           INVARIANT + "at_once"),
    Mutant("chains ask their last head", "model/virtual.py",
           "return any(head.mixes_positions for head in self.heads)",
           "return self.heads[-1].mixes_positions", SEEN + "end_of_a_chain"),
    Mutant("random directions not turned with the stream", "detect/null.py",
           "(basis @ _rotation(n, generator) @ basis.T)", "_rotation(model.spec.d_model, generator)",
           INVARIANT + "at_once"),
    Mutant("logit changes of raw logits", "causal/cuts.py", "logit - logits.mean(-1)", "logit",
           INVARIANT + "at_once"),
    Mutant("losses kept in float32", "causal/cuts.py", "return torch.promote_types(dtype, torch.float32)",
           "return torch.float32", GUARDS + "computes_in"),
    Mutant("losses of padding counted", "causal/cuts.py", "return loss * batch.predicts,",
           "return loss,", GUARDS + "padding_has"),
    Mutant("a receipt without checks is ok", "core/results.py",
           "all(check.ok for check in self.checks) if self.checks else None",
           "all(check.ok for check in self.checks)", RESULTS + "without_a_check"),
    Mutant("NaN passes a check", "core/results.py", "return bool(self.error <= self.tolerance)",
           "return not self.error > self.tolerance", RESULTS + "failed_check"),
    Mutant("a failed check says nothing", "core/results.py", "if failed and not self.verdict:",
           "if failed and self.verdict:", RESULTS + "failed_check"),
    Mutant("pure copying in [0, 1]", "detect/weights.py",
           "return 2 * torch.stack(shares).mean((0, 2)).cpu() - 1",
           "return torch.stack(shares).mean((0, 2)).cpu()", WEIGHTS + "pure_copying"),
    Mutant("traces over the vocabulary", "detect/weights.py", '"trace": trace / (len(W_E) - 1),',
           '"trace": trace / len(W_E),', WEIGHTS + "dense_matrices"),
    Mutant("matching_z without its deviation", "detect/weights.py",
           '"matching_z": (score - mean) / deviation', '"matching_z": score - mean',
           GUARDS + "matching_is"),
    Mutant("gated values read by the gate", "model/neurons.py",
           'W = self.W_gate if self.gated and side == "Q" else self.W_in',
           "W = self.W_gate if self.gated else self.W_in",
           "tests/circuits/test_families.py -k test_composition"),
    Mutant("mean loss of all rows, not the counted", "detect/ablation.py",
           "means = ((change.double() * counted).sum((1, 2)) / n).tolist()",
           "means = change.double().mean((1, 2)).tolist()",
           ABLATION + "induction_by"),
]  # fmt: skip

MUTANTS = [*SURVIVED, *OTHERS]
