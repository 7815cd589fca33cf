"""``make gpu-check``: what only a GPU can show, in about ten minutes on yours.

1. ``scores``: in bfloat16, head logits, log-probabilities and greedy tokens of vLLM against a plain
   transformers forward, fused (while sampling) and separate (reading, from the prefix cache, too),
   on the shipped strong policy and on a small random Qwen2.
2. ``commands``: a label run with a prover, and a beam search whose accuracy hangs on the trunk's
   log-probabilities, with the engine settings that a user gets who sets none.
3. ``shared_device``: policy and verifier engines side by side on one device, in planned shares.
4. ``weights``: an engine that gives its memory back, wakes with other weights and samples with
   their log-probabilities, as when its policy is trained beside it.
5. ``first_runner``: the scores again with vLLM's first model runner, where it picks the second.
6. ``graphs``: greedy sampling with CUDA graphs against ``enforce_eager``.
7. ``devices``: where there are two, ``tensor_parallel_size=2`` and an engine on the second device.
8. ``rl``: twenty iterations of ``pav.rl`` on SmolLM2-135M, with the verifier that ``make
   demo-gsm8k`` leaves; without it this is left out.

bfloat16 rounds, and kernels round differently. What is allowed is therefore measured, not guessed:
vLLM may be off from transformers by ``SLACK`` times what transformers in bfloat16 is off from
itself in float32, and a greedy token may be another one only where the two are as close as that.

Every check has a process of its own, so that it starts with an empty device and none hides another.
Rows go to ``runs/gpu_check/results/gpu_check.json``; the exit code is 1 if a target is missed or a
check breaks, 2 if there is no GPU.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.core.seeds import seed_of
from pav.engine.gpu_memory import share_gpu
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.export.vllm import export_verifier
from pav.policy.inference import Sampled
from pav.policy.policy import (
    Dtype,
    PolicyConfig,
    Prompt,
    Sampler,
    asset,
    encode_prompt,
    load_tokenizer,
)
from pav.rl.report import read_metrics
from pav.tasks.base import task_spec
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import Verifier, VerifierMeta
from pav.verifier.shape import GIB
from pav.verifier.trunk import HeadedTrunk, load_trunk
from search.run.records import read as read_records

Check = Literal[
    "scores", "commands", "shared_device", "weights", "first_runner", "graphs", "devices", "rl"
]
Row = dict[str, Any]
# What is most likely to fail comes first.
CHECKS: tuple[Check, ...] = (
    "scores",
    "commands",
    "shared_device",
    "weights",
    "first_runner",
    "graphs",
    "devices",
    "rl",
)
# Without surprise this beam is at .07, with it above .8 on a CPU.
BEAM_RIGHT = 0.7
HEADS = ["q/base", "q/prover", "orm"]
PROMPTS = 32
NEW_TOKENS = 48
SLACK = 3.0
KV_GIB = 1.0
CHECK_SECONDS = 600
RL_CONFIG = Path("configs/gsm8k_smollm2/rl.yaml")
RL_ITERATIONS = 20


@dataclass(frozen=True)
class GpuCheckConfig:
    """What only a GPU can show; exit code 1 if a target is missed, 2 without a GPU.

    Args:
        output: directory for models and results; what an earlier check left there is replaced.
        only: run this check alone (the command runs each in a process of its own).
    """

    output: str = "runs/gpu_check"
    only: Check | None = None


@dataclass(frozen=True)
class Subject:
    """An exported verifier and the transformers model that it must agree with.

    Attributes:
        name: what results call it.
        export: directory that vLLM serves.
        score_ids: heads, then the reference row.
        trunk: directory of the trunk.
        weight: (heads, hidden) head rows.
        prompts: ids of each prompt.
    """

    name: str
    export: str
    score_ids: list[int]
    trunk: str
    weight: torch.Tensor
    prompts: list[list[int]]

    def reference(self, dtype: torch.dtype) -> HeadedTrunk:
        """Trunk and heads in transformers, on the GPU where there is one."""
        model = HeadedTrunk(load_trunk(self.trunk), len(self.weight))
        model.head.weight.data.copy_(self.weight)
        return model.to(dtype).to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def engine(self, **settings: Any) -> VllmEngine:
        """The export in vLLM, bfloat16."""
        config = EngineConfig(kv_gib=KV_GIB, **settings)
        engine = VllmEngine(self.export, "bfloat16", 256, self.score_ids, config)
        engine.start()
        return engine


@dataclass
class Report:
    """Rows of one check in the format of ``benchmarks/results``."""

    rows: list[Row] = field(default_factory=list)

    def add(
        self, metric: str, value: float, op: str | None = None, target: float | None = None
    ) -> None:
        """One row; without ``op`` it has no target."""
        goal = None if op is None else {"op": op, "value": target}
        self.rows.append(
            {
                "metric": f"gpu_check: {metric}",
                "value": value,
                "ci95": None,
                "target": goal,
                "seeds": [0],
                "n_problems": PROMPTS,
                "command": "make gpu-check",
                "machine": machine(),
                "date": datetime.date.today().isoformat(),
                "commit": commit(),
            }
        )
        print(f"  {metric}: {value:.4g}" + ("" if op is None else f" (target {op} {target:.4g})"))


def machine() -> str:
    """GPU and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return f"{torch.cuda.device_count()} x {gpu}, torch {torch.__version__}"


