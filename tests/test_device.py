import torch

from hnet.device import set_matmul_precision


def test_tf32_is_set_for_a_gpu_alone():
    before = torch.get_float32_matmul_precision()
    try:
        for asked, found in ((True, "high"), (False, "highest"), (True, "high")):
            set_matmul_precision(torch.device("cuda"), asked)
            assert torch.get_float32_matmul_precision() == found
            torch.set_float32_matmul_precision("medium")
            set_matmul_precision(torch.device("cpu"), asked)
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
