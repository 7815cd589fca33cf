"""Export a verifier as a model directory that stock vLLM serves: heads become score tokens.

Heads are rows appended to the output embedding, followed by one all-zero reference row. Adapters
are merged into the weights they adapt. Untouched shards of a large trunk are linked, not copied.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pav.core.errors import UserError
from pav.core.files import json_text, whole_directory
from pav.engine.vllm import SCORE_BIAS
from pav.engine.weights import INPUT, OUTPUT
from pav.export.card import write_card
from pav.policy.inference import SCORE_SCALE
from pav.verifier.checkpoint import Verifier
from pav.verifier.lora import adapted, merged
from pav.verifier.trunk import refuse_unservable

STAMP = "pav.json"
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "added_tokens.json",
)


def export_directory(verifier: Verifier) -> Path:
    """Where the export of a checkpoint lies: beside it, or in the cache for shipped ones."""
    beside = verifier.path.with_suffix(".export")
    if os.access(verifier.path.parent, os.W_OK) and "assets" not in verifier.path.parts:
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "pav-engine" / f"{verifier.path.stem}-{verifier.digest}"


def ensure_export(verifier: Verifier, trunk: str) -> tuple[Path, list[int]]:
    """Directory and score ids (heads, then reference row); built when missing or stale.

    Raises:
        UserError: if vLLM cannot serve the verifier, or the export cannot be written.
    """
    directory = export_directory(verifier)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Two searches that start side by side must not build the same directory at once.
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            # What is damaged is built again.
            found: dict[str, Any] = json.loads((directory / STAMP).read_bytes())
            if found["checkpoint"] == verifier.digest:
                return directory, found["score_ids"]
        try:
            return directory, export_verifier(verifier, trunk, directory)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the export of {str(verifier.path)!r} cannot be written to {str(directory)!r} "
                f"({getattr(error, 'strerror', None) or error}); the verifier itself is safe: free "
                "disk space there, and the first search builds the export"
            ) from error


def export_verifier(verifier: Verifier, trunk: str, directory: Path) -> list[int]:
    """Write trunk and score rows to ``directory``; returns the score ids."""
    source = Path(trunk)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(trunk))
    config = json.loads((source / "config.json").read_text())
    refuse_unservable(_as_config(config))
    rows = torch.cat([verifier.weight / SCORE_SCALE, torch.zeros_like(verifier.weight[:1])])
    with whole_directory(directory) as building:
        if verifier.trunk_state is not None:
            _grow_and_save("model.safetensors", dict(verifier.trunk_state), rows, config, building)
        else:
            _copy_trunk(source, rows, config, building, verifier)
        # No code of its own, and no word of any: nothing to be talked into trusting.
        config.pop("auto_map", None)
        vocabulary = config["vocab_size"]
        score_ids = list(range(vocabulary, vocabulary + len(rows)))
        config["vocab_size"] = vocabulary + len(rows)
        (building / "config.json").write_text(json_text(config))
        for pattern in _CARRIED:
            for file in source.glob(pattern):
                shutil.copy2(file, building / file.name)
        tokenizer = building / "tokenizer_config.json"
        if tokenizer.exists() and "auto_map" in (plain := json.loads(tokenizer.read_text())):
            del plain["auto_map"]
            tokenizer.write_text(json_text(plain))
        generation = building / "generation_config.json"
        settings = json.loads(generation.read_text()) if generation.exists() else {}
        settings["suppress_tokens"] = [*(settings.get("suppress_tokens") or []), *score_ids]
        generation.write_text(json_text(settings))
        stamp = {
            "checkpoint": verifier.digest,
            "heads": verifier.card.heads,
            "score_ids": score_ids,
            "scale": SCORE_SCALE,
            "bias": verifier.bias.tolist(),
        }
        (building / STAMP).write_text(json_text(stamp))
        write_card(building, verifier.card, _readme(stamp), "text-generation")
        shutil.rmtree(directory, ignore_errors=True)
    return score_ids


def _as_config(plain: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**plain)


def _copy_trunk(
    source: Path, rows: Tensor, config: dict[str, Any], target: Path, verifier: Verifier
) -> None:
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"trunk {str(source)!r} holds no *.safetensors; save it with save_pretrained first"
        )
    adapters = verifier.adapters or {}
    layers = {f"{name}.weight": name for name in adapted(adapters)}
    index = source / "model.safetensors.index.json"
    touched = {file.name for file in files}
    if index.exists():
        where = json.loads(index.read_text())["weight_map"]
        touched = {where[name] for name in (INPUT, OUTPUT, *layers) if name in where}
        shutil.copy2(index, target / index.name)
    for file in files:
        if file.name not in touched:
            (target / file.name).symlink_to(file.resolve())
            continue
        try:
            shard = load_file(file)
        except SafetensorError as error:
            raise UserError(
                f"the trunk's weights {str(file)!r} are damaged ({error}); restore them"
            ) from error
        for key in shard.keys() & layers.keys():
            merge = merged(shard[key], adapters, layers.pop(key), verifier.card.lora)
            # What is served in float32 was calibrated in float32.
            shard[key] = merge if verifier.card.dtype == "float32" else merge.to(shard[key].dtype)
        _grow_and_save(file.name, shard, rows, config, target)
    if layers:
        raise UserError(
            f"trunk {str(source)!r} holds no {min(layers)!r}, which an adapter of "
            f"{str(verifier.path)!r} changes; save the trunk with this version of transformers"
        )


def _grow_and_save(
    name: str, shard: dict[str, Tensor], rows: Tensor, config: dict[str, Any], target: Path
) -> None:
    tied = bool(_as_config(config).tie_word_embeddings)
    if INPUT in shard:
        # Score ids are never inputs; the input matrix only has to have as many rows.
        shard[INPUT] = _grown(shard[INPUT], rows if tied else torch.zeros_like(rows))
    if OUTPUT in shard:
        if tied:
            del shard[OUTPUT]
        else:
            shard[OUTPUT] = _grown(shard[OUTPUT], rows)
    save_file(
        {k: v.contiguous() for k, v in shard.items()}, target / name, metadata={"format": "pt"}
    )


def _grown(matrix: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([matrix, rows.to(matrix.dtype)])


def _readme(stamp: dict[str, Any]) -> str:
    bias = json_text({str(i): SCORE_BIAS for i in stamp["score_ids"]}, None)
    return (
        "A verifier exported by pav-engine. Ids "
        f"{stamp['score_ids'][0]} to {stamp['score_ids'][-1]} are score tokens (heads "
        f"{', '.join(stamp['heads'])}, then an all-zero reference row) and must never be sampled:\n"
        "transformers obeys `suppress_tokens` in generation_config.json; with vLLM pass\n\n"
        f"    logit_bias={bias}\n"
    )