def commit() -> str | None:
    """The checked-out commit, None outside a git tree."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def random_qwen2(directory: Path) -> Path:
    """A small random Qwen2 whose output is as peaked as a trained model's."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=509,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    # Of the default initialisation all tokens are about equally likely: any rounding would decide.
    torch.nn.init.normal_(model.lm_head.weight, std=0.25)
    model.save_pretrained(directory)
    return directory


def subjects(output: Path) -> list[Subject]:
    """What is checked: a random Qwen2 and, where it ships, the strong policy."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 500, size=n).tolist() for n in rng.integers(5, 40, size=PROMPTS)]
    found = [_subject("random Qwen2", random_qwen2(output / "qwen2"), prompts, output)]
    strong = asset("strong")
    if (strong / "config.json").exists():
        tokenizer = load_tokenizer(str(strong))
        problems = Tape().problems("validation")
        prompts = [
            encode_prompt(tokenizer, Prompt(), next(problems).question) for _ in range(PROMPTS)
        ]
        found.append(_subject("pav:strong", strong, prompts, output))
    else:
        print("  not checked: pav:strong is not shipped with this version")
    return found


def _subject(name: str, trunk: Path, prompts: list[list[int]], output: Path) -> Subject:
    hidden = json.loads((trunk / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(1)
    # Logits of trained heads: a few units wide.
    weight = torch.randn(len(HEADS), hidden, generator=generator) * (3.0 / hidden**0.5)
    bias = torch.zeros(len(HEADS))
    export = output / f"{trunk.name}.export"
    verifier = Verifier(export.with_suffix(".ckpt"), "gpu_check", _card(trunk), weight, bias, None)
    score_ids = export_verifier(verifier, str(trunk), export)
    return Subject(name, str(export), score_ids, str(trunk), weight, prompts)


def _card(trunk: Path) -> VerifierMeta:
    return VerifierMeta(
        heads=HEADS,
        recipe="pav",
        trunk=str(trunk),
        trunk_digest="",
        frozen=True,
        prompt={},
        dtype="bfloat16",
        task=task_spec(Tape()),
        task_fingerprint="",
        policy=asdict(PolicyConfig(str(trunk), dtype="bfloat16")),
        policy_fingerprint="",
        tokenizer="",
        sampler={},
        base_head=HEADS[0],
        prover_head=HEADS[1],
        alpha=1.0,
        pick="orm",
    )


def sample(engine: VllmEngine, prompts: list[list[int]], *, greedy: bool = False) -> list[Sampled]:
    """``NEW_TOKENS`` after every prompt, with what the engine has: scores or log-probabilities."""
    sampler = Sampler(top_k=1 if greedy else 0, max_length=256)

    def job(i: int) -> Callable[[], Any]:
        async def one() -> tuple[int, Sampled]:
            seed = seed_of("gpu_check", i)
            return i, await engine.sample(
                prompts[i],
                sampler,
                stop_ids=[],
                max_tokens=NEW_TOKENS,
                seed=seed,
                scores=bool(engine.score_ids),
                logprobs=engine.trained,
            )

        return one

    return _in_order([engine], [job(i) for i in range(len(prompts))])


def _in_order(engines: list[VllmEngine], jobs: list[Callable[[], Any]]) -> list[Any]:
    results: list[tuple[int, Any]] = []
    drive(engines, jobs, results.append, concurrency=64)
    return [value for _, value in sorted(results, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Forward:
    """A transformers forward over one sequence.

    Attributes:
        heads: (tokens, heads) logits.
        logprobs: (tokens - 1,) log-probability of every token but the first.
        logits: (tokens, vocabulary) of the next token.
    """

    heads: np.ndarray
    logprobs: np.ndarray
    logits: np.ndarray

    def given_away(self, position: int, token: int) -> float:
        """By how much the logit of ``token`` after ``position`` is below the best one."""
        logits = self.logits[position]
        return float(logits.max() - logits[token])


@torch.inference_mode()
def forward(model: HeadedTrunk, ids: list[int]) -> Forward:
    """Heads, log-probabilities and logits of ``ids``."""
    batch = torch.tensor([ids], device=model.head.weight.device)
    hidden = model.hidden(batch)
    logits: torch.Tensor = model.trunk.get_output_embeddings()(hidden)
    return Forward(
        model.head_logits(hidden)[0].float().cpu().numpy(),
        model.token_logprobs(hidden, batch)[0].float().cpu().numpy(),
        logits[0].float().cpu().numpy(),
    )


def gap(left: np.ndarray | None, right: np.ndarray) -> float:
    """Largest absolute difference."""
    assert left is not None
    return float(np.abs(left - right).max())


def compare(subject: Subject, engine: VllmEngine, report: Report, label: str = "") -> None:
    """Parity of ``engine`` and transformers on text that the engine samples itself."""
    sampled = sample(engine, subject.prompts)
    sequences = [[*p, *s.ids] for p, s in zip(subject.prompts, sampled, strict=True)]
    exact, rounded = (
        [forward(model, ids) for ids in sequences]
        for model in map(subject.reference, (torch.float32, torch.bfloat16))
    )
    pairs = list(zip(rounded, exact, strict=True))
    allowed = SLACK * max(gap(a.heads, b.heads) for a, b in pairs)
    allowed_lp = SLACK * max(gap(a.logprobs, b.logprobs) for a, b in pairs)
    name = f"{subject.name}{label}"

    fused = max(
        gap(s.heads, f.heads[len(p) - 1 : -1])
        for p, s, f in zip(subject.prompts, sampled, rounded, strict=True)
    )
    report.add(f"{name}: head logits while sampling, largest difference", fused, "<=", allowed)

    def read(i: int, end: int, first: int | None) -> Callable[[], Any]:
        async def one() -> tuple[tuple[int, int], Any]:
            return (i, end), await engine.read(sequences[i][:end], logprobs_from=first)

        return one

    def greedy(i: int, end: int) -> Callable[[], Any]:
        async def one() -> tuple[tuple[int, int], int]:
            prefix, sampler = sequences[i][:end], Sampler(top_k=1, max_length=256)
            out = await engine.sample(prefix, sampler, stop_ids=[], max_tokens=1, seed=0)
            return (i, end), out.ids[0]

        return one

    places = [
        (i, end)
        for i, (p, s) in enumerate(zip(subject.prompts, sequences, strict=True))
        for end in range(len(p), len(s), 4)
    ]
    answers = _in_order([engine], [read(i, end, None) for i, end in places])
    separate = max(
        gap(a.heads, rounded[i].heads[end - 1]) for (i, end), a in zip(places, answers, strict=True)
    )
    report.add(f"{name}: head logits while reading, largest difference", separate, "<=", allowed)

    whole = [(i, len(s)) for i, s in enumerate(sequences)]
    answers = _in_order([engine], [read(i, end, 1) for i, end in whole])
    logprobs = max(gap(a.logprobs, f.logprobs) for a, f in zip(answers, rounded, strict=True))
    report.add(f"{name}: log-probabilities, largest difference", logprobs, "<=", allowed_lp)

    # As a search asks: of the new tokens, the rest mostly cached.
    answers = _in_order([engine], [read(i, end, max(1, end - 6)) for i, end in places])
    logprobs = max(
        gap(a.logprobs, rounded[i].logprobs[max(1, end - 6) - 1 : end - 1])
        for (i, end), a in zip(places, answers, strict=True)
    )
    report.add(
        f"{name}: log-probabilities of last tokens, largest difference", logprobs, "<=", allowed_lp
    )
    report.add(
        f"{name}: these readings, share of tokens that were cached",
        sum(a.cached for a in answers) / sum(end for _, end in places),
    )

    chosen = _in_order([engine], [greedy(i, end) for i, end in places])
    agreed = [
        token == rounded[i].logits[end - 1].argmax()
        for (i, end), token in zip(places, chosen, strict=True)
    ]
    report.add(f"{name}: greedy tokens, agreement", float(np.mean(agreed)))
    given_away = max(
        exact[i].given_away(end - 1, token) for (i, end), token in zip(places, chosen, strict=True)
    )
    allowed_logit = SLACK * max(gap(a.logits, b.logits) for a, b in pairs)
    report.add(f"{name}: greedy tokens, largest logit given away", given_away, "<=", allowed_logit)


def check_scores(output: Path, report: Report) -> None:
    """Scores of vLLM against transformers, bfloat16."""
    for subject in subjects(output):
        engine = subject.engine()
        compare(subject, engine, report)
        engine.shutdown()


def check_commands(output: Path, report: Report) -> None:
    """A label run and a search with the engine settings of a user who sets none."""
    for asset_name in ("prover", "verifiers/reference.ckpt"):
        if not asset(asset_name).exists():
            print(f"  not checked: pav:{asset_name} is not shipped with this version")
            return
    labels, beam = output / "labels", output / "beam"
    for directory in (labels, beam):
        shutil.rmtree(directory, ignore_errors=True)
    problems = ["--problems", str(PROMPTS)]
    commands = {
        "data_gen.rollouts": [
            *("--prover", "pav:prover", "--validation_problems", "4", "--n_traces", "2"),
            *("--output", str(labels)),
        ],
        "search.beam": ["--verifier", "pav:reference", "--n", "4", "--output", str(beam)],
    }
    for name, arguments in commands.items():
        command = [sys.executable, "-m", name, *arguments, *problems]
        code = subprocess.run(command, check=False).returncode
        report.add(f"{name} with default engines: finished", float(code == 0), ">=", 1.0)
    found = read_records(beam / "beam.jsonl")
    right = float(np.mean([r.correct for r in found])) if found else 0.0
    report.add("search.beam --verifier pav:reference --n 4: right", right, ">=", BEAM_RIGHT)


def check_first_runner(output: Path, report: Report) -> None:
    """The scores with vLLM's first model runner, which users are told to try where they fail."""
    first = output / "first_runner"
    done = _start("scores", first, {"VLLM_USE_V2_MODEL_RUNNER": "0"})
    report.add("first model runner: check finished", float(done), ">=", 1.0)
    for row in _rows(first, "scores"):
        report.rows.append({**row, "metric": f"{row['metric']}, first model runner"})


