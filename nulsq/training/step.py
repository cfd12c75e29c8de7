"""One step of a run, in two halves:

    loss, norm = step.gradients(images, labels, done)    forward, loss, backward
    step.update(rate, done)                              both optimizers, quantizers' projection, oscillating weights

The divergence guard looks between them. `done` is the share of training done. What changes with the step (learning
rate, factor of the dampening, threshold of the freezing) reaches a half as an argument, all else stays in its place in
memory: so with `run.cuda_graph` each half is recorded and replayed.
"""

import warnings

from torch import Tensor, nn

from nulsq.config import Recipe
from nulsq.distributed import Ranks
from nulsq.quant.oscillation import Oscillations
from nulsq.training.cuda_graph import RECORDERS, Recording, signature, warmed_up
from nulsq.training.divergence import gradient_norm
from nulsq.training.loss import backward
from nulsq.training.state import TrainState

WARM_UP = 3  # plain steps before a recording


def training_step(recipe: Recipe, ranks: Ranks, state: TrainState, network: nn.Module, teacher: nn.Module | None = None,
                  oscillations: Oscillations | None = None) -> "TrainingStep":
    """The step that the recipe asks for; the plain one, with a warning, where there can be no graphs."""
    graphed = recipe.run.cuda_graph
    if graphed and (ranks.device.type not in RECORDERS or ranks.size > 1):
        warnings.warn("run.cuda_graph: only one rank on a GPU records its steps; the run goes on without (same recipe, "
                      f"here with {ranks.size} on {ranks.device.type})", stacklevel=2)
        graphed = False
    return (GraphedStep if graphed else TrainingStep)(recipe, state, network, teacher, oscillations)


class TrainingStep:
    """Steps of `state`, whose network is called through `network`: itself, compiled, or as one of several ranks."""

    def __init__(self, recipe: Recipe, state: TrainState, network: nn.Module, teacher: nn.Module | None = None,
                 oscillations: Oscillations | None = None):
        self.recipe, self.state, self.network = recipe, state, network
        self.teacher, self.oscillations = teacher, oscillations

    def gradients(self, images: Tensor, labels: Tensor, done: float) -> tuple[Tensor, Tensor]:
        """Loss [] of a normalized batch and norm [] of its gradients, which are left in the parameters."""
        factor = self.oscillations.dampening_factor(done) if self.oscillations else None
        return self._run(self._gradients, images, labels, factor)

    def update(self, rate: float, done: float) -> None:
        """Change parameters by their gradients; `rate` is the learning rate of the weights."""
        self._run(self._update, rate, self.oscillations.threshold(done) if self.oscillations else None)

    def replaced(self) -> None:
        """To be called when tensors of the state have been replaced by others, as loading a checkpoint does."""

    def _run(self, half, *values):
        return half(*values)

    def _gradients(self, images, labels, factor):
        self.state.optimizers.zero_grad()
        dampening = None if factor is None else self.oscillations.dampening_by(factor)
        loss = backward(self.network, images, labels, self.recipe, self.state.counters, self.teacher, dampening)
        return loss, gradient_norm(self.state.model)

    def _update(self, rate, threshold):
        self.state.optimizers.step(rate)
        if self.oscillations:
            self.oscillations.update_(threshold)


class GraphedStep(TrainingStep):
    """The same with both halves as CUDA graphs, after some plain steps; learning rates are rounded to float32.

    The second one reads gradients where the first one leaves them. So both are recorded in one step, and both again
    when either would have to be: when images grow, dampening or freezing begins.
    """

    def __init__(self, *parts):
        super().__init__(*parts)
        self.device = self.state.counters.values.device
        self.replaced()

    def replaced(self) -> None:
        self.plain, self.kinds, self.recordings = 0, {}, {}

    def _run(self, half, *values):
        name, found = half.__name__, signature(values)
        if self.kinds.setdefault(name, found) != found:
            self.replaced()
            self.kinds[name] = found
        if name not in self.recordings:
            if not self._to_be_recorded(name):
                return warmed_up(half, values, self.device)
            self.recordings[name] = Recording(half, values, self.device)
        return self.recordings[name](*values)

    def _to_be_recorded(self, name):
        if name == "_update":
            return "_gradients" in self.recordings
        self.plain += 1
        return self.plain > WARM_UP
