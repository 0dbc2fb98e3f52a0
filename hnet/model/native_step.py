"""A decoding step on a CPU in one call of the extension (csrc/cpu/step.cpp): no dispatch between two layers.

A `Describer` walks a model and its cache once and gives C++ the addresses of parameters and state, which it reads and
writes where they lie: weights changed in place are seen. When a tensor has become another one (a cache grew, weights
were loaded or cast) all is described again. What C++ has no code for (a module that is not of ours, hooks, tensors of
a special kind) steps as before, layer by layer, and so does everything under `hk.backend("reference")`, autocast,
profilers, tracers and modes. Modules and hooks put in after a cache's first step are seen by a new cache.

All between the bytes and the logits is fp32, whatever the weights are; keys, values and other state have the dtype they
have in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hnet_kernels import dispatch, eager

from .attention import CausalAttention
from .cache import AttentionCache, ConvCache, HNetCache, LayerCache, MambaCache, RouteCache, StageCache
from .conv import DepthwiseConv1d, GatedConv
from .hnet import HNet, RoutingModule
from .int8 import Int8Linear
from .isotropic import Block, Isotropic
from .mamba2 import GatedRMSNorm, Mamba2
from .mlp import SwiGLU
from .ngrams import NgramEmbeddings
from .norm import RMSNorm
from .pack import inverse_frequencies

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8 = 3
BOUNDARIES = {"any": 0, "char-start": 1, "char-end": 2}


class NotNative(Exception):
    """The extension has no code for something in the model."""


class NativeStep:
    """The step of one model with one cache. `usable` before every `__call__`."""

    def __init__(self, model: Any, cache: HNetCache) -> None:
        self.model, self.cache = model, cache
        self.described: Any = None  # _C.StepModel
        self.places: list[tuple[dict[str, Any], str]] = []  # where the tensors it knows hang
        self.storages: list[Any] = []  # of these: not freed, so that no other tensor has their addresses
        self.addresses: list[int] = []
        self.biases: list[Tensor | None] = []
        self.refused = False

    def usable(self) -> bool:
        """Whether this step can be taken in C++; looks for tensors that have been replaced."""
        if self.refused or dispatch.in_force() not in ("auto", "cpu") or eager.observed():
            return False
        if torch.is_autocast_enabled("cpu") or dispatch.native_error() is not None:
            return False
        if self.described is None or not self._unchanged():
            try:
                self._describe()
            except NotNative:
                self.refused = True
        return not self.refused

    def _unchanged(self) -> bool:
        """The tensors are those that were described, where they were."""
        if any(now is not old for now, old in zip(_biases(self.model), self.biases, strict=True)):
            return False
        return [owner[name].data_ptr() for owner, name in self.places] == self.addresses

    def _describe(self) -> None:
        from hnet_kernels import _C

        d = Describer()
        description = d.model(self.model, self.cache)
        tensors = [owner[name] for owner, name in d.places]
        self.places, self.addresses = d.places, [x.data_ptr() for x in tensors]
        self.storages, self.biases = [x.untyped_storage() for x in tensors] + d.made, _biases(self.model)
        self.described = _C.StepModel(description)

    def __call__(self, ids: Tensor, named: list[int]) -> tuple[Tensor, list[Tensor]]:
        """As `HNetForCausalLM.step`."""
        n, stages = len(named), list(self.cache.root.stages())
        ids, slots = ids.contiguous(), torch.tensor(named, dtype=torch.int64)
        head = self.model.lm_head
        logits = torch.empty(n, head.out_features, dtype=self.model.embeddings.weight.dtype)
        masks = torch.empty(max(len(stages) - 1, 1), n, dtype=torch.bool)
        self.described.step(
            ids.data_ptr(), slots.data_ptr(), n, logits.data_ptr(), masks.data_ptr(), torch.get_num_threads()
        )
        ran = []
        for stage, row in zip(stages, [*masks, None], strict=False):
            stage.advanced(named)
            if stage.inner is None:
                break
            mask = row[: len(named)]
            ran.append(mask)
            named = [s for s, fired in zip(named, mask.tolist(), strict=True) if fired]
            if not named:
                break
        return logits, ran


def _biases(model: Any) -> list[Tensor | None]:
    """The logit biases, which may become tensors or be tensors no more."""
    return [stage.logit_bias for stage in model.stages() if not stage.innermost]


class Describer:
    """Nested tuples of addresses and sizes, in the order in which csrc/step_bindings.cpp reads them."""

    def __init__(self) -> None:
        self.places: list[tuple[dict[str, Any], str]] = []
        self.made: list[Any] = []

    # --- tensors ------------------------------------------------------------------------------------------------------

    def address(
        self, owner: dict[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> int:
        """Of the tensor at owner[name], which must be what the extension reads: dense, of this shape."""
        x = owner[name]
        ordinary = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.is_contiguous()
        if not ordinary or not eager.plain((x,)) or tuple(x.shape) != shape or x.dtype != (dtype or x.dtype):
            raise NotNative(name)
        self.places.append((owner, name))
        return x.data_ptr()

    def floats(self, owner: dict[str, Any], name: str, *shape: int) -> tuple[int, int]:
        address = self.address(owner, name, shape)
        if owner[name].dtype not in DTYPES:
            raise NotNative(name)
        return address, DTYPES[owner[name].dtype]

    def parameter(self, module: nn.Module, name: str, *shape: int) -> tuple[int, int]:
        return self.floats(module._parameters, name, *shape)

    # --- parts --------------------------------------------------------------------------------------------------------

    def linear(self, m: Any) -> tuple:
        shape = m.out_features, m.in_features
        bias = None if m.bias is None else self.parameter(m, "bias", m.out_features)
        if type(m) is Int8Linear:
            own(m, Int8Linear)
            weight = self.address(m._buffers, "int8", shape, torch.int8), INT8
            scale = self.address(m._buffers, "scale", (m.out_features, 1), torch.float32)
            return (*weight, scale, bias, *shape)
        own(m, nn.Linear)
        return (*self.parameter(m, "weight", *shape), 0, bias, *shape)

    def norm(self, m: Any, D: int) -> tuple:
        own(m, RMSNorm)
        return (self.parameter(m, "weight", D), m.eps)

    def conv(self, m: Any, D: int, tail: dict[str, Any]) -> tuple:
        own(m, DepthwiseConv1d)
        K, slots = m.kernel_size, tail["tail"].shape[0]
        taps, bias = self.parameter(m, "weight", D, 1, K), self.parameter(m, "bias", D)
        return (taps, bias, D, K, *self.floats(tail, "tail", slots, K - 1, D))

    def mixer(self, m: Any, D: int, cache: LayerCache) -> tuple[str, tuple]:
        state = vars(cache)
        if type(m) is GatedConv and isinstance(cache, ConvCache):
            own(m, GatedConv)
            return "c", (self.linear(m.in_proj), self.linear(m.out_proj), self.conv(m.conv1d, D, state))
        if type(m) is CausalAttention and isinstance(cache, AttentionCache):
            own(m, CausalAttention)
            shape, half, frequencies = tuple(cache.k.shape), m.rotary_dim // 2, 0
            if half:
                self.made.append(inverse_frequencies(m.rotary_dim))
                frequencies = self.made[-1].data_ptr()
            k, v = self.floats(state, "k", *shape), self.floats(state, "v", *shape)
            projections = self.linear(m.Wqkv), self.linear(m.out_proj)
            return "t", (*projections, m.num_heads, m.head_dim, half, frequencies, k[0], *v, cache.capacity)
        if type(m) is Mamba2 and isinstance(cache, MambaCache):
            own(m, Mamba2)
            own(m.norm, GatedRMSNorm)
            H, (slots, heads, P, S) = m.nheads, cache.ssm.shape
            heads_of = [self.parameter(m, name, H) for name in ("dt_bias", "A_log", "D")]
            norm = self.parameter(m.norm, "weight", m.d_inner)
            ssm = self.address(state, "ssm", (slots, heads, P, S), torch.float32)
            conv = self.conv(m.conv1d, m.d_inner + 2 * S, state)
            return "m", (
                heads, P, S, self.linear(m.in_proj), self.linear(m.out_proj), conv, *heads_of, norm, m.norm.eps, ssm,
            )  # fmt: skip
        raise NotNative(type(m).__name__)

    def layer(self, m: Any, D: int, cache: LayerCache) -> tuple:
        own(m, Block)
        mlp = None
        if m.mlp is not None and m.norm2 is not None:
            own(m.mlp, SwiGLU)
            mlp = (self.norm(m.norm2, D), self.linear(m.mlp.fc2), self.linear(m.mlp.fc1))
        return (self.norm(m.norm1, D), *self.mixer(m.mixer, D, cache), mlp)

    def stack(self, m: Any, D: int, caches: list[LayerCache]) -> tuple:
        own(m, Isotropic)
        layers = tuple(self.layer(layer, D, cache) for layer, cache in zip(m.layers, caches, strict=True))
        return (layers, self.norm(m.rmsnorm, D))

    def stage(self, m: Any, cache: StageCache) -> tuple:
        own(m, HNet)
        slots, first = cache.length.shape[0], m.main_network if m.innermost else m.encoder
        D = first.rmsnorm.weight.shape[0]
        pad = None
        if m.pad_dimension is not None:
            pad = self.parameter(m, "pad_dimension", m.pad_dimension.shape[0])
        length = self.address(vars(cache), "length", (slots,), torch.int64)
        stack = self.stack(first, D, cache.layers)
        if m.innermost:
            return (D, pad, length, stack, None)
        own(m.routing_module, RoutingModule)
        route = vars(cache.route) if isinstance(cache.route, RouteCache) else {}
        bias = 0
        if m.logit_bias is not None:
            bias = self.address(m._buffers, "logit_bias", (), torch.float32)
        router = m.routing_module
        assert cache.inner is not None
        inner = self.stage(m.main_network, cache.inner)
        return (
            D, pad, length, stack,
            (
                self.stack(m.decoder, D, cache.decoder),
                self.linear(router.q_proj_layer), self.linear(router.k_proj_layer), self.linear(m.residual_proj),
                bias, BOUNDARIES[m.boundaries],
                *self.floats(route, "q_last", slots, D), self.address(route, "ema", (slots, D), torch.float32),
                self.address(route, "tail", (slots, 3), torch.uint8), inner,
            ),
        )  # fmt: skip

    def ngrams(self, m: Any, cache: HNetCache) -> tuple | None:
        if m is None:
            return None
        own(m, NgramEmbeddings)
        if m.before_reading is not None:  # a table that lags behind its training
            raise NotNative("before_reading")
        sizes, longest = m.powers.shape
        table = self.parameter(m, "weight", *m.weight.shape)
        powers = self.address(m._buffers, "powers", (sizes, longest), torch.int64)
        first = self.address(m._buffers, "first", (sizes,), torch.int64)
        recent = self.address(vars(cache), "recent", (cache.size, longest - 1), torch.int64)
        return (table, powers, first, sizes, longest, m.rows, recent, m.weight.shape[0])

    def model(self, m: Any, cache: HNetCache) -> tuple:
        own(m.embeddings, nn.Embedding)
        vocab, D = m.embeddings.weight.shape
        if m.embeddings.max_norm is not None or m.embeddings.weight.dtype not in DTYPES:
            raise NotNative("embeddings")
        table = self.parameter(m.embeddings, "weight", vocab, D)
        ngrams, head = self.ngrams(m.ngrams, cache), self.linear(m.lm_head)
        stage = self.stage(m.backbone, cache.root)
        return (table, vocab, D, cache.size, ngrams, head, table[1], stage)


def own(m: nn.Module, kind: type[nn.Module]) -> None:
    """m is a `kind`, not a subclass with a way of its own, and nobody listens to its calls."""
    hooked = m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) or "step" in vars(m)
    if type(m) is not kind or hooked:
        raise NotNative(type(m).__name__)


def of(model: nn.Module, cache: HNetCache) -> NativeStep | None:
    """The native step of this model with this cache, if it can be taken now."""
    if not cache.fused:
        return None
    if not isinstance(cache.native, NativeStep) or cache.native.model is not model:
        cache.native = NativeStep(model, cache)
    return cache.native if cache.native.usable() else None
