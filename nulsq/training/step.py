"""One step of a run, in two halves:

    loss, norm = step.gradients(images, labels, progress)    forward, loss, backward
    step.update(lr, progress)                                both optimizers, projection, oscillating weights

The divergence guard looks at loss and norm between them. `progress` is the share of the training done, 0 to 1. Values
that change from step to step (learning rate, factor of the dampening, threshold of the freezing) are passed as
arguments and everything else keeps its place in memory, so that each half can be captured as a CUDA graph.
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nulsq.config import Recipe
from nulsq.distributed import Ranks
from nulsq.quant.oscillation import Oscillations
from nulsq.training.cuda_graph import RECORDERS, Recording, signature, warmed_up
from nulsq.training.divergence import gradient_norm
from nulsq.training.loss import TaskLoss, backward
from nulsq.training.state import TrainState

WARM_UP = 3  # plain steps before a recording


def training_step(recipe: Recipe, ranks: Ranks, state: TrainState, network: nn.Module,
                  teacher: nn.Module | None = None, oscillations: Oscillations | None = None) -> "TrainingStep":
    """The step of the recipe. Where CUDA graphs are wanted and impossible: the plain step, with a warning."""
    graphed = recipe.run.cuda_graph
    if graphed and (ranks.device.type not in RECORDERS or ranks.size > 1):
        warnings.warn("run.cuda_graph: steps are recorded with one rank on a GPU only; this run continues without "
                      f"graphs ({ranks.size} on {ranks.device.type})", stacklevel=2)
        graphed = False
    return (GraphedStep if graphed else TrainingStep)(
        state, network, TaskLoss.of(recipe, teacher), oscillations, accumulate=recipe.optim.accumulate,
        precision=recipe.run.precision)


class TrainingStep:
    """Steps of `state`, whose model is called through `network`: itself, compiled, or data parallel."""

    def __init__(self, state: TrainState, network: nn.Module, loss: TaskLoss,
                 oscillations: Oscillations | None = None, *, accumulate: int = 1, precision: str = "fp32"):
        self.state, self.network, self.loss, self.oscillations = state, network, loss, oscillations
        self.accumulate, self.precision = accumulate, precision

    def gradients(self, images: Tensor, labels: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Loss [] of a normalized batch and norm [] of its gradients, which are left in the parameters."""
        factor = self.oscillations.dampening_factor(progress) if self.oscillations else None
        return self._run(self._gradients, images, labels, factor)

    def update(self, lr: float, progress: float) -> None:
        """Change the parameters by their gradients; `lr` is the learning rate of the weights."""
        self._run(self._update, lr, self.oscillations.threshold(progress) if self.oscillations else None)

    def state_was_loaded(self) -> None:
        """Call this after tensors of the state were replaced, as loading a checkpoint does."""

    def _run(self, half: Callable[..., Any], *values: Any) -> Any:
        return half(*values)

    def _gradients(self, images: Tensor, labels: Tensor, factor: Any) -> tuple[Tensor, Tensor]:
        self.state.optimizers.zero_grad()
        dampening = None if factor is None or self.oscillations is None else self.oscillations.dampening_by(factor)
        loss = backward(self.network, images, labels, self.loss, self.state.counters, accumulate=self.accumulate,
                        precision=self.precision, dampening=dampening)
        return loss, gradient_norm(self.state.model)

    def _update(self, lr: float, threshold: Any) -> None:
        self.state.optimizers.step(lr)
        if self.oscillations:
            self.oscillations.update_(threshold)


class GraphedStep(TrainingStep):
    """The same, with both halves replayed as CUDA graphs after a few plain steps. Learning rates become float32.

    The second half reads gradients where the first one leaves them. So both are recorded in the same step, and both
    again when one has to be: when images grow, or dampening or freezing begins.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.device = self.state.counters.values.device
        self.state_was_loaded()

    def state_was_loaded(self) -> None:
        self.plain_steps = 0
        self.signatures: dict[str, Any] = {}
        self.recordings: dict[str, Recording] = {}

    def _run(self, half: Callable[..., Any], *values: Any) -> Any:
        name, own_signature = half.__name__, signature(values)
        if self.signatures.setdefault(name, own_signature) != own_signature:
            self.state_was_loaded()
            self.signatures[name] = own_signature
        if name not in self.recordings:
            if not self._is_to_be_recorded(name):
                return warmed_up(half, values, self.device)
            self.recordings[name] = Recording(half, values, self.device)
        return self.recordings[name](*values)

    def _is_to_be_recorded(self, name: str) -> bool:
        if name == "_update":
            return "_gradients" in self.recordings
        self.plain_steps += 1
        return self.plain_steps > WARM_UP
