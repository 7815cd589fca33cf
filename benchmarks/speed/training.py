"""Training speed: ``OMP_NUM_THREADS=1 python -m benchmarks.speed.training``.

In one process, on the same random Llama, the same traces and batches, by turns:

``pav.train``
    full fine-tuning as ``pav.train`` does it: its loader, loss, Lightning loop and callbacks;
    from the start of the first batch to the end of the last one of an epoch.
``bare loop``
    forward, BCE, backward, clip, AdamW in plain PyTorch on batches that lie ready.
``per prefix``
    the bare loop with a sequence for every labelled prefix in place of one for every trace.

Seconds are those of the clock and those of the processor. With one thread on a CPU the ratio of the
latter is what an idle machine shows by the clock, also where other work shares the machine.
FLOPs are counted by torch (matrix products, forward and backward). Memory is the peak of the
process above what it held before (CPU), or of the allocator (GPU).
Writes ``benchmarks/results/speed_training.{json,csv,png}``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed.results import metric, result, write
from pav.cli.run import run
from pav.labels.examples import Example
from pav.train.batches import MAX_WASTE, LabelData, collate
from pav.train.checkpoints import LastCheckpoint, WholeCheckpoints
from pav.train.config import Precision, TrainConfig
from pav.train.fit import VerifierModule, prepare, trainer_of
from pav.train.progress import LightningProgress
from pav.verifier.forward import batches
from pav.verifier.trunk import HeadedTrunk

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.training"
VOCABULARY, HEADS = 256, 3


@dataclass(frozen=True)
class TrainingConfig:
    """Training speed.

    Args:
        hidden: hidden size of the Llama; its MLP is three times as wide.
        layers: its layers.
        traces: traces of an epoch.
        steps: steps of a trace, of ``step_tokens`` each; prompts have twice as many.
        step_tokens: tokens of a step, on average.
        tokens: padded tokens of a batch.
        turns: how often each way is measured.
        precision: of all ways, as Lightning calls it.
        gpu: run on a GPU.
    """

    hidden: int = 256
    layers: int = 6
    traces: int = 192
    steps: int = 8
    step_tokens: int = 8
    tokens: int = 2048
    turns: int = 3
    precision: Precision = "32-true"
    gpu: bool = False


@dataclass
class Speed:
    """What one way worked through, summed over its turns (labels are the same for all ways)."""

    tokens: int = 0
    flops: float = 0.0
    clock: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    turns: list[tuple[float, float]] = field(default_factory=list)

    def add(self, clock: float, cpu: float) -> None:
        """Seconds of one turn."""
        self.turns.append((clock, cpu))
        self.clock, self.cpu = self.clock + clock, self.cpu + cpu


class Watch(L.Callback):
    """Times a Lightning epoch from its first batch to its last."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = _now()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = tuple(b - a for a, b in zip(self.start, _now(), strict=True))


class Peak:
    """Peak memory of a block, above what was held before it."""

    def __init__(self, gpu: bool) -> None:
        self.gpu, self.bytes = gpu, 0

    def __enter__(self) -> Peak:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return self
        self.process, self.running = psutil.Process(), True
        self.base = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, self.process.memory_info().rss - self.base)
            time.sleep(0.005)

    def __exit__(self, *_: Any) -> None:
        if self.gpu:
            self.bytes = torch.cuda.max_memory_allocated() - self.base
            return
        self.running = False
        self.thread.join()


