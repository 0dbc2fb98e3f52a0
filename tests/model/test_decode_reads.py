"""How often a step of decoding looks at the device, where each look is a wait, and how many calls it makes."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hnet import HNetConfig
from hnet.generate import stream
from hnet.model.decode_graphs import Graphs

from .tape import EveryCall, looks
from .test_causal_lm import TWO_STAGES, cu
from .test_decode_graphs import decided

MAKES_NO_LAUNCH = ("view", "_unsafe_view", "slice", "select", "expand", "permute", "transpose", "t", "unbind", "split",
                   "split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "empty", "as_strided")  # fmt: skip


class Calls(EveryCall):
    """looks: reads of the device by the host.  launches: calls that would launch something there."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = self.launches = 0

    def call(self, func, args, kwargs):
        name = func._schema.name.removeprefix("aten::")
        self.looks += looks(func, args)
        self.launches += name not in MAKES_NO_LAUNCH
        return func(*args, **kwargs)


class PythonLooks(TorchFunctionMode):
    """Also those that a CPU tensor answers without a call that is dispatched."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.looks += func in (Tensor.tolist, Tensor.numpy, Tensor.cpu)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting():
    calls = Calls()
    with PythonLooks(calls), calls:
        yield calls


@pytest.mark.parametrize("inference", [False, True])
def test_what_counts_as_a_look(inference):
    with torch.inference_mode(inference):
        check_looks()


def check_looks():
    x = torch.tensor([1.0, 2.0])
    for look in (lambda: x.tolist(), lambda: int(x[0]), lambda: bool(x[0] > 0), lambda: x[x > 1], lambda: x.nonzero(),
                 lambda: x.numpy(), lambda: x.cpu()):  # fmt: skip
        with counting() as calls:
            look()
        assert calls.looks == 1
    with counting() as calls:
        _ = x[torch.tensor([0])] + x.where(x > 0, 1).sum()
    assert calls.looks == 0


@pytest.mark.parametrize("config", ["tiny", "two"])
@pytest.mark.parametrize("slots", [None, [0, 1, 2], [2, 0, 1], [1]], ids=str)
def test_a_byte_costs_one_look_for_each_stage_that_decides(config, slots):
    model = decided(HNetConfig.preset("tiny") if config == "tiny" else HNetConfig.from_dict(TWO_STAGES))
    cache = model.allocate_cache(3, 60)
    model.prefill(torch.randint(0, 256, (21,)), cu(3, 11, 7), cache)
    for _ in range(12):
        ids = torch.randint(0, 256, (3 if slots is None else len(slots),))
        with counting() as calls:
            masks = model.step(ids, cache, slots)[1]
        assert calls.looks == len(masks)
        assert len(masks) == 1 or (config == "two" and masks[0].any())


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_p": 0.9}], ids=str)
def test_a_generated_byte_costs_one_look_more(sampling):
    model = decided(HNetConfig.preset("tiny"))
    text = stream(model, ["a prompt", "b"], max_new_bytes=8, seed=0, stop_at_eos=False, **sampling)
    next(text), next(text)
    for _ in range(4):
        with counting() as calls:
            next(text)
        assert calls.looks == 2  # the boundaries, the sampled bytes


def test_launches_of_a_byte():
    """Of all slots in order: nothing is gathered or scattered, what layers share is made once."""
    model = decided(HNetConfig.preset("tiny"))
    for graphs, most in ((False, (170, 255)), (Graphs(lambda work: (work(), lambda: None)[1]), (12, 16))):
        cache = model.allocate_cache(1, 60, graphs=graphs)
        model.prefill(torch.randint(0, 256, (9,)), cu(9), cache)
        for _ in range(12):
            with counting() as calls:
                masks = model.step(torch.randint(0, 256, (1,)), cache)[1]
        assert calls.launches <= most[masks[0].item()], calls.launches
