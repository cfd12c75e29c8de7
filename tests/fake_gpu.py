"""python -m tests.fake_gpu KEY=VALUE ...: two steps of a recipe, but for backward, on tensors that have the device
"cuda", shapes and types, and nothing else (torch's fake tensors). Needs no GPU.

Operations with a tensor of another device fail, and so does reading a number.
"""

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from nulsq.config import load_recipe
from nulsq.distributed import Ranks
from nulsq.models.network import build_network, track_oscillations
from nulsq.quant.calibration.calibrate import calibrate_
from nulsq.quant.fold import fold_
from nulsq.quant.op.gpu import kernel as gpu
from nulsq.training.divergence import DivergenceGuard
from nulsq.training.ema import WeightAverage
from nulsq.training.metrics import Counters
from nulsq.training.optim import Optimizers
from nulsq.training.state import TrainState
from nulsq.training.step import training_step

CUDA = torch.device("cuda")


def on_gpu_alone(*arguments, **options):
    """In the place of a fused optimizer's operation, which fake tensors do not know of."""
    assert all(leaf.is_cuda for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor))


def move_(model):
    def moved(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(moved(parameter), parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = moved(buffer)


def leave_gradients_(model):
    """In the place of backward: torch's engine has none for a device that is not there."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)


def main(overrides):
    recipe = load_recipe("configs/recipes/cifar10/w2a2.yaml", overrides)
    model = build_network(recipe, 10, start=False)
    calibrate_(model, [torch.randn(4, 3, 32, 32)])
    fold_(model)
    model.train()
    gpu.available, gpu.moments = lambda: True, torch.ops.nulsq.moments
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.backward = lambda loss: leave_gradients_(model)
    torch._fused_sgd_ = torch._fused_adamw_ = on_gpu_alone
    with FakeTensorMode(allow_non_fake_inputs=False):
        move_(model)
        oscillations = track_oscillations(recipe, model)
        alone = Ranks(0, 1, CUDA)
        state = TrainState(model, Optimizers(model, recipe.optim), Counters(CUDA),
                           DivergenceGuard(recipe.guard, 10, alone), WeightAverage(model, 0.9))
        step = training_step(recipe, alone, state, model, None, oscillations)
        images = torch.empty(4, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(4, dtype=torch.long, device=CUDA)
        for number, rate in enumerate((0.1, torch.full((), 0.1, device=CUDA))):
            loss, norm = step.gradients(images, labels, 0.9)
            state.guard.observe(number, loss, norm)
            step.update(rate, 0.9)
            state.average.update_(number + 1)
    assert loss.is_cuda
    print("on its device")


if __name__ == "__main__":
    main(sys.argv[1:])