def training(config: TrainingConfig) -> None:
    """Measure and write (see the module)."""
    examples = traces(config)
    prefixes = [p for e in examples for p in per_prefix(e)]
    weight_2H = np.ones((2, HEADS), dtype=np.float32)
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "pav.train": lambda: lightning_epoch(config, examples, weight_2H),
        "bare loop": lambda: bare_epoch(config, examples),
        "per prefix": lambda: bare_epoch(config, prefixes),
    }
    data = {"pav.train": examples, "bare loop": examples, "per prefix": prefixes}
    speeds = {way: Speed() for way in ways}
    for way, work in ways.items():
        work()  # warms up
        speeds[way].tokens = config.turns * sum(len(e.ids) for e in data[way])
        speeds[way].flops = config.turns * flops(config, data[way])
    # One after the other in every turn, so that what else the machine does hits all alike.
    for _ in range(config.turns):
        for way, work in ways.items():
            with Peak(config.gpu) as peak:
                speeds[way].add(*work())
            speeds[way].peak = max(speeds[way].peak, peak.bytes)
            print(f"{way}: {speeds[way].turns[-1][0]:.2f} s, {speeds[way].turns[-1][1]:.2f} s cpu")
    rows = [
        {"way": way, "tokens": s.tokens, "tflop": round(s.flops / 1e12, 4),
         "seconds": round(s.clock, 2), "cpu_seconds": round(s.cpu, 2),
         "tokens_per_second": round(s.tokens / s.clock), "peak_mib": round(s.peak / 2**20, 1),
         "gflops": round(s.flops / s.clock / 1e9, 2)}
        for way, s in speeds.items()
    ]  # fmt: skip
    for row in rows:
        print(row)
    write("training", _metrics(config, speeds), rows, [0], config.traces, COMMAND)
    _plot(rows, result("training", "png"))


def traces(config: TrainingConfig) -> list[Example]:
    """Random traces with a label for every head after every step."""
    rng = Random(0)
    out = []
    for number in range(config.traces):
        lengths = [rng.randint(2, 2 * config.step_tokens - 2) for _ in range(config.steps)]
        prompt = 2 * config.step_tokens
        ends = np.cumsum(lengths).tolist()
        ids = [rng.randrange(3, VOCABULARY) for _ in range(prompt + ends[-1])]
        positions = np.array([prompt - 1, *(prompt + end - 2 for end in ends)])
        shape = (len(positions), HEADS)
        k = np.array([[rng.randrange(2) for _ in range(HEADS)] for _ in positions], np.float32)
        ones = np.ones(shape, np.float32)
        out.append(Example(str(number), ids, prompt, ends, positions, k, ones, ones[:, :1]))
    return out


def per_prefix(example: Example) -> list[Example]:
    """The same labels, each on a sequence of its own."""
    out = []
    for p, position in enumerate(example.positions_P.tolist()):
        labels = (a[p : p + 1] for a in (example.k_PH, example.n_PH, example.share_P1))
        ids = example.ids[: position + 1]
        out.append(Example("", ids, 1, [], example.positions_P[p : p + 1], *labels))
    return out


