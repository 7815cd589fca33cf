"""The model card of an exported verifier: what it predicts, of whom, from which data, how well.

``README.md`` with the metadata that a model hub reads, so that ``hf upload`` of the directory is
enough. No figure is written that was not measured; local paths are cut to their last part.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pav.core.heads import LIK, ORM
from pav.evaluate.calibration_plot import draw
from pav.verifier.checkpoint import VerifierMeta

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PLOT = "calibration.png"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_METRICS = {
    "auc": ("roc_auc", "AUC"),
    "spearman": ("spearmanr", "Spearman"),
    "brier": ("brier_score", "Brier"),
    "calibration_error": ("expected_calibration_error", "ECE"),
}


def write_card(directory: Path, card: VerifierMeta, usage: str, pipeline_tag: str) -> None:
    """Write ``README.md``, and the calibration plot where it was measured, into ``directory``.

    Args:
        directory: of the export.
        card: the verifier's.
        usage: how to serve what lies there, as Markdown.
        pipeline_tag: the hub's name of what the files are.
    """
    drawn = draw(card.validation, directory / PLOT, "validation")
    text = model_card(card, usage, pipeline_tag, drawn)
    (directory / "README.md").write_text(text, encoding="utf-8")


def model_card(card: VerifierMeta, usage: str, pipeline_tag: str, has_plot: bool) -> str:
    """Metadata and text of the card (see :func:`write_card`)."""
    from huggingface_hub import ModelCard, ModelCardData  # not at the top: --help stays fast

    name = f"{'ORM' if card.recipe == 'orm' else 'Process advantage verifier'} of {_name(card)}"
    results = _results(card)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["process-reward-model", "reward-model", "pav-engine", *_arxiv(card)],
        base_model=card.trunk if _HUB_ID.fullmatch(card.trunk) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [
        f"# {name}",
        "",
        "Made by pav-engine. Heads on the last hidden state of a language model predict, at the "
        "end of every step of a solution, how likely it is to end in a right answer:",
        "",
        *(f"* `{head}`: {_meaning(head)}" for head in card.heads),
        "",
        "## Use",
        "",
        usage.strip(),
        "",
        *(_calibration(card) if pipeline_tag == "text-generation" else []),
        "## Made from",
        "",
        *_facts(card),
        "",
        *_table(card),
    ]
    if has_plot:
        parts += [f"![Predicted Q against the share of right rollouts]({PLOT})", ""]
    card_text = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(parts))
    return str(card_text.content)


def _name(card: VerifierMeta) -> str:
    return _short(str(card.policy.get("name") or card.policy["model"]))


def _short(name: str) -> str:
    """A hub id or a shipped model as it is, of a path the last part."""
    if name.startswith("pav:") or _HUB_ID.fullmatch(name):
        return name
    return name.rstrip("/").rsplit("/", 1)[-1]


def _arxiv(card: VerifierMeta) -> list[str]:
    return [] if card.recipe == "orm" else ["arxiv:2410.08146"]


def _meaning(head: str) -> str:
    if head == ORM:
        return "a complete solution is right"
    if head.startswith("q/"):
        return f"the policy `{head.removeprefix('q/')}` finishes right from here (Q)"
    if head.startswith(LIK):
        return f"the policy `{head.removeprefix(LIK)}` gives the reference answer if asked at once"
    return head


def _facts(card: VerifierMeta) -> list[str]:
    task = card.task["class_path"].rsplit(".", 1)[-1]
    sampler = ", ".join(f"{k} {v}" for k, v in card.sampler.items())
    mode = "frozen" if card.frozen else "LoRA" if card.lora else "fine-tuned"
    lines = [
        f"* trunk: {_short(card.trunk)} ({mode}, digest `{card.trunk_digest}`), served in "
        f"{card.dtype}",
        f"* task: {task}, steps end at {card.task['init_args']['step_rule']['delimiter']!r}",
        f"* policy: {_short(card.policy['model'])} (fingerprint `{card.policy_fingerprint}`), "
        f"sampled with {sampler}",
    ]
    if card.prover_head:
        lines.append(
            f"* prover: `{card.prover_head.removeprefix('q/')}`; a search ranks steps by "
            f"Q(`{card.base_head.removeprefix('q/')}`) + {card.alpha} * advantage of the prover"
        )
    data = card.validation.get("data")
    if data:
        problems = ", ".join(f"{n} {split}" for split, n in data["problems"].items())
        solutions = ", ".join(f"{n} by {writer}" for writer, n in data["solutions"].items())
        lines.append(f"* labels: problems {problems}; solutions {solutions}; Monte-Carlo rollouts "
                     f"{data['rollouts']}")  # fmt: skip
        for policy, kinds in data["prefixes"].items():
            counts = ", ".join(f"{count} with n = {n}" for n, count in kinds.items())
            lines.append(f"* prefixes labelled by {policy}: {counts}")
    return lines


def _calibration(card: VerifierMeta) -> list[str]:
    """What turns a score token's logit into Q without any code of ours."""
    if not card.calibrators:
        return []
    rows = [
        f"| `{head}` | {c['temperature']:.6g} | {c['bias']:.6g} |"
        for head, c in card.calibrators.items()
    ]
    return [
        "A head's logit is its score token's logit times `scale`, plus the head's `bias` (both in "
        "`pav.json`), at the token before the one that ends a step. Q is `sigmoid(temperature * "
        "logit + bias)` with the values below; the form that also reads the trunk's surprise is in "
        "the checkpoint.",
        "",
        "| head | temperature | bias |",
        "|---|---|---|",
        *rows,
        "",
    ]


def _measured(card: VerifierMeta) -> dict[str, dict[str, Any]]:
    return {
        name: m
        for name, m in card.validation.items()
        if isinstance(m, dict) and "auc" in m and m.get("rows")
    }


def _table(card: VerifierMeta) -> list[str]:
    measured = _measured(card)
    if not measured:
        return []
    advantage = card.validation.get("advantage", {})
    lines = [
        "## Validation",
        "",
        "On the half of the validation problems that calibration did not see. `ceiling` is what a "
        "predictor that knows every Q would reach on labels of so few rollouts (none can be told "
        "from single ones); A is the advantage, the change of Q over a step.",
        "",
        "| head / calibrator | prefixes | AUC | Spearman | Brier | (constant) | ECE | A sign | A "
        "corr |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in measured.items():
        of_steps = advantage.get(name, {})
        values = [m.get(k) for k in ("auc", "spearman", "brier", "brier_constant")]
        values += [m.get("calibration_error"), of_steps.get("sign"), of_steps.get("correlation")]
        if not name.endswith("/ceiling") or _number(m["brier"]) is not None:
            lines.append(f"| {name} | {m['rows']} | " + " | ".join(map(_shown, values)) + " |")
    return [*lines, ""]


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def _shown(value: Any) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:.3f}"


def _results(card: VerifierMeta) -> list[EvalResult]:
    """The served figures in the form that a hub shows beside the model."""
    from huggingface_hub import EvalResult

    task = card.task["class_path"].rsplit(".", 1)[-1]
    return [
        EvalResult(
            task_type="text-classification",
            task_name="value of solution prefixes",
            dataset_type=task.lower(),
            dataset_name=f"{task}, head {name.removesuffix('/surprise')}",
            dataset_config=name.removesuffix("/surprise"),
            dataset_split="validation",
            metric_type=kind,
            metric_name=label,
            metric_value=round(number, 4),
        )
        for name, m in _measured(card).items()
        if name.endswith("/surprise")
        for key, (kind, label) in _METRICS.items()
        if (number := _number(m.get(key))) is not None
    ]
