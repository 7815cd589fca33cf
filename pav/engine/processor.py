"""What the CPU must have: vLLM's kernels for it, and arithmetic in half precision."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from pav.core.errors import UserError

# What vLLM's least demanding build for x86 is compiled for.
NEEDED = ("avx2", "fma", "f16c")
# Any of these computes in the dtype; else every product is converted there and back.
NATIVE = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


@cache
def cpu_flags() -> frozenset[str]:
    """Features of this machine's CPU as Linux names them; empty where it does not say."""
    return flags_in(_read_cpuinfo())


def _read_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def flags_in(cpuinfo: str) -> frozenset[str]:
    """Features of the first CPU in the text of ``/proc/cpuinfo``."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # of x86, of ARM
            return frozenset(value.split())
    return frozenset()


def missing_features(flags: frozenset[str], machine: str) -> list[str]:
    """What vLLM's kernels need and a CPU with ``flags`` lacks; empty where that is unknown."""
    if machine not in ("x86_64", "AMD64") or not flags:
        return []
    return [name for name in NEEDED if name not in flags]


def is_emulated(dtype: str) -> bool:
    """Whether this CPU has no arithmetic in ``dtype``."""
    return bool(cpu_flags()) and dtype in NATIVE and not NATIVE[dtype] & cpu_flags()


def check_processor() -> None:
    """Refuse a CPU for which vLLM has no kernels: they would end the process without a word.

    Raises:
        UserError: naming what the CPU lacks.
    """
    missing = missing_features(cpu_flags(), platform.machine())
    if missing:
        raise UserError(
            f"this CPU lacks {', '.join(missing)}: vLLM's kernels need "
            f"{', '.join(NEEDED)} (Intel since Haswell, AMD since Zen); use another machine"
        )