def new_model(config: TrainingConfig) -> HeadedTrunk:
    """The same random model every time."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=config.hidden, intermediate_size=3 * config.hidden,
        num_hidden_layers=config.layers, num_attention_heads=config.hidden // 32,
        num_key_value_heads=config.hidden // 32, max_position_embeddings=4096,
    )  # fmt: skip
    model = HeadedTrunk(LlamaForCausalLM(shape), HEADS)
    return model.cuda() if config.gpu else model


def lightning_epoch(
    config: TrainingConfig, examples: list[Example], weight_2H: np.ndarray
) -> tuple[float, float]:
    """Seconds (clock, processor) of an epoch of ``pav.train``."""
    with TemporaryDirectory() as directory:
        settings = TrainConfig(
            [], str(Path(directory) / "pav.ckpt"), trunk_mode="full", max_epochs=1,
            tokens_per_batch=config.tokens, accelerator="gpu" if config.gpu else "cpu",
            precision=config.precision,
        )  # fmt: skip
        model = new_model(config)
        prepare(settings, model)
        data = LabelData(model, examples, examples[:1], None, False, 0, weight_2H, config.tokens)  # type: ignore[arg-type]
        watch = Watch()
        checkpoints = WholeCheckpoints()
        callbacks = [
            LastCheckpoint(Path(directory) / "last.ckpt", 60, checkpoints),
            LightningProgress(10**9), watch,
            # Lightning's own would write to the working directory.
            ModelCheckpoint(directory),
        ]  # fmt: skip
        trainer = trainer_of(settings, callbacks, checkpoints)
        trainer.limit_val_batches = 0
        trainer.fit(VerifierModule(model, weight_2H, settings, 10**6), datamodule=data)
    return watch.seconds  # type: ignore[return-value]


def ready(config: TrainingConfig, examples: list[Example]) -> list[Any]:
    """The batches of the first epoch of ``pav.train``, on the device."""
    device = "cuda" if config.gpu else "cpu"
    parts = batches(examples, 0, config.tokens, MAX_WASTE)
    return [type(b)(*(t.to(device) for t in b)) for b in (collate(p, HEADS) for p in parts)]


def bare_epoch(config: TrainingConfig, examples: list[Example]) -> tuple[float, float]:
    """Seconds (clock, processor) of an epoch in plain PyTorch."""
    model = new_model(config).train()
    model.trunk.get_output_embeddings().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, fused=True if config.gpu else None)
    parts = ready(config, examples)
    start = _now()
    for batch in parts:
        optimizer.zero_grad()
        _loss(config, model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return tuple(b - a for a, b in zip(start, _now(), strict=True))  # type: ignore[return-value]


def _loss(config: TrainingConfig, model: HeadedTrunk, batch: Any) -> Tensor:
    with _autocast(config):
        logits = model(batch.ids_BT, batch.row_N, batch.column_N)
    return binary_cross_entropy_with_logits(logits.float(), batch.k_NH)


def _autocast(config: TrainingConfig) -> AbstractContextManager[None]:
    device = "cuda" if config.gpu else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16-mixed")


def flops(config: TrainingConfig, examples: list[Example]) -> float:
    """Floating-point operations of an epoch."""
    model = new_model(config).train()
    model.trunk.get_output_embeddings().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        for batch in ready(config, examples):
            _loss(config, model, batch).backward()
    return float(counter.get_total_flops())


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _metrics(config: TrainingConfig, speeds: dict[str, Speed]) -> list[dict[str, Any]]:
    ours, bare, prefix = (speeds[way] for way in ("pav.train", "bare loop", "per prefix"))
    model = f"Llama of {config.layers} layers x {config.hidden}, {config.precision}"
    depth = config.steps + 1
    out = []
    for i, by in enumerate(("clock", "processor")):
        ratios = [b[i] / o[i] for o, b in zip(ours.turns, bare.turns, strict=True)]
        out.append(
            metric(f"pav.train over a bare PyTorch loop, tokens/s and FLOP/s, by the {by} "
                   f"(median of {config.turns} turns; {model})", float(np.median(ratios)),
                   (">=", 0.9))
        )  # fmt: skip
    out += [
        metric("one pass per prefix over one per trace, processor seconds "
               f"({depth} labelled prefixes a trace)", prefix.cpu / bare.cpu,
               (">=", (config.steps + 1) / 2)),
        metric("one pass per prefix over one per trace, FLOPs", prefix.flops / bare.flops),
        metric("one pass per prefix over one per trace, tokens", prefix.tokens / bare.tokens),
        metric(f"pav.train, tokens/s by the clock ({model})", ours.tokens / ours.clock),
        metric(f"bare loop, tokens/s by the clock ({model})", bare.tokens / bare.clock),
        metric(f"pav.train, GFLOP/s by the clock ({model})", ours.flops / ours.clock / 1e9),
        metric(f"bare loop, GFLOP/s by the clock ({model})", bare.flops / bare.clock / 1e9),
        metric("pav.train, peak memory above the start, MiB", ours.peak / 2**20),
        metric("bare loop, peak memory above the start, MiB", bare.peak / 2**20),
    ]  # fmt: skip
    return out


def _plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar([row["way"] for row in rows], [row["cpu_seconds"] for row in rows])
    axes.set_ylabel("processor seconds for the same labels")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(training, TrainingConfig, "benchmarks.speed.training")
