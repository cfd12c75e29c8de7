"""A recipe: all that one training run needs, as frozen dataclasses. Each field carries its explanation and limits.

Reading one from YAML, overriding, checking and writing it: `nulsq.config`, where these names can be had too.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from nulsq.quant.settings import OscillationSettings, Policy


def setting(default: Any, help: str, *, low=None, high=None, above=None):
    """A dataclass field with its explanation and its limits (inclusive `low` and `high`, exclusive `above`)."""
    limits = {"help": help, "low": low, "high": high, "above": above}
    if callable(default):
        return field(default_factory=default, metadata=limits)
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Run:
    dir: str | None = setting(None, "run directory; default: ROOT/NAME-TRAIN_ID")
    root: str = setting("runs", "where run directories are made")
    train_id: str = setting("0", "free label in the run directory's name")
    seed: int = setting(0, "seed of weights, sample order and augmentation", low=0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    threads: int | None = setting(None, "CPU threads of this process; default: torch's own choice", low=1)
    precision: Literal["fp32", "bf16"] = setting("fp32", "bf16: autocast; quantizer parameters stay float32")
    channels_last: bool = setting(True, "memory format of images and convolution weights")
    compile: bool = setting(False, "torch.compile the network (minutes at the first step, faster after)")
    cuda_graph: bool = setting(False, "one rank on a GPU: replay steps as CUDA graphs, for small networks, whose "
                               "kernels take longer to launch than to run")
    log_every: int = setting(20, "steps between two lines of the TensorBoard log", low=1)
    save_every: int | None = setting(None, "steps between two checkpoints within an epoch; default: one after each "
                                     "epoch (and whenever RUN/save is made)", low=1)


@dataclass(frozen=True)
class Data:
    path: str = setting("data/digits", "prepared data set (python -m data_prep ...)")
    batch: int = setting(128, "global batch, over all ranks", low=1)
    holdout: str = setting("stratified:0.1", "images of train that selection sees: stratified:SHARE, last:N or none")
    holdout_seed: int = setting(0, "seed of a stratified holdout, apart from run.seed", low=0)
    subset: int | None = setting(None, "train on this many images (seeded by holdout_seed, after the holdout)", low=1)
    loader: Literal["auto", "device", "ffcv", "torchvision"] = setting(
        "auto", "auto: device for arrays that fit in its memory, else ffcv where it and train.beton are there")
    workers: int = setting(1, "loader threads (ffcv) or processes (torchvision, photographs)", low=0)
    patience: float = setting(300.0, "seconds that a loader may take for a batch before it counts as stalled", above=0)
    crop: Literal["none", "pad", "resized"] = setting("none", "pad: random crop after padding; resized: random "
                                                      "resized crop to `size`")
    padding: int = setting(4, "pixels of padding for crop: pad", low=0)
    flip: bool = setting(False, "random horizontal flip")
    size: int = setting(224, "pixels of photographs in training, in the end", low=8)
    start_size: int | None = setting(None, "pixels in the beginning: grows to `size` in steps of 32 (progressive "
                                     "resizing)", low=8)
    ramp_start: float = setting(0.0, "share of the training (0 to 1, counted at the end of each epoch) up to which "
                                "images have start_size", low=0, high=1)
    ramp_end: float = setting(0.0, "share of the training from which images have `size`", low=0, high=1)
    eval_size: int | None = setting(None, "pixels in evaluation; default: size", low=8)
    eval_flip: bool = setting(False, "evaluate an image and its mirror image together (test-time augmentation)")
    order: Literal["random", "quasi"] = setting("random", "quasi: shuffled within windows of neighbours, for data "
                                                "larger than memory")
    window: int = setting(16384, "images of a window of order: quasi", low=1)
    eval_ratio: float = setting(0.875, "share of the shorter side that the central evaluation crop takes", above=0,
                                high=1)


@dataclass(frozen=True)
class Model:
    name: str = setting("pytorchcv:preresnet20_cifar10", "LIBRARY:NAME with pytorchcv, timm or torchvision")
    pretrained: bool = setting(False, "the library's published weights")
    init_from: str | None = setting(None, "weights to start from: .pth, .safetensors or a run directory; a run of more "
                                    "bits makes it progressive (float, 4, 3, 2: each from the last)")
    init_saw_holdout: bool = setting(False, "these weights were trained on the holdout (published ones were); "
                                     "the results repeat it")


@dataclass(frozen=True)
class Quant(Policy):
    calibration_batches: int = setting(10, "training batches that initial step sizes are measured on", low=1)
    calibration: Literal["float", "reference"] = setting("float", "reference: the authors' protocol, for parity")


@dataclass(frozen=True)
class Optim:
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "optimizer of the weights")
    lr: float = setting(0.04, "peak learning rate of the weights", above=0)
    momentum: float = setting(0.9, "of sgd", low=0, high=1)
    nesterov: bool = setting(False, "of sgd")
    weight_decay: float = setting(1e-4, "of the weights", low=0)
    decay_norm_bias: bool = setting(True, "weight decay on biases and normalization layers too, as the paper has it")
    qparm_optimizer: Literal["adamw", "sgd"] = setting("adamw", "optimizer of the quantizer parameters")
    coeff_qparm_lr: float = setting(0.01, "learning rate of the quantizer parameters / lr", low=0)
    qparm_wd: float = setting(1e-4, "weight decay of the quantizer parameters", low=0)
    epochs: int = setting(300, "length of the schedule", low=1)
    schedule: Literal["cosine", "linear"] = setting("cosine", "how the learning rate falls from its peak to zero")
    warmup_epochs: float = setting(0.0, "linear warm-up from warmup_lr", low=0)
    warmup_lr: float = setting(1e-5, "learning rate at step 0 of the warm-up", low=0)
    clip_norm: float | None = setting(None, "clip the gradient of the weights to this norm", above=0)
    accumulate: int = setting(1, "micro-batches that one step's batch is computed in", low=1)
    label_smoothing: float = setting(0.0, "of the cross entropy", low=0, high=0.999)
    freeze_bn: bool = setting(False, "keep batch-norm statistics as they are")
    reestimate_bn: int = setting(0, "training batches to measure batch-norm statistics on before each evaluation; 0: "
                                 "running averages", low=0)
    ema_decay: float = setting(0.0, "evaluate a moving average of weights and steps, decay min(this, (1 + t)/(10 + t)) "
                               "at step t; 0: none", low=0, high=0.999999)


@dataclass(frozen=True)
class Guard:
    every: int = setting(50, "steps between two looks at losses and gradients: each look waits for the device", low=1)
    spike: float | None = setting(20.0, "a loss of so many times the mean before it, and worse than guessing, is a "
                                  "divergence; null: only what is no number", above=1)
    rollbacks: int = setting(3, "times that a run goes back to its last good checkpoint and leaves out the batch that "
                             "went wrong, before it ends as diverged", low=0)


@dataclass(frozen=True)
class Distill:
    teacher: str | None = setting(None, "learn this network's soft labels: LIBRARY:NAME (published) or a run directory")
    weights: str | None = setting(None, "file with the weights of a teacher LIBRARY:NAME")
    weight: float = setting(1.0, "share of the soft labels in the loss, the labels being the rest", above=0, high=1)
    temperature: float = setting(1.0, "that both networks' logits are divided by", above=0)


@dataclass(frozen=True)
class Recipe:
    """Everything that one training run needs."""

    name: str | None = setting(None, "default: the recipe file's folder and name")
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=Quant)
    optim: Optim = field(default_factory=Optim)
    oscillation: OscillationSettings = field(default_factory=OscillationSettings)
    distill: Distill = field(default_factory=Distill)
    guard: Guard = field(default_factory=Guard)
