"""Whether a call is plain eager PyTorch, which may go straight to its kernels.

Through `torch.ops` an op can be compiled, traced, faked, transformed, counted and profiled, for about 28 us of host
time a call: more than all kernels of a short pack take. Where nobody is looking the answer is the same without, so
`library` asks here first. All that this file knows of is what PyTorch's dispatcher would have acted on: whatever it
cannot rule out goes through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_C: Any = torch._C
_CONSTANTS = {type(None), bool, int, float, str, torch.dtype}
_keys = _C._dispatch_keys

# What an ordinary tensor asks of the dispatcher. With any other key it is not what its memory says, or not ours to
# read: a negation is pending, zeros were never written, a transform or a tracer wraps it.
_ORDINARY = 0
for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView"):
    _ORDINARY |= _C.DispatchKeySet(getattr(_C.DispatchKey, _key)).raw_repr()
_SPECIAL = ~_ORDINARY


def observed() -> bool:
    """Whether a compiler, tracer, mode, transform or profiler is at work."""
    return bool(
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or _C._autograd._profiler_enabled()
    )


def plain(args: Iterable[Any]) -> bool:
    """Whether these arguments, now, give through the dispatcher what the kernels alone give."""
    if observed():
        return False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if _keys(x).raw_repr() & _SPECIAL:
                return False
        elif kind not in _CONSTANTS:
            return False
    return True