def check_graphs(output: Path, report: Report) -> None:
    """The same greedy tokens with CUDA graphs and without."""
    for subject in subjects(output):
        runs = []
        for eager in (True, False):
            engine = subject.engine(enforce_eager=eager)
            runs.append([s.ids for s in sample(engine, subject.prompts, greedy=True)])
            engine.shutdown()
        eager_ids, graph_ids = runs
        same = np.mean([a == b for a, b in zip(eager_ids, graph_ids, strict=True)])
        report.add(f"{subject.name}: same greedy ids with CUDA graphs, share", float(same))
        # Compiled kernels round differently: a tie may turn, and all that follows with it.
        exact, rounded = (subject.reference(t) for t in (torch.float32, torch.bfloat16))
        given_away = allowed = 0.0
        for prompt, ids in zip(subject.prompts, graph_ids, strict=True):
            sequence = [*prompt, *ids]
            truth = forward(exact, sequence)
            allowed = max(allowed, SLACK * gap(truth.logits, forward(rounded, sequence).logits))
            for i, token in enumerate(ids, start=len(prompt) - 1):
                given_away = max(given_away, truth.given_away(i, token))
        metric = f"{subject.name}: CUDA graphs, largest logit that a greedy token gives away"
        report.add(metric, given_away, "<=", allowed)


