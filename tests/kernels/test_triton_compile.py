"""Ahead-of-time compilation of a few kernels, and that the gate can fail. `make gate` compiles all of them."""

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
    """One warp on 64 x 256 fp32 tiles of the dechunk backward cannot keep them in registers."""
    bwd = aot.kernels()["dechunk_bwd_rows"]

    def greedy(D, dtype, gpu):
        constexprs, options = bwd.plan(D, dtype, gpu)
        return {**constexprs, "BLOCK": 64, "BLOCK_D": 256}, {**options, "num_warps": 1}

    monkeypatch.setattr(aot, "kernels", lambda: {"dechunk_bwd_rows": aot.Kernel(bwd.fn, bwd.args, greedy)})
    report = aot.compile_one(aot.Variant("dechunk_bwd_rows", "fp32", 256, "planned", target))
    assert report.spills > 0
    assert report.stack > 0
    assert not report.ok

    from hnet_kernels import info

    monkeypatch.setattr(aot, "compile_all", lambda: [report])
    monkeypatch.setattr(aot, "TARGETS", {target: aot.TARGETS[target]})
    assert info.compile_gate() == 1
    assert f"FAILED dechunk_bwd_rows fp32 256 planned {target}" in capsys.readouterr().out


def test_the_gate_fails_on_shared_memory(aot):
    fits = aot.Report(aot.Variant("k", "bf16", 256, "planned", "sm_80"), 32, 0, 0, 99 << 10, 99 << 10)
    assert fits.ok
    assert not fits._replace(shared=(99 << 10) + 1).ok
