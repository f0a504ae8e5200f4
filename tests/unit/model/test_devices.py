"""What is said where a GPU is reserved that torch cannot use."""

import pytest
import torch

from selectmoe.errors import DeviceError
from selectmoe.model.devices import require_gpu
from selectmoe.model.free_memory import free_memory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")


def test_a_gpu_that_torch_cannot_use_is_refused_with_torchs_reason():
    for look in (require_gpu, lambda: free_memory(on_gpu=True)):
        with pytest.raises(DeviceError) as refused:
            look()
        message = str(refused.value)
        assert "is reserved, and torch cannot use it: " in message
        if not torch.backends.cuda.is_built():
            assert f"torch {torch.__version__} is built without CUDA" in message
        assert "start Ray with --num-gpus=0" in message
        assert "\n" not in message
