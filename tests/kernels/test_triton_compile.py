"""Ahead-of-time compilation of a few kernels, and that the gate can fail. `make gate` compiles all of them."""

import dataclasses
import importlib

import pytest
import torch

from hnet_kernels.dispatch import triton_error

from .cases import INTERPRETED

pytestmark = pytest.mark.skipif(
    triton_error() is not None or INTERPRETED, reason=triton_error() or "interpreted kernels do not compile"
)


@pytest.fixture
def aot():
    return importlib.import_module("hnet_kernels.triton.aot")


def defined_kernels(aot):
    for file in aot.FILES:
        module = importlib.import_module(f"hnet_kernels.triton.{file}")
        for value in vars(module).values():
            for kernel in value.values() if isinstance(value, dict) else [value]:
                if isinstance(kernel, aot.Kernel):
                    yield kernel


def test_the_gate_knows_every_kernel_and_its_arguments(aot):
    known = aot.kernels()
    assert len(known) >= 25
    assert all(any(k is kernel for k in known.values()) for kernel in defined_kernels(aot))
    for name, kernel in known.items():
        for target in aot.TARGETS:
            constexprs, _ = kernel.plan(1536, torch.bfloat16, target)
            assert [*kernel.args] == kernel.fn.arg_names[: len(kernel.args)], name
            assert {*constexprs} == {*kernel.fn.arg_names[len(kernel.args) :]}, name


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("name", ["route_bwd", "pool_mean_bwd", "ratio_loss_sequence"])
def test_compiles_without_spills(aot, name, target):
    report = aot.compile_one(aot.Variant(name, "bf16", 256, "planned", target))
    assert report.ok, report
    assert 0 < report.registers <= 255
    assert (report.spills, report.stack) == (0, 0)


@pytest.mark.parametrize("name", ["route_step", "dechunk_fwd", "ema_tile"])
def test_strides_of_one_compile(aot, name):
    """Triton turns arguments equal to 1 into constants, which have no tensor methods."""
    assert aot.compile_one(aot.Variant(name, "bf16", 1, "ones", "sm_90")).ok


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_gate_fails_on_a_spill(aot, target, monkeypatch, capsys):
    """One warp on 32 x 256 fp32 tiles of the dechunk backward cannot keep them in registers."""
    bwd = aot.kernels()["dechunk_bwd_rows"]

    def greedy(D, dtype, gpu):
        constexprs, options = bwd.plan(D, dtype, gpu)
        return {**constexprs, "BLOCK": 32, "BLOCK_D": 256}, {**options, "num_warps": 1}

    monkeypatch.setattr(aot, "kernels", lambda: {"dechunk_bwd_rows": aot.Kernel(bwd.fn, bwd.args, greedy)})
    report = aot.compile_one(aot.Variant("dechunk_bwd_rows", "fp32", 256, "planned", target))
    assert report.spills > 0
    assert report.stack > 0 or target == "gfx942"  # which spills into other registers first
    assert report.problems[0] == f"{report.spills} spilled"

    from hnet_kernels import info

    monkeypatch.setattr(aot, "compile_all", lambda: [report])
    monkeypatch.setattr(aot, "TARGETS", {target: aot.TARGETS[target]})
    assert info.compile_gate() == 1
    assert f"FAILED dechunk_bwd_rows fp32 256 planned {target}" in capsys.readouterr().out


def test_the_gate_fails_on_shared_memory(aot):
    fits = aot.Report(aot.Variant("pool_mean_fwd", "bf16", 256, "planned", "sm_80"), 32, 0, 0, 99 << 10, 16)
    assert fits.ok
    assert not fits._replace(shared=(99 << 10) + 1).ok


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "resident"),
    [
        ("sm_90", 32, 4, 0, 64),
        ("sm_90", 33, 4, 0, 48),  # registers go by eights: 40 x 32 x 12 of 16384
        ("sm_90", 128, 4, 0, 16),
        ("sm_90", 168, 4, 0, 12),
        ("sm_90", 244, 8, 49152, 8),
        ("sm_90", 32, 4, 75 << 10, 12),  # shared memory: three blocks
        ("sm_90", 16, 1, 0, 32),  # blocks
        ("sm_120", 32, 4, 0, 48),
        ("sm_120", 40, 8, 90 << 10, 8),
        ("gfx942", 64, 4, 0, 32),
        ("gfx942", 128, 4, 0, 16),
        ("gfx942", 300, 4, 0, 4),
        ("gfx942", 64, 4, 32 << 10, 8),
    ],
)
def test_resident_warps(aot, target, registers, warps, shared, resident):
    """By hand from the vendors' tables of a multiprocessor (a compute unit)."""
    assert aot.TARGETS[target].resident(registers, warps, shared) == resident


def test_the_gate_fails_on_few_warps_without_a_reason(aot, monkeypatch):
    enough = aot.Report(aot.Variant("pool_mean_fwd", "bf16", 256, "planned", "sm_90"), 128, 0, 0, 0, 16)
    few = enough._replace(resident=12)
    assert enough.ok
    assert few.problems == ["12 of 64 warps, and the kernel does not say why that is enough"]
    with_reason = dataclasses.replace(aot.kernels()["pool_mean_fwd"], few_warps="a reason")
    monkeypatch.setattr(aot, "kernels", lambda: {"pool_mean_fwd": with_reason})
    assert few.ok
    assert "few warps in pool_mean_fwd: a reason" in aot.table([few])


def test_registers_moved_on_amd_need_a_reason_and_no_memory(aot, monkeypatch):
    kernel = aot.kernels()["pool_mean_fwd"]
    moved = aot.Report(aot.Variant("pool_mean_fwd", "bf16", 256, "planned", "gfx942"), 64, 40, 0, 0, 16)
    assert moved.problems == ["40 spilled"]
    monkeypatch.setattr(aot, "kernels", lambda: {"pool_mean_fwd": dataclasses.replace(kernel, moved="a reason")})
    assert moved.ok
    assert "registers moved in pool_mean_fwd (AMD): a reason" in aot.table([moved])
    assert not moved._replace(stack=4).ok
    assert not moved._replace(variant=moved.variant._replace(target="sm_90")).ok


def test_the_gate_compiles_again_only_what_has_changed(aot, monkeypatch, tmp_path):
    compiled = []

    class Inline:
        def __init__(self, processes):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def map(self, f, jobs, chunksize):
            compiled.append(len(jobs))
            return [aot.Report(v, 32, 0, 0, 0, 64) for v in jobs]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(aot, "ProcessPoolExecutor", Inline)
    names = ("ratio_loss_batch", "pool_mean_fwd")
    first = aot.compile_all(names)
    assert aot.compile_all(names) == first
    assert compiled == [len(first), 0]
    with monkeypatch.context() as other:
        other.setattr(aot.triton, "__version__", "0.0.0")
        aot.compile_all(names[:1])
    assert compiled[2] == sum(r.variant.kernel == names[0] for r in first)
    one = next(tmp_path.glob("hnet-kernels/gate-pool_mean_fwd-*.json"))
    one.unlink()
    assert aot.compile_all(names) == first
    assert compiled[3] == sum(r.variant.kernel == names[1] for r in first)


def test_the_gate_under_another_triton(tmp_path, capsys):
    from hnet_kernels import info

    assert info.compile_gate_under(str(tmp_path)) == 2
    assert f"pip install --no-deps --target {tmp_path} triton==VERSION" in capsys.readouterr().out
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise SystemExit(5)")
    assert info.compile_gate_under(str(tmp_path)) == 5
