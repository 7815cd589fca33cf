"""``pav.sft``: train a small policy on a task's own solutions.

Llama architecture from scratch, or on from another policy (``--init``). Matrices are trained with
Muon, the rest with AdamW.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from pav.core.errors import UserError
from pav.core.files import json_text, read_object, replace_file
from pav.core.lock import LOCK, Lock
from pav.core.manifest import PROMPTS, refuse_other
from pav.core.signals import interruptible
from pav.core.statistics import Interval, bootstrap, few
from pav.grading.sandbox import DEFAULT_TIMEOUT, GRADER_LOG, guarded
from pav.policy.opening import task_option
from pav.policy.policy import Prompt, encode_prompt, load_tokenizer, model_path
from pav.policy.rendered import rendering
from pav.tasks.base import Problem, Task, task_spec
from pav.tasks.tape import tape_tokenizer, word_tokenizer
from pav.train.checkpoints import (
    BEFORE,
    LAST,
    LastCheckpoint,
    Stopped,
    WholeCheckpoints,
    whole_checkpoint,
)
from pav.train.lightning_internals import be_quiet
from pav.train.progress import LightningProgress
from pav.train.sft_config import SftConfig

IGNORE = -100
# Batches that are drawn together and sorted by length, so that padding stays under a few percent.
BUCKET = 16
CHECKPOINT_MINUTES = 5.0


@runtime_checkable
class HasSolutions(Protocol):
    """A task that can show its own correct solutions."""

    def solutions(self, seed: int) -> Iterator[tuple[str, str]]: ...


@runtime_checkable
class HasVocabulary(Protocol):
    """A task whose solutions need other tokens than the tape's; see ``word_tokenizer``."""

    def vocabulary(self) -> tuple[list[str], str]: ...


