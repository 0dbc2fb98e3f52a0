"""A GPU that nobody may wait for, without a GPU: meta tensors, which have no numbers, taken for those of one, and a
mode that raises where the host would read a number of the device or where one would decide a shape."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hnet_kernels as hk
from hnet_kernels import dispatch

READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive", "_unique", "_unique2", "_assert_async"),
}


class HostRead(AssertionError):
    pass


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS:
            raise HostRead(f"{name} reads the device")
        if name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            raise HostRead("a boolean index reads the device")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostRead("repeat_interleave without output_size reads the device")
        on_gpu = any(isinstance(a, Tensor) and a.device.type == "meta" for a in tree_leaves((args, kwargs)))
        if name in ("_to_copy", "to") and on_gpu and torch.device(kwargs.get("device") or "meta").type == "cpu":
            raise HostRead("a copy to the host waits for the device")
        if name == "copy_" and args[0].device.type == "cpu" and args[1].device.type == "meta":
            raise HostRead("a copy to the host waits for the device")
        if func is torch.ops.aten._fused_adamw_.tensor_lr and on_gpu:
            return None  # has no fake; its kernel reads the rate on the device
        return func(*args, **kwargs)


@contextmanager
def pretended_gpu(monkeypatch):
    """Tensors on "meta" say that they are on a GPU, and our ops and attention take the way they take there. (Fake
    "cuda" tensors have no backward where PyTorch is built without CUDA.) There is no autocast: use a model in bf16."""
    why_not = dispatch.why_not
    with monkeypatch.context() as m, hk.backend("triton"):
        m.setattr(Tensor, "is_cuda", property(lambda x: x.device.type == "meta"), raising=False)
        m.setattr(Tensor, "pin_memory", lambda x: x)
        m.setattr(torch, "autocast", lambda *a, **k: nullcontext())
        m.setattr(torch, "is_autocast_enabled", lambda *a: False)
        m.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda p: None)
        m.setattr(dispatch, "why_not", lambda name, op, device, dtype: why_not(name, op, "cuda", dtype))
        yield
