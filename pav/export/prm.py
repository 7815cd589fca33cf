"""``pav.export_prm``: one head of a verifier as a token-classification model (a PRM).

That is the layout that ``AutoModelForTokenClassification``, TRL's ``PRMTrainer`` and vLLM's
pooling models read: two labels per token, ``wrong`` and ``right``. The calibrator without surprise
is folded into the last layer, so the softmax of a token's logits *is* Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text, whole_directory
from pav.core.lock import Lock, beside
from pav.export.card import write_card
from pav.policy.policy import load_tokenizer
from pav.verifier.calibrate import Calibrator
from pav.verifier.checkpoint import Verifier, VerifierMeta, load_model, load_verifier, trunk_path

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pav.verifier.trunk import HeadedTrunk

LABELS = {0: "wrong", 1: "right"}


@dataclass(frozen=True)
class ExportPrmConfig:
    """A verifier's head as a token-classification model for transformers, TRL and vLLM.

    Args:
        verifier: checkpoint that pav.train wrote, or ``pav:reference``.
        output: directory to write; must not exist or be empty.
        head: which of its heads; by default that of the base policy's Q, of an ORM its own.
        trunk: new place of the trunk, if it moved.
    """

    verifier: str
    output: str
    head: str | None = None
    trunk: str | None = None


def export_prm(config: ExportPrmConfig) -> None:
    """Write the model, its tokenizer and a model card (see :class:`ExportPrmConfig`).

    Raises:
        UserError: if there is no such head, the layout cannot hold it, or ``output`` is not empty.
    """
    verifier = load_verifier(config.verifier)
    card = verifier.card
    head = config.head or card.base_head or card.heads[0]
    if head not in card.heads:
        raise UserError(
            f"head is {head!r}, verifier {config.verifier!r} has {', '.join(card.heads)}; name one"
        )

    # Not at the top: they bring torch, and --help stays fast.
    from safetensors import SafetensorError

    from pav.export.vllm import STAMP

    output = Path(config.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {config.output!r} is not empty; choose another directory")
    path = trunk_path(verifier, config.trunk)
    headed = load_model(verifier, path)
    if headed.cap is not None:
        raise UserError(
            f"the trunk of {config.verifier!r} caps its logits (final_logit_softcapping "
            f"{headed.cap}), heads included; the token-classification layout has no place for "
            "that: use the export for vLLM beside the checkpoint"
        )
    with Lock(beside(output), config.output):
        try:
            with whole_directory(output) as partial:
                _classifier(headed, verifier, head).save_pretrained(partial)
                load_tokenizer(path).save_pretrained(partial)
                stamp = {
                    "checkpoint": verifier.digest,
                    "layout": "token-classification",
                    "head": head,
                }
                (partial / STAMP).write_text(json_text(stamp))
                write_card(partial, card, _usage(card, head), "token-classification")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"output {config.output!r} cannot be written: {reason}") from error
    print(f"token-classification model of head {head}: {output}")


def _classifier(headed: HeadedTrunk, verifier: Verifier, head: str) -> Any:
    """The trunk with a two-label layer whose softmax is the calibrated Q of ``head``."""
    import torch
    from transformers import AutoModelForTokenClassification

    trunk: Any = headed.trunk
    settings = trunk.config
    settings.num_labels = len(LABELS)
    settings.id2label, settings.label2id = LABELS, {v: k for k, v in LABELS.items()}
    settings.classifier_dropout = 0.0
    # Theirs is the name of a causal LM; the new model writes its own.
    settings.architectures = None
    try:
        model: Any = AutoModelForTokenClassification.from_config(settings, dtype=torch.float32)
    except ValueError as error:
        raise UserError(
            f"transformers has no token-classification model for trunks of type "
            f"{settings.model_type!r}; use the export for vLLM beside the checkpoint"
        ) from error
    model.get_submodule(model.base_model_prefix).load_state_dict(trunk.get_decoder().state_dict())
    card = verifier.card
    plain = (
        card.calibrator(head, False)
        if head in card.calibrators
        else Calibrator(1.0, 0.0, [], [], [], [], [])
    )
    row = card.heads.index(head)
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.bias.zero_()
        model.score.weight[1] = plain.temperature * verifier.weight[row]
        model.score.bias[1] = plain.temperature * verifier.bias[row] + plain.bias
    return model.to(getattr(torch, card.dtype)).eval()


def _usage(card: VerifierMeta, head: str) -> str:
    """How to read the model; the position is not that of TRL's own training."""
    delimiter = card.task["init_args"]["step_rule"]["delimiter"]
    return (
        f"This directory is a token-classification model of the head `{head}`, calibrated: the "
        "softmax of a token's two logits is (1 - Q, Q).\n\n"
        f"Read the token **before** the one that ends a step (which holds {delimiter!r}, or the "
        "end of sequence), and the last prompt token for the problem itself: there it was trained. "
        "Models that TRL trains are read one token later, at the separator; a pooler that looks "
        "for separators (vLLM's `STEP`) would do the same, so take all tokens.\n\n"
        "```python\n"
        "from transformers import AutoModelForTokenClassification\n\n"
        "model = AutoModelForTokenClassification.from_pretrained(DIRECTORY)\n"
        "q = model(ids).logits.softmax(-1)[0, step_ends - 2 + prompt_length, 1]\n"
        "```\n\n"
        "```python\n"
        "from vllm import LLM\n\n"
        'llm = LLM(DIRECTORY, runner="pooling")\n'
        'pooled = llm.encode({"prompt_token_ids": ids}, pooling_task="token_classify")\n'
        "```\n"
    )


def main() -> None:
    """Entry point of ``pav.export_prm``."""
    run(export_prm, ExportPrmConfig, "pav.export_prm")


if __name__ == "__main__":
    main()