def check_shared_device(output: Path, report: Report) -> None:
    """A policy and a verifier engine in one process on one device."""
    subject = subjects(output)[-1]
    served: list[tuple[str, Dtype]] = [(subject.trunk, "bfloat16")] * 2
    shares = share_gpu(EngineConfig(), served, 256)
    policy = VllmEngine(subject.trunk, "bfloat16", 256, config=shares[0])
    policy.start()
    alone = [s.ids for s in sample(policy, subject.prompts)]
    policy.reset_prefix_cache()
    verifier = VllmEngine(subject.export, "bfloat16", 256, subject.score_ids, shares[1])
    verifier.start()

    def job(i: int) -> Callable[[], Any]:
        async def one() -> tuple[int, tuple[list[int], np.ndarray]]:
            out = await policy.sample(
                subject.prompts[i],
                Sampler(max_length=256),
                stop_ids=[],
                max_tokens=NEW_TOKENS,
                seed=seed_of("gpu_check", i),
            )
            read = await verifier.read([*subject.prompts[i], *out.ids])
            return i, (out.ids, read.heads)

        return one

    both = _in_order([policy, verifier], [job(i) for i in range(PROMPTS)])
    same = float(np.mean([ids == before for (ids, _), before in zip(both, alone, strict=True)]))
    report.add("two engines on one device: samples as those of one alone, share", same, ">=", 0.9)
    off: dict[torch.dtype, list[np.ndarray]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = subject.reference(dtype)
        off[dtype] = [
            forward(model, [*p, *ids]).heads[-1]
            for p, (ids, _) in zip(subject.prompts, both, strict=True)
        ]
    rounded = np.stack(off[torch.bfloat16])
    allowed = SLACK * gap(rounded, np.stack(off[torch.float32]))
    heads = gap(np.stack([h for _, h in both]), rounded)
    report.add("two engines on one device: head logits, largest difference", heads, "<=", allowed)
    policy.shutdown()
    verifier.shutdown()


def check_weights(output: Path, report: Report) -> None:
    """An engine that sleeps, wakes with other weights and samples with them."""
    for subject in subjects(output):
        config = EngineConfig(kv_gib=KV_GIB)
        engine = VllmEngine(subject.trunk, "bfloat16", 256, config=config, trained=True)
        engine.start()
        old = sample(engine, subject.prompts)
        exact = subject.reference(torch.float32)
        with torch.no_grad():
            for weights in exact.trunk.parameters():
                weights += 0.1 * weights.std() * torch.randn_like(weights)
        rounded = copy.deepcopy(exact).to(torch.bfloat16)
        if torch.cuda.is_available():
            free = torch.cuda.mem_get_info()[0]
            engine.sleep()
            freed = (torch.cuda.mem_get_info()[0] - free) / GIB
            report.add(f"{subject.name}: GiB that sleep frees", freed, ">=", 0.9 * KV_GIB)
        else:
            engine.sleep()
        engine.load_weights(rounded.trunk.state_dict(), 1)
        new = sample(engine, subject.prompts)
        versions = {s.version for s in old}, {s.version for s in new}
        report.add(f"{subject.name}: versions", float(versions == ({0}, {1})), ">=", 1.0)
        pairs = list(zip(subject.prompts, new, strict=True))
        near = [_logprobs(rounded, prompt, out.ids) for prompt, out in pairs]
        truth = [_logprobs(exact, prompt, out.ids) for prompt, out in pairs]
        allowed = SLACK * _mean_gap(near, truth)
        what = f"{subject.name}: log-probability of new weights, mean difference"
        report.add(what, _mean_gap([out.logprobs for out in new], near), "<=", allowed)
        then = zip(subject.prompts, old, strict=True)
        moved = [_logprobs(rounded, prompt, out.ids) for prompt, out in then]
        stale = _mean_gap([out.logprobs for out in old], moved)
        report.add(f"{what} of old samples", stale, ">=", allowed)
        engine.shutdown()


def _logprobs(model: HeadedTrunk, prompt: list[int], ids: list[int]) -> np.ndarray:
    """Log-probabilities of ``ids`` after a prompt, of the model without its heads."""
    logits = torch.tensor(forward(model, [*prompt, *ids]).logits[len(prompt) - 1 : -1])
    of_all = logits.float().log_softmax(-1)
    chosen: np.ndarray = of_all.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    return chosen


def _mean_gap(left: list[Any], right: list[np.ndarray]) -> float:
    """Mean absolute difference."""
    return float(np.abs(np.concatenate(left) - np.concatenate(right)).mean())


def check_devices(output: Path, report: Report) -> None:
    """Tensor parallelism over two devices; an engine on the second one."""
    if torch.cuda.device_count() < 2:
        print("  not checked: one device")
        return
    for subject in subjects(output):
        engine = subject.engine(tensor_parallel_size=2)
        compare(subject, engine, report, ", tensor parallel")
        engine.shutdown()
    # One process a device, as rollout and search workers are placed.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    second = output / "second_device"
    done = _start("scores", second, {"CUDA_VISIBLE_DEVICES": visible[1]})
    report.add("second device: check finished", float(done), ">=", 1.0)
    for row in _rows(second, "scores"):
        report.rows.append({**row, "metric": f"{row['metric']}, second device"})


def check_rl(output: Path, report: Report) -> None:
    """Online RL of SmolLM2-135M in bfloat16, policy, verifier and engine on one device."""
    verifier = Path(yaml.safe_load(RL_CONFIG.read_text())["verifier"])
    if not verifier.exists():
        print(f"  not checked: there is no {verifier}; 'make demo-gsm8k' makes it")
        return
    directory = output / "rl"
    shutil.rmtree(directory, ignore_errors=True)
    code = subprocess.run(rl_command(directory), check=False).returncode
    report.add("pav.rl on SmolLM2-135M: finished", float(code == 0), ">=", 1.0)
    found = [row for row in read_metrics(directory) if "mismatch/mean" in row]
    report.add("pav.rl on SmolLM2-135M: iterations", len(found), ">=", RL_ITERATIONS)
    figures = ["mismatch/mean", "mismatch/largest_ratio", "train/accuracy", "train/tokens"]
    figures += [f"seconds/{part}" for part in ("sync", "sample", "score", "update")]
    for name in figures if found else []:
        mean = float(np.mean([row[name] for row in found]))
        report.add(f"pav.rl on SmolLM2-135M: {name}, mean over iterations", mean)


def rl_command(directory: Path) -> list[str]:
    """What trains SmolLM2-135M on a GPU: the settings of the demo, with bfloat16 in the trainer."""
    return [
        *(sys.executable, "-m", "pav.rl", "--config", str(RL_CONFIG), "--output", str(directory)),
        *("--iterations", str(RL_ITERATIONS), "--precision", "bf16-mixed"),
    ]


def _start(check: Check, output: Path, env: dict[str, str] | None = None) -> bool:
    command = [sys.executable, __file__, "--only", check, "--output", str(output)]
    try:
        done = subprocess.run(
            command, env={**os.environ, **(env or {})}, timeout=CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"  {check}: stopped after {CHECK_SECONDS} s")
        return False
    return done.returncode == 0


def _rows(output: Path, check: Check) -> list[Row]:
    path = output / f"{check}.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


def met(row: Row) -> bool:
    """Whether a row's target is met; one without a target is."""
    target = row["target"]
    if target is None:
        return True
    good: bool = (
        row["value"] >= target["value"] if target["op"] == ">=" else row["value"] <= target["value"]
    )
    return good


def gpu_check(config: GpuCheckConfig) -> None:
    """Run the checks (see the module's docstring).

    Raises:
        UserError: if there is no GPU.
        SystemExit: with code 1 if a target is missed or a check breaks.
    """
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU; run this on a CUDA machine after 'make gpu-setup'")
    output = Path(config.output)
    if config.only:
        run_check(config.only, output)
        return
    report = Report()
    print(f"checking {machine()}")
    for check in CHECKS:
        (output / f"{check}.json").unlink(missing_ok=True)
        print(f"{check}: {CHECK_FUNCTIONS[check].__doc__}", flush=True)
        finished = _start(check, output)
        report.rows += _rows(output, check)
        report.add(f"{check}: check finished", float(finished), ">=", 1.0)
    results = output / "results"
    results.mkdir(exist_ok=True)
    (results / "gpu_check.json").write_text(json_text(report.rows) + "\n")
    missed = [row["metric"] for row in report.rows if not met(row)]
    for metric in missed:
        print(f"MISSED {metric}")
    print(
        f"{len(report.rows) - len(missed)} of {len(report.rows)} checks as expected; "
        f"rows: {results}/gpu_check.json; table: python -m benchmarks.summary --results {results}"
    )
    if missed:
        raise SystemExit(1)


def run_check(check: Check, output: Path) -> None:
    """Run one check in this process and write its rows to ``<output>/<check>.json``."""
    output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    report = Report()
    try:
        CHECK_FUNCTIONS[check](output, report)
    finally:
        (output / f"{check}.json").write_text(json_text(report.rows) + "\n")


CHECK_FUNCTIONS: dict[Check, Callable[[Path, Report], None]] = {
    "scores": check_scores,
    "commands": check_commands,
    "shared_device": check_shared_device,
    "weights": check_weights,
    "first_runner": check_first_runner,
    "graphs": check_graphs,
    "devices": check_devices,
    "rl": check_rl,
}


def main() -> None:
    """Entry point of ``make gpu-check``."""
    run(gpu_check, GpuCheckConfig, "benchmarks/gpu_check.py")


if __name__ == "__main__":
    main()
