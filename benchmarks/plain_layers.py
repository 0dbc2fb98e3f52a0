"""The layers of an H-Net in the fastest plain PyTorch we know, on a CPU: what add_rms_norm, gated_conv, swiglu and
attention are measured against, alone and in a whole training step. They take the arguments of the ops, whose place
they take there; `backend` changes nothing."""

import torch.nn.functional as F
from torch import Tensor

import hnet_kernels as hk
from hnet.model import attention as attention_module
from hnet.model.conv import _CausalConv
from hnet.model.pack import Pack


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    s = x.float() if residual is None else residual + x
    return F.rms_norm(s, (x.shape[1],), weight, eps).to(x.dtype), s


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """K shifted multiply-adds: a third of the time of conv1d"""
    u, gate = x.chunk(2, dim=1)
    return _CausalConv.apply(u, weight, bias, Pack(cu_seqlens, x.shape[0]).position) * F.silu(gate)


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    y, gate = x.chunk(2, dim=1)
    return F.silu(gate) * y


def attention(qkv: Tensor, pack: Pack, window: int, rotary_dim: int) -> Tensor:
    """scaled_dot_product_attention of blocks of the window, each against its own keys and the block's before"""
    qk = attention_module.rotate(qkv[:, :2], *pack.rotary(rotary_dim)) if rotary_dim else qkv[:, :2]
    return attention_module.attention(qk, qkv[:, 2], pack, window)


def use() -> None:
    """In every model of this process"""
    hk.add_rms_norm, hk.gated_conv, hk.swiglu = add_rms_norm, gated_conv, swiglu
    attention_module.fused = attention