class Solutions(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of (ids, labels), both (batch, length); the prompt and padding carry no loss.

    Batch i depends on (seed, i) alone, so a resumed run sees what an unbroken one would have.
    """

    def __init__(
        self, task: HasSolutions, tokenizer: PreTrainedTokenizerBase, config: SftConfig, start: int
    ) -> None:
        self.task, self.tokenizer, self.config, self.start = task, tokenizer, config, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for bucket in range(self.start // BUCKET, -(-self.config.steps // BUCKET)):
            skip = max(0, self.start - bucket * BUCKET)
            yield from self._bucket(bucket)[skip:]

    def _bucket(self, bucket: int) -> list[tuple[Tensor, Tensor]]:
        batch, eos = self.config.batch, self.tokenizer.eos_token_id
        rows = []
        seed = self.config.seed * 1_000_003 + bucket
        for question, solution in islice(self.task.solutions(seed), BUCKET * batch):
            prompt = encode_prompt(self.tokenizer, self.config.prompt, question)
            target = self.tokenizer.encode(solution, add_special_tokens=False) + [eos]
            rows.append((prompt, target))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        batches = [self._pad(rows[i : i + batch]) for i in range(0, len(rows), batch)]
        random.Random(seed).shuffle(batches)
        return batches

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        length = max(len(p) + len(t) for p, t in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id or 0)
        labels = torch.full((len(rows), length), IGNORE)
        for i, (prompt, target) in enumerate(rows):
            end = len(prompt) + len(target)
            ids[i, :end] = torch.tensor(prompt + target)
            labels[i, len(prompt) : end] = torch.tensor(target)
        return ids, labels


class SftModule(L.LightningModule):
    """Next-token loss on solutions; two optimisers, hence stepped by hand."""

    def __init__(self, config: SftConfig, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.model = config, model
        forward = model.forward
        self.logits = torch.compile(forward, dynamic=True) if config.compile else forward

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        inner = {id(p) for p in self.model.model.layers.parameters() if p.ndim == 2}
        matrices = [p for p in self.model.parameters() if id(p) in inner]
        rest = [p for p in self.model.parameters() if id(p) not in inner]
        return [
            torch.optim.Muon(
                matrices, lr=self.config.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=self.config.lr_rest, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        ids, labels = batch
        # Right padding under a causal mask needs no attention mask: no real token sees a pad.
        logits = self.logits(ids).logits[:, :-1]
        loss = cross_entropy(
            logits.float().reshape(-1, logits.shape[-1]),
            labels[:, 1:].reshape(-1),
            ignore_index=IGNORE,
        )
        optimizers: Any = self.optimizers()
        scale = schedule(self.global_step // len(optimizers), self.config)
        for optimizer, peak in zip(optimizers, (self.config.lr, self.config.lr_rest), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        self.log("loss", loss.detach(), prog_bar=True)


def schedule(step: int, config: SftConfig) -> float:
    """Share of the peak rate at ``step``: linear warm-up, flat, linear decay to zero."""
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(1.0, (step + 1) / max(1, config.warmup), left)


def sft(config: SftConfig) -> None:
    """Train, save and measure a policy (see :class:`SftConfig`)."""
    task = config.task
    if not isinstance(task, HasSolutions):
        raise UserError(
            f"task {task.name!r} has no solutions to learn from; give it a method "
            "solutions(seed) that yields (question, solution)"
        )
    output = Path(config.output)
    with Lock(output / LOCK, output), interruptible():
        _sft(config, task, output)


def _sft(config: SftConfig, task: HasSolutions, output: Path) -> None:
    started = any((output / name).exists() for name in (LAST, BEFORE))
    unfinished = started and (output / "sft.json").exists()
    # A death while the model was written leaves both: it is written again.
    if (output / "config.json").exists() and not unfinished:
        raise UserError(f"output {config.output!r} already holds a model; choose another directory")
    if config.eval_problems and not config.task.is_graded:
        raise UserError(
            f"eval_problems is {config.eval_problems}, and nothing is graded in task "
            f"{config.task.name!r}; set eval_problems 0"
        )
    path = model_path(config.init) if config.init else ""
    tokenizer = tokenizer_of(path, config.task)
    encode_prompt(tokenizer, config.prompt, "?")  # what it refuses it refuses now
    _refuse_other(config, output, started, tokenizer)
    problems = list(islice(config.task.problems("validation"), config.eval_problems))
    if config.eval_problems and not problems:
        raise UserError(
            f"task {config.task.name!r} has no validation problems; set eval_problems 0"
        )
    if config.eval_problems and (warning := few(len(problems), "validation", config.eval_problems)):
        print(f"WARNING: {warning}", file=sys.stderr)
    last = whole_checkpoint(output)
    L.seed_everything(config.seed, verbose=False)
    if path:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    else:
        model = LlamaForCausalLM(llama_config(config, len(tokenizer)))
    # Measured on CPU at these lengths under bf16 autocast: 1.7 times as fast as fused attention.
    model.set_attn_implementation("eager")
    count = sum(p.numel() for p in model.parameters())
    print(
        f"policy of {count / 1e6:.2f}M parameters, {config.steps} steps of {config.batch} solutions"
    )
    start = 0
    if last is not None:
        start = torch.load(last, weights_only=True)["global_step"] // 2
        print(f"resuming at step {start}")
    module = SftModule(config, model)
    checkpoints = WholeCheckpoints()
    be_quiet()
    trainer = L.Trainer(
        # Lightning counts a step per optimiser.
        max_steps=config.steps * 2,
        precision=config.precision,
        accelerator="auto",
        devices=1,
        logger=False,
        plugins=[checkpoints],
        callbacks=[
            LightningProgress(config.steps),
            LastCheckpoint(output / LAST, CHECKPOINT_MINUTES, checkpoints),
        ],
        enable_checkpointing=False,  # Lightning's own would go into the working directory
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Solutions(task, tokenizer, config, start)
    try:
        trainer.fit(
            module,
            DataLoader(data, batch_size=None),
            ckpt_path=str(last) if start else None,
            weights_only=True,
        )
    except (Stopped, SystemExit):
        # The second is Lightning's answer to a signal while it starts.
        raise KeyboardInterrupt from None
    save_policy(model, tokenizer, output)
    for name in (LAST, BEFORE):
        (output / name).unlink(missing_ok=True)
    if config.eval_problems:
        right = accuracy(model, tokenizer, config, problems)
        print(f"right in a single sample: {right} of {len(problems)} validation problems")
    following = next_command(output, config.prompt, task_spec(config.task))
    print(f"policy: {output}\nnext: {following} --output runs/labels")


def tokenizer_of(path: str, task: Task) -> PreTrainedTokenizerBase:
    """That of the policy at ``path``; of a new one the task's own, else the tape's.

    A policy whose tokens are the first of the task's own learns the others.
    """
    found = load_tokenizer(path) if path else None
    if not isinstance(task, HasVocabulary):
        return tape_tokenizer() if found is None else found
    own = word_tokenizer(*task.vocabulary())
    if found is None:
        return own
    ids = list(range(len(found)))
    begins = own.convert_ids_to_tokens(ids) == found.convert_ids_to_tokens(ids)
    return own if begins else found


def next_command(output: Path, prompt: Prompt, task: dict[str, Any]) -> str:
    """The command that labels the policy's own solutions, without its output."""
    usual = asdict(Prompt())
    own = {k: v for k, v in asdict(prompt).items() if v != usual[k]}
    asked = "".join(
        f" --policy.prompt.{k} {shlex.quote(v if isinstance(v, str) else json.dumps(v))}"
        for k, v in own.items()
    )
    return (
        f"data_gen.rollouts --policy {shlex.quote(str(output))}{asked}"
        f"{task_option(task, always=True)}"
    )


def save_policy(model: Any, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write the policy; ``config.json``, by which it is known to be there, comes last."""
    building = output / ".policy.tmp"
    try:
        with writing(output):
            shutil.rmtree(building, ignore_errors=True)
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
            for file in sorted(building.iterdir(), key=lambda p: p.name == "config.json"):
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                file.replace(output / file.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Says in one line that a policy cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"output {str(output)!r} cannot be written ({reason}); free disk space or raise the "
            "quota there, then give the same command again"
        ) from error


def _refuse_other(
    config: SftConfig, output: Path, resuming: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write down what is trained; a run under another configuration is not resumed."""
    prompts = {"the policy": rendering(tokenizer, config.prompt)}
    settings = {k: v for k, v in asdict(config).items() if k not in ("from_traces", "rft")}
    settings |= {"task": task_spec(config.task), PROMPTS: prompts}
    plain = json.loads(json_text(settings))
    plain["prompt"]["chat"] = bool(config.prompt.chat)
    path = output / "sft.json"
    if not resuming or not path.exists():
        replace_file(path, json_text(plain))
        return
    found = read_object(path, "restore it, or choose another output")
    refuse_other(f"the unfinished run in {config.output!r}", found, plain)


def llama_config(config: SftConfig, vocabulary: int) -> LlamaConfig:
    """Architecture of a new policy."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.shape.hidden,
        intermediate_size=config.shape.mlp,
        num_hidden_layers=config.shape.layers,
        num_attention_heads=config.shape.heads,
        num_key_value_heads=config.shape.heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@torch.inference_mode()
def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    config: SftConfig,
    problems: list[Problem],
) -> Interval:
    """Share of ``problems`` that are right in one sample at temperature 1."""
    torch.manual_seed(config.seed)
    model.eval()
    graded: list[tuple[str, Problem]] = []
    for i in range(0, len(problems), 250):
        part = problems[i : i + 250]
        prompts = [encode_prompt(tokenizer, config.prompt, p.question) for p in part]
        width = max(map(len, prompts))
        pad = tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_length=config.max_length,
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        graded += zip(texts, part, strict=True)
    with guarded(config.task, Path(config.output) / GRADER_LOG, DEFAULT_TIMEOUT) as grader:
        right = [grader.grade(text, problem).correct for text, problem in graded]
    return bootstrap(np.array([right], dtype=float).T)
