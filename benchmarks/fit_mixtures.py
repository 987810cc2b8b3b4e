"""Fit the softmax mixtures that stand in for activations, and write them with their measured errors.

    python benchmarks/fit_mixtures.py            # writes mechinterp_attn/conversion/mixtures.json

A plain MLP's ``act(z)`` becomes ``z * sum_k c_k sigmoid(a_k z + b_k)`` for every real z; a gated MLP's
``act(g)`` becomes ``sum_k c_k sigmoid(a_k g + b_k)`` on ``|g| <= R``. The fits are minimax: least squares
from many random starts, then a sequence of linear programs that lowers the largest error on a grid.
Errors in the table are measured afterwards on a grid 20 times finer, in float64 and in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares, linprog
from scipy.special import erf, expit
from tqdm.auto import tqdm

OUT = Path(__file__).resolve().parents[1] / "mechinterp_attn" / "conversion" / "mixtures.json"
PLAIN = {
    "gelu": lambda z: 0.5 * (1 + erf(z / math.sqrt(2))),
    "gelu_new": lambda z: expit(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)),
}
GATED = {
    "silu": lambda g: g * expit(g),
    "gelu": lambda g: g * 0.5 * (1 + erf(g / math.sqrt(2))),
    "gelu_new": lambda g: g * expit(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)),
    "relu": lambda g: np.maximum(g, 0.0),
}
COMPONENTS = (1, 2, 3, 4, 6, 8)
GATED_COMPONENTS = (8, 4)
RANGES = (4, 8, 16, 32)


@dataclass
class Problem:
    """``factor(z) * (sum_k c_k sigmoid(a_k z + b_k) - target(z))`` is to be small on ``grid``.

    ``odd``: the target is 1/2 plus an odd function that goes to 1, and so is every candidate: heads
    with b = 0, or pairs with +b and -b; the values sum to one, so that the tails are right.
    """

    grid: np.ndarray
    factor: np.ndarray
    target: np.ndarray
    odd: bool
    n_pairs: int
    n_single: int
    largest_value: float

    def heads(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, slopes and offsets of all heads from the free parameters."""
        if not self.odd:
            c, a, b = p.reshape(3, -1)
            return c, a, b
        n, s = self.n_pairs, self.n_single
        pair_c, pair_a, pair_b = p[: 3 * n].reshape(3, n)
        single_a, free = p[3 * n : 3 * n + s], p[3 * n + s :]
        single_c = np.append(free, 1 - 2 * pair_c.sum() - free.sum()) if s else free
        if not s:
            pair_c = pair_c / (2 * pair_c.sum())
        return (
            np.concatenate([pair_c, pair_c, single_c]),
            np.concatenate([pair_a, pair_a, single_a]),
            np.concatenate([pair_b, -pair_b, np.zeros(s)]),
        )

    def start(self, rng: np.random.Generator) -> np.ndarray:
        if not self.odd:
            k, top = self.n_single, self.grid.max()
            c = np.full(k, top / k) * rng.uniform(0.5, 1.5, k)
            b_at = rng.uniform(-0.3, 1.0, k) * top  # where each step stands
            a = rng.uniform(2, 8, k) / top * rng.choice([1, 2], k)
            return np.concatenate([c, a, -a * b_at])
        n, s = self.n_pairs, self.n_single
        pairs = np.concatenate(
            [rng.normal(0.2, 0.3, n), rng.uniform(1.0, 4.0, n), rng.uniform(0.5, 4.0, n)]
        )
        free = rng.normal(0.3, 0.5, max(s - 1, 0))
        return np.concatenate([pairs, rng.uniform(1.0, 4.0, s), free])

    def errors(self, p: np.ndarray) -> np.ndarray:
        c, a, b = self.heads(p)
        return self.factor * (expit(np.outer(self.grid, a) + b) @ c - self.target)

    def jacobian(self, p: np.ndarray) -> np.ndarray:
        step = 1e-6 * np.maximum(1.0, np.abs(p))
        columns = []
        for i in range(len(p)):
            move = np.zeros_like(p)
            move[i] = step[i]
            columns.append((self.errors(p + move) - self.errors(p - move)) / (2 * step[i]))
        return np.stack(columns, 1)

    def allowed(self, p: np.ndarray) -> bool:
        c, a, _ = self.heads(p)
        slopes = a.min() > 0.3 if self.odd else True
        return bool(slopes and np.abs(c).max() <= self.largest_value)


