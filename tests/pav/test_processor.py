"""Which CPUs are served, by what Linux says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pav.core.errors import UserError
from pav.engine import loading, processor
from pav.engine.processor import check_processor, flags_in, is_emulated, missing_features

# The lines that matter of a laptop (AVX2), a server (AVX-512 with bfloat16), an old one and an ARM.
LAPTOP = "flags\t\t: fpu sse4_2 avx f16c fma avx2\n"
SERVER = "flags\t\t: fpu avx f16c fma avx2 avx512f avx512_bf16 amx_bf16 avx512_fp16\n"
OLD = "flags\t\t: fpu sse4_2 avx f16c\n"
ARM = "Features\t: fp asimd asimdhp bf16\n"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "missing"),
    [
        (LAPTOP, "x86_64", []),
        (SERVER, "x86_64", []),
        (OLD, "x86_64", ["avx2", "fma"]),
        (ARM, "aarch64", []),
        ("", "x86_64", []),
    ],
)
def test_what_a_cpu_lacks_is_named(cpuinfo: str, machine: str, missing: list[str]) -> None:
    text = f"processor\t: 0\nmodel name\t: any\n{cpuinfo}bugs\t\t: avx2\n"
    assert missing_features(flags_in(text), machine) == missing


def test_engine_and_set_up_refuse_a_cpu_without_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processor, "cpu_flags", lambda: flags_in(OLD))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(UserError, match="this CPU lacks avx2, fma: vLLM's kernels need"):
        check_processor()
    with pytest.raises(UserError, match="lacks avx2"):
        loading.load("nowhere", "float32", 8, loading.EngineConfig())
    with pytest.raises(SystemExit, match="error: this CPU lacks avx2"):
        loading.main()


@pytest.mark.parametrize(
    ("cpuinfo", "emulated"),
    [(LAPTOP, {"bfloat16", "float16"}), (SERVER, set()), (ARM, set()), ("", set())],
)
def test_half_precision_is_emulated_where_the_cpu_does_not_know_it(
    cpuinfo: str, emulated: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "cpu_flags", lambda: flags_in(cpuinfo))
    assert {d for d in ("float32", "bfloat16", "float16") if is_emulated(d)} == emulated


def test_set_up_imports_no_build_of_the_kernels_by_name() -> None:
    """Each build is fatal on other CPUs; vLLM's platform knows which one is right."""
    files = [ROOT / "Makefile", ROOT / ".ci" / "run", *ROOT.glob("[bdps]*/**/*.py")]
    assert not [str(f) for f in files if "vllm._C" in f.read_text()]
