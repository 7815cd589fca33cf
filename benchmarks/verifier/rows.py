"""The rows of the study: what differs from the default in each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.verifier.heads import HeadKind, Loss
from benchmarks.verifier.pool import Part
from pav.verifier.calibrate import SURPRISE

STRONG, BASE, PROVER = "pav:strong", "pav:base", "pav:prover"
DEPTH = {BASE: 4, PROVER: 4, STRONG: 6}


@dataclass(frozen=True)
class Row:
    """A verifier of the study.

    Attributes:
        group: what is varied.
        name: how.
        part: labels.
        trunk: under the heads.
        layers: hidden states that the heads read, concatenated: those after so many layers; empty
            for the last.
        offsets: which tokens' states they read, counted from the scoring position (several are
            concatenated): 1 is the token that ends the step, -1 the one before the last content.
        head: linear or mlp.
        loss: of the heads.
        consistency: weight of the term beside it (frozen only; see
            :mod:`benchmarks.verifier.consistency`).
        mode: what is trained.
        truth: a probe: labels say whether there is no slip so far, which no user knows.
        features: surprise features of the calibrator.
        fit_rows: rows that the calibrator with surprise is fitted on; None for all.
        fit_on: where they come from.
        like: group and name of the row that it is compared with, if not the default.
    """

    group: str
    name: str
    part: Part = Part()
    trunk: str = STRONG
    layers: tuple[int, ...] = ()
    offsets: tuple[int, ...] = (0,)
    head: HeadKind = "linear"
    loss: Loss = "bce"
    consistency: float = 0.0
    mode: Literal["frozen", "lora", "full"] = "frozen"
    truth: bool = False
    features: tuple[str, ...] = SURPRISE
    fit_rows: int | None = None
    fit_on: Literal["validation", "train"] = "validation"
    like: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """File name."""
        return f"{self.group}_{self.name}".replace(" ", "-").replace("/", "-").replace(",", "")


DEFAULT = Row("default", "strong, frozen, linear")


def _without(*dropped: str) -> tuple[str, ...]:
    return tuple(f for f in SURPRISE if f not in dropped)


def rows() -> list[Row]:
    """All rows, the default first."""
    found = [DEFAULT]
    for trunk in (BASE, PROVER):
        found.append(Row("trunk", trunk.removeprefix("pav:"), trunk=trunk))
    depths = [(STRONG, d) for d in (0, 1, 2, 3, 4, 5)] + [(BASE, d) for d in (1, 2, 3)]
    for trunk, depth in depths:
        name = f"{trunk.removeprefix('pav:')}, {depth} of {DEPTH[trunk]} layers"
        found.append(Row("depth", name, trunk=trunk, layers=(depth,)))
    base = ("trunk", "base")
    everything = tuple(range(DEPTH[STRONG] + 1))
    found += [
        Row("position", "after the delimiter", offsets=(1,)),
        Row("position", "after the delimiter, base", trunk=BASE, offsets=(1,), like=base),
        Row("position", "after the delimiter, 4 of 6 layers", offsets=(1,), layers=(4,)),
        Row("head", "mlp", head="mlp"),
        Row("head", "mlp, base", trunk=BASE, head="mlp", like=base),
        Row("head", "all layers, linear", layers=everything),
        Row("head", "all layers, mlp", layers=everything, head="mlp"),
        Row("head", "mlp after the delimiter", offsets=(1,), head="mlp"),
        Row("head", "last three tokens, linear", offsets=(-2, -1, 0)),
        Row("head", "last three tokens, mlp", offsets=(-2, -1, 0), head="mlp"),
    ]
    half = Row("prover seeds", "share .5, half the tokens", Part(2, 2))
    found.append(half)
    for share, part in ((0, Part(4, 0)), (1, Part(0, 4))):
        like = (half.group, half.name)
        found.append(Row("prover seeds", f"share {share}, half the tokens", part, like=like))
    found += [
        Row("n_mc", "2, half the seeds", Part(2, 2, n_mc=2)),
        Row("n_mc", "4, a quarter of the seeds", Part(1, 1, n_mc=4)),
        Row("n_mc", "4, half the seeds, twice the tokens", Part(2, 2, n_mc=4)),
    ]
    bce = ("n_mc", "4, half the seeds, twice the tokens")
    for loss in ("hard", "mse", "beta_binomial"):
        found.append(Row("loss", f"{loss}, n_mc 4", Part(2, 2, n_mc=4), loss=loss, like=bce))
    # Against the default: one rollout a prefix is what its neighbours could help.
    for weight in (0.1, 1.0, 10.0):
        found.append(Row("loss", f"consistency {weight:g}", consistency=weight))
    found.append(Row("round 2", "half searched prefixes", Part(2, 2, searched=4)))
    for mode in ("lora", "full"):
        found.append(Row("trained trunk", f"strong, {mode}", mode=mode))
    for name in SURPRISE:
        found.append(Row("surprise", f"without {name}", features=_without(name)))
        found.append(Row("surprise", f"only {name}", features=(name,)))
    found.append(Row("surprise", "last step only", features=("step", "result", "token")))
    for count in (100, 300, 1000):
        found.append(Row("surprise", f"fitted on {count} rows", fit_rows=count))
    found.append(Row("surprise", "fitted on training labels", fit_on="train"))
    probe = replace(DEFAULT, group="probe", truth=True)
    found += [
        replace(probe, name="last layer"),
        *(replace(probe, name=f"{d} of 6 layers", layers=(d,)) for d in (2, 4, 5)),
        replace(probe, name="last layer, after the delimiter", offsets=(1,)),
        replace(probe, name="last layer, mlp", head="mlp"),
        replace(probe, name="all layers, mlp", layers=everything, head="mlp"),
        replace(probe, name="last three tokens, mlp", offsets=(-2, -1, 0), head="mlp"),
        replace(probe, name="trained in full", mode="full"),
    ]
    return found
