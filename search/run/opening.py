"""Opening a session, by what a verifier remembers or by what the user names."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pav.core.errors import UserError
from pav.core.statistics import few
from pav.engine.loading import EngineConfig
from pav.grading.sandbox import DEFAULT_TIMEOUT
from pav.policy.policy import (
    PolicyConfig,
    Prompt,
    Sampler,
    asked,
    like,
    load_policy,
    model_path,
    settled,
    tokenizer_fingerprint,
)
from pav.policy.rendered import warn_clock, warn_other_prompt
from pav.tasks.base import Split, Task
from pav.verifier.checkpoint import (
    Verifier,
    VerifierMeta,
    load_verifier,
    resolve_task,
)
from search.run.session import Session, warn
from search.run.workers import Workers

if TYPE_CHECKING:
    pass


def plain_session(
    task: Task,
    policy: PolicyConfig,
    sampler: Sampler,
    engine: EngineConfig,
    workers: int = 1,
    grade_timeout: float | None = DEFAULT_TIMEOUT,
    ray: str | None = None,
) -> Session:
    """Session without a verifier of ours that would remember task, policy and sampler."""
    loaded = load_policy(asked(policy, task), task.step_rule)
    warn_clock(loaded)
    placed = _workers(workers, engine, ray)
    return Session(task, loaded, sampler, engine, placed, grade_timeout=grade_timeout)


def _workers(count: int, engine: EngineConfig, ray: str | None) -> Workers | None:
    return None if count == 1 and ray is None else Workers(count, engine, ray)


def open_session(
    verifier: Verifier,
    task: Task | None,
    policy: PolicyConfig | None,
    sampler: Sampler | None,
    engine: EngineConfig,
    workers: int = 1,
    grade_timeout: float | None = DEFAULT_TIMEOUT,
    ray: str | None = None,
) -> Session:
    """Session for what a verifier remembers; what is given overrides it, with a warning."""
    card = verifier.card
    source = f"verifier {str(verifier.path)!r}"
    found = resolve_task(card.task, task, source)
    if found.fingerprint != card.task_fingerprint:
        warn(f"{source} was made for task {card.task_fingerprint}, searching {found.fingerprint}")
    remembered = card.policy_config()
    if policy is None:
        try:
            model_path(remembered.model)
        except UserError as error:
            raise UserError(
                f"the policy of {source} is not at {remembered.model!r} any more; name its new "
                "place with --policy"
            ) from error
    if policy is not None and policy.prompt != Prompt():
        policy = asked(policy, found)
    elif policy is not None:
        policy = like(policy, remembered)
        if policy.prompt not in (Prompt(), settled(PolicyConfig()).prompt):
            print(f"policy {policy.model!r} is asked with the prompt that {source} remembers")
    chosen = load_policy(policy or remembered, found.step_rule)
    if tokenizer_fingerprint(chosen.tokenizer) != card.tokenizer:
        raise UserError(
            f"policy {chosen.config.model!r} has another tokenizer than {source} "
            f"({tokenizer_fingerprint(chosen.tokenizer)}, expected {card.tokenizer}); use the "
            f"policy it was made for ({remembered.model!r}) or train a verifier for this one"
        )
    if chosen.fingerprint != card.policy_fingerprint:
        warn(
            f"{source} was made for policy {remembered.model!r}, searching with "
            f"{chosen.config.model!r} (fingerprints {card.policy_fingerprint} and "
            f"{chosen.fingerprint})"
        )
    else:
        warn_other_prompt(card.policy_prompt, chosen, source, "its policy")
    warn_clock(chosen)
    used = capped(sampler, card) or card.sampler_config()
    if asdict(used) != card.sampler:
        warn(f"{source} was made for sampler {card.sampler}, searching with {asdict(used)}")
    placed = _workers(workers, engine, ray)
    return Session(found, chosen, used, engine, placed, grade_timeout=grade_timeout)


def capped(sampler: Sampler | None, card: VerifierMeta) -> Sampler | None:
    """A given sampler, whose length cap is the verifier's where it has none of its own."""
    if sampler is None or sampler.max_length:
        return sampler
    return replace(sampler, max_length=card.sampler["max_length"])


def sibling_orm(path: Path) -> str:
    """The ORM baseline that belongs to a checkpoint: ``orm.ckpt`` beside it."""
    for name in (f"{path.stem}_orm.ckpt", "orm.ckpt"):
        if (path.parent / name).is_file():
            return str(path.parent / name)
    raise UserError(
        f"no ORM baseline beside {str(path)!r} (looked for orm.ckpt); train one with pav.train "
        "--recipe orm, or name it with --baseline_verifier"
    )


def load_checked(name: str, recipe: str) -> Verifier:
    """Load a verifier of a recipe."""
    verifier = load_verifier(name)
    if verifier.card.recipe != recipe:
        raise UserError(
            f"{name!r} is a verifier of recipe {verifier.card.recipe!r}; this needs {recipe!r}"
        )
    return verifier


def warn_few(count: int, split: Split, asked_for: int) -> None:
    """Say that a split has fewer problems than were asked for, or few to choose settings on."""
    # Few of a test set are the user's choice, and their intervals are shown.
    is_wanted = split == "test" and count == asked_for
    if not is_wanted and (warning := few(count, split, asked_for)):
        warn(warning)
