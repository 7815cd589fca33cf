"""The rendered prompt belongs to the identity of labels, verifiers and searches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data_gen.config import RolloutsConfig
from data_gen.likelihood.command import LikelihoodConfig, likelihood
from data_gen.merge import MergeConfig, merge
from data_gen.rollouts import _manifest, _rounds, rollouts
from data_gen.store import Store
from pav.core.errors import UserError
from pav.core.manifest import PROMPTS, other_prompt
from pav.core.steps import StepRule
from pav.engine.loading import EngineConfig
from pav.labels.tables import Trace, read_labels
from pav.policy.policy import Policy, PolicyConfig, Prompt, Sampler, load_policy
from pav.policy.rendered import reads_clock, refuse_clock, rendered, rendering
from pav.tasks.tape import Tape
from pav.train.checkpoints import resume_or_refuse
from pav.train.command import train
from pav.train.config import TrainConfig
from pav.verifier.checkpoint import load_verifier
from search.run.opening import open_session
from search.run.records import open_run
from search.run.session import Session
from tests.conftest import CHATML, MakeVerifier

TASK = Tape(n_ops=3)
SYSTEM = "<|im_start|>system\nThink.<|im_end|>\n" + CHATML


def template(model: Path, text: str) -> None:
    (model / "chat_template.jinja").write_text(text)


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama", "chat"), tmp_path / "model"))


def asked(model: Path, **kwargs: str) -> PolicyConfig:
    return PolicyConfig(str(model), "base", Prompt(chat=True, chat_template_kwargs={**kwargs}))


def loaded(config: PolicyConfig) -> Policy:
    return load_policy(config, TASK.step_rule)


def label_run(output: Path, model: Path, problems: int = 3, skip: int = 0) -> RolloutsConfig:
    """A finished label run of given solutions: it needs no engine, nor does its repeat."""
    chosen = list(islice(TASK.problems("train"), skip, skip + problems))
    chosen += islice(TASK.problems("validation"), skip, skip + problems)
    file = output.with_suffix(".jsonl")
    text = "1+1=2\n2+2=4\nA{}"
    rows = [{"problem_id": p.id, "text": text.format(g)} for p in chosen for g in (p.gold, "x")]
    file.write_text("\n".join(map(json.dumps, rows)))
    config = RolloutsConfig(
        str(output), TASK, asked(model), sampler=Sampler(max_length=120), problems=problems,
        validation_problems=problems, skip=skip, n_mc=0, traces_from=str(file),
    )  # fmt: skip
    policy = loaded(config.policy)
    with Store(output, _manifest(config, [policy])) as store:
        for seed in (seed for seeds in _rounds(config, [policy]) for seed in seeds):
            assert seed.given is not None
            ids, cut = seed.given
            right = policy.text(ids).endswith(f"A{seed.problem.gold}")
            store.add(
                Trace(seed.trace_id, seed.problem.id, seed.problem.question, seed.problem.gold,
                      seed.split, seed.writer, seed.index, ids, policy.stepper.step_ends(ids),
                      "1", right, cut)
            )  # fmt: skip
        store.seal({"base": policy.fingerprint})
    return config


def test_a_label_run_is_not_resumed_with_an_edited_chat_template(
    model: Path, tmp_path: Path
) -> None:
    config = label_run(tmp_path / "run", model)
    rollouts(config)
    before = loaded(config.policy).fingerprint
    template(model, SYSTEM)
    assert loaded(config.policy).fingerprint == before
    with pytest.raises(
        UserError,
        match=r"run' was made with another prompt by the same settings: base reads another prompt "
        r"\('<\|im_start\|>user.* there, '<\|im_start\|>system\\nThink.* now\); put back",
    ):
        rollouts(config)
    template(model, CHATML)
    rollouts(config)
    # What an older version made does not tell its prompt, and goes on.
    manifest = Path(config.output) / "manifest.json"
    old = {k: v for k, v in json.loads(manifest.read_text()).items() if k != PROMPTS}
    manifest.write_text(json.dumps(old))
    template(model, SYSTEM)
    rollouts(config)
    assert json.loads(manifest.read_text()) == old


def test_the_provers_prompt_is_compared_too(model: Path, tmp_path: Path) -> None:
    prover = Path(shutil.copytree(model, tmp_path / "prover"))
    config = replace(
        label_run(tmp_path / "run", model), prover=replace(asked(prover), name="prover")
    )
    [trace, *_] = read_labels([config.output]).traces

    def opened() -> Store:
        return Store(tmp_path / "two", _manifest(config, [loaded(p) for p in config.policies]))

    with opened():
        pass
    template(prover, SYSTEM)
    # Where nothing is finished yet, nothing is mixed.
    with opened() as store:
        store.add(trace)
    template(prover, CHATML)
    with pytest.raises(UserError, match="prover reads another prompt"), opened():
        pass


def test_labels_of_two_prompts_are_neither_merged_nor_trained_on_together(
    model: Path, tmp_path: Path
) -> None:
    label_run(tmp_path / "a", model)
    label_run(tmp_path / "same", model, skip=3)
    runs = [str(tmp_path / name) for name in ("a", "same")]
    merge(MergeConfig(str(tmp_path / "merged"), runs))
    template(model, SYSTEM)
    label_run(tmp_path / "b", model, skip=6)
    said = "were made with two prompts by the same settings: base reads another prompt"
    for first in ("a", "merged"):
        with pytest.raises(UserError, match=said):
            read_labels([str(tmp_path / first), str(tmp_path / "b")])
        with pytest.raises(UserError, match=said):
            merge(MergeConfig(str(tmp_path / "out"), [str(tmp_path / n) for n in (first, "b")]))


def test_likelihoods_of_two_prompts_do_not_stand_in_one_table(model: Path, tmp_path: Path) -> None:
    config = label_run(tmp_path / "run", model, problems=1)
    likelihood(LikelihoodConfig(config.output))
    likelihood(LikelihoodConfig(config.output))
    template(model, SYSTEM)
    with pytest.raises(UserError, match=r"or under another prompt \(prompt ids \w+ and \w+ now\)"):
        likelihood(LikelihoodConfig(config.output))


def test_verifier_and_searches_remember_how_policy_and_trunk_were_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = label_run(tmp_path / "run", model, problems=12)
    likelihood(LikelihoodConfig(config.output))
    training = TrainConfig(
        [config.output], str(tmp_path / "pav.ckpt"), trunk=str(model), max_epochs=1
    )
    card = train(training)
    assert card is not None
    text = "<|im_start|>user\n1+1\n<|im_end|>\n<|im_start|>assistant\n"
    assert card.policy_prompt["text"] == card.trunk_prompt["text"] == text
    verifier = load_verifier(training.output)
    assert verifier.card.policy_prompt == verifier.card.trunk_prompt == card.policy_prompt

    def opened() -> Session:
        session = open_session(verifier, None, None, None, EngineConfig())
        session.trunk(verifier)
        session.trunk(verifier)  # what is wrong is said once
        return session

    capsys.readouterr()
    then = {PROMPTS: opened().prompts()}
    assert list(then[PROMPTS]) == ["the policy", f"the trunk of {training.output!r}"]
    assert "WARNING" not in capsys.readouterr().err
    for name, settings in (("search", {"n": 4} | then), ("old", {"n": 4})):
        with open_run(tmp_path / name, settings):
            (tmp_path / name / "beam.jsonl").write_text("{}\n")
    template(model, SYSTEM)
    session = opened()
    now = {PROMPTS: session.prompts()}
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": its ")[2].partition(" reads ")[0] for line in told] == [
        "policy", "trunk"
    ]  # fmt: skip
    assert all("pav.ckpt' was made for another prompt by the same settings" in t for t in told)
    with (
        pytest.raises(UserError, match=r"search' was made with another prompt .* the policy"),
        open_run(tmp_path / "search", {"n": 4} | now),
    ):
        pass
    with open_run(tmp_path / "old", {"n": 4} | now):
        pass

    # Training that was interrupted: the trunk's prompt is compared before anything else.
    working = tmp_path / "pav.training"
    resume_or_refuse(training, card, working, [])
    torch.save({"callbacks": {}}, working / "last.ckpt")
    resume_or_refuse(training, card, working, [])
    other = replace(card, trunk_prompt=rendered(session.trunk(verifier)))
    with pytest.raises(UserError, match=r"unfinished run in .* trunk '.*model' reads another pro"):
        resume_or_refuse(training, other, working, [])
    settings = json.loads((working / "train.json").read_text())
    del settings[PROMPTS]
    (working / "train.json").write_text(json.dumps(settings))
    resume_or_refuse(training, other, working, [])


def test_a_trunk_with_another_chat_template_than_the_policy_is_not_fused(
    model: Path, tmp_path: Path, make_verifier: MakeVerifier
) -> None:
    make_verifier(model, tmp_path / "pav.ckpt", prompt=Prompt(chat=True))
    verifier = load_verifier(str(tmp_path / "pav.ckpt"))
    elsewhere = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    template(elsewhere, SYSTEM)
    session = open_session(verifier, None, asked(elsewhere), None, EngineConfig())
    with pytest.raises(UserError, match="has another chat template than the policy"):
        session.scorer(verifier, "fused", True, None)


def test_a_template_that_reads_the_clock_renders_alike_all_through_a_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template(model, "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n" + CHATML)
    policy = loaded(asked(model))
    assert reads_clock(policy)
    assert rendered(policy) == rendered(policy) == rendered(loaded(asked(model)))
    tomorrow = replace(policy, clock=datetime(2100, 1, 1))
    said = other_prompt({"base": rendered(policy)}, {"base": rendered(tomorrow)})
    assert "'01 Jan 2100 00:00:00.000000" in said
    # What is begun must be such that it can go on tomorrow.
    config = RolloutsConfig(str(tmp_path / "run"), TASK, asked(model))
    with pytest.raises(UserError, match=r"set prompt.chat_template_kwargs.strftime_now, e.g. to 2"):
        rollouts(config)
    assert not (tmp_path / "run").exists()

    fixed = loaded(asked(model, strftime_now="2026-07-31"))
    refuse_clock(fixed)
    assert rendered(fixed)["text"].startswith("31 Jul 2026 00:00:00.000000\n")
    assert rendered(replace(fixed, clock=datetime(2100, 1, 1))) == rendered(fixed)
    with pytest.raises(UserError, match="strftime_now is 'tomorrow'; give a date such as 2026-07"):
        asked(model, strftime_now="tomorrow")


def test_an_unset_date_of_the_template_is_told_from_a_set_one(model: Path) -> None:
    """As Llama's templates: a variable of the caller's goes before the clock."""
    template(model, "{{ date_string or strftime_now('%d %b %Y') }}\n" + CHATML)
    assert reads_clock(loaded(asked(model)))
    assert not reads_clock(loaded(asked(model, date_string="26 Jul 2024")))


def test_a_template_that_plays_dice_is_refused(model: Path) -> None:
    template(model, "{{ ['Hello', 'Hi'] | random }}\n" + CHATML)
    with pytest.raises(UserError, match="in different ways, by chance") as error:
        rendered(loaded(asked(model)))
    assert "\n" not in str(error.value)


def test_prompts_of_equal_text_and_other_tokens_are_told_apart(chat_tokenizer: Any) -> None:
    now = rendering(chat_tokenizer, Prompt(chat=True))
    said = other_prompt({"base": {**now, "ids": "0"}}, {"base": now})
    assert said == f"base reads a prompt of other tokens (ids 0 there, {now['ids']} now)"
    assert not other_prompt({"base": now, "prover": now}, {"base": now})
    assert load_policy(PolicyConfig("pav:base"), StepRule()).fingerprint


def test_a_shipped_verifier_is_named_as_it_is_given_wherever_the_package_lies(
    tmp_path: Path,
) -> None:
    verifier = load_verifier("pav:reference")
    session = open_session(verifier, None, None, None, EngineConfig())
    session.trunk(verifier)
    prompts = session.prompts()
    assert set(prompts) == {"the policy", "the trunk of 'pav:reference'"}
    # Earlier versions named the file.
    old = {"the policy": prompts["the policy"], f"the trunk of {str(verifier.path)!r}": {}}
    with open_run(tmp_path / "run", {"n": 1, PROMPTS: old}):
        (tmp_path / "run" / "beam.jsonl").write_text("{}\n")
    with open_run(tmp_path / "run", {"n": 1, PROMPTS: prompts}):
        pass