def squares(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    fit = least_squares(problem.errors, problem.start(rng), problem.jacobian, max_nfev=200)
    return fit.x


def minimax(problem: Problem, p: np.ndarray, steps: int) -> np.ndarray:
    """Lower the largest error by linear programs inside a trust region."""
    radius, best = 0.1, np.abs(problem.errors(p)).max()
    for _ in range(steps):
        e, J = problem.errors(p), problem.jacobian(p)
        scale = np.maximum(np.abs(p), 0.1)
        ones = np.ones((len(e), 1))
        rows = np.block([[J * scale, -ones], [-J * scale, -ones]]) / best
        solved = linprog(
            np.append(np.zeros(len(p)), 1.0),
            A_ub=rows,
            b_ub=np.concatenate([-e, e]) / best,
            bounds=[(-radius, radius)] * len(p) + [(0, None)],
            method="highs",
        )
        if solved.x is None:
            radius /= 4
            continue
        new = p + scale * solved.x[:-1]
        error = np.abs(problem.errors(new)).max()
        if error < best and problem.allowed(new):
            gain = 1 - error / best
            p, best, radius = new, error, min(radius * 2, 0.5)
            if gain < 1e-4:
                break
        else:
            radius /= 4
            if radius < 1e-7:
                break
    return p


def solve(problems: list[Problem], *, starts: int, keep: int, steps: int, seed: int) -> list[list[float]]:
    """The best heads over all structures and starts: values, slopes, offsets."""
    rng = np.random.default_rng(seed)
    found: list[tuple[float, Problem, np.ndarray]] = []
    for problem in problems:
        tried = []
        for _ in range(starts):
            try:
                p = squares(problem, rng)
            except ValueError:
                continue
            if problem.allowed(p) and np.isfinite(p).all():
                tried.append((np.abs(problem.errors(p)).max(), p))
        tried.sort(key=lambda pair: pair[0])
        for _, p in tried[:keep]:
            p = minimax(problem, p, steps)
            found.append((np.abs(problem.errors(p)).max(), problem, p))
    _, problem, p = min(found, key=lambda item: item[0])
    return [part.tolist() for part in problem.heads(p)]


def plain_problems(name: str, k: int) -> list[Problem]:
    grid = np.concatenate([np.linspace(0, 6, 240), np.linspace(6, 20, 60)[1:]])
    gate = PLAIN[name](grid)
    return [Problem(grid, grid, gate, True, pairs, k - 2 * pairs, 20.0) for pairs in range(k // 2 + 1)]


def gated_problem(name: str, k: int, r: float) -> list[Problem]:
    inner = min(8.0, r)
    grid = np.unique(np.concatenate([np.linspace(-r, r, 201), np.linspace(-inner, inner, 161)]))
    target = GATED[name](grid)
    return [Problem(grid, np.ones_like(grid), target, False, 0, k, 20.0 * r)]


def measure(heads: list[list[float]], act, *, gated: bool, r: float) -> dict[str, float]:
    """Largest errors of ``act`` itself on a fine grid, in float64 and in float32 arithmetic."""
    z = np.linspace(-r, r, 400_001)
    exact = act(z) if gated else z * act(z)
    out = {}
    for label, kind in (("max_error", np.float64), ("max_error_float32", np.float32)):
        c, a, b = (np.asarray(part, dtype=kind) for part in heads)
        zk = z.astype(kind)
        total = sum(ci * expit(ai * zk + bi) for ci, ai, bi in zip(c, a, b, strict=True))
        out[label] = float(np.abs((total if gated else zk * total) - exact).max())
    return out


def print_table(table: dict[str, list[dict]]) -> None:
    """The stored errors as two MyST tables."""
    for kind, columns in (("plain", ["components"]), ("gated", ["components", "range"])):
        print(
            "| " + " | ".join(["activation", *columns, "max error", "in float32", "largest value"]) + " |"
        )
        print("|---|" + "--:|" * (len(columns) + 3))
        for row in table[kind]:
            cells = [
                ("gated " if kind == "gated" else "") + row["act_fn"],
                *(f"{row[c]:g}" for c in columns),
            ]
            cells += [f"{row['max_error']:.1e}", f"{row['max_error_float32']:.1e}"]
            cells += [f"{max(map(abs, row['values'])):.2g}"]
            print("| " + " | ".join(cells) + " |")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", help="plain or gated")
    parser.add_argument("--act", help="one activation")
    parser.add_argument("--table", action="store_true", help="print the stored errors, fit nothing")
    parser.add_argument("--components", type=int, help="one number of heads")
    args = parser.parse_args()
    table = json.loads(OUT.read_text()) if OUT.exists() else {"plain": [], "gated": []}
    if args.table:
        print_table(table)
        return
    jobs = [("plain", n, k, 20.0) for n in PLAIN for k in COMPONENTS]
    jobs += [("gated", n, k, float(r)) for k in GATED_COMPONENTS for n in GATED for r in RANGES]
    for kind, name, k, r in tqdm(jobs, file=sys.stderr):
        if (
            args.only not in (None, kind)
            or args.act not in (None, name)
            or args.components not in (None, k)
        ):
            continue
        problems = plain_problems(name, k) if kind == "plain" else gated_problem(name, k, r)
        if name == "relu" and r > RANGES[0]:  # relu(s g) = s relu(g): one fit serves all ranges
            base = next(
                o for o in table[kind] if (o["act_fn"], o["components"], o["range"]) == (name, k, RANGES[0])
            )
            s = r / RANGES[0]
            heads = [[s * c for c in base["values"]], [a / s for a in base["slopes"]], base["offsets"]]
        else:
            heads = solve(problems, starts=args.starts, keep=3, steps=args.steps, seed=k)
        measured = measure(heads, (PLAIN if kind == "plain" else GATED)[name], gated=kind == "gated", r=r)
        row = {"act_fn": name, "components": k} | ({"range": r} if kind == "gated" else {})
        known = [old for old in table[kind] if row.items() <= old.items()]
        values, slopes, offsets = heads
        row |= measured | {"values": values, "slopes": slopes, "offsets": offsets}
        if known and known[0]["max_error_float32"] <= row["max_error_float32"]:
            continue
        table[kind] = [old for old in table[kind] if old not in known] + [row]
        order = ("act_fn", "components", "range")
        table[kind].sort(key=lambda row: tuple(row.get(name, 0) for name in order))
        lines = {part: [json.dumps(row) for row in table[part]] for part in table}
        text = ",\n".join(f' "{part}": [\n  ' + ",\n  ".join(rows) + "\n ]" for part, rows in lines.items())
        OUT.write_text("{\n" + text + "\n}\n")
        print(kind, name, k, r, f"{row['max_error']:.2e} {row['max_error_float32']:.2e}", flush=True)


if __name__ == "__main__":
    main()
