"""A recipe: everything that one training run needs, as frozen dataclasses. Each field carries its help and its limits.

`nulsq.config` reads recipes from YAML, overrides, checks and writes them; these names can be imported from there too.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from nulsq.quant.settings import OscillationSettings, Policy


def setting(default: Any, help: str, *, low: float | None = None, high: float | None = None,
            above: float | None = None) -> Any:
    """A dataclass field with its help text and its limits: inclusive `low` and `high`, exclusive `above`."""
    limits = {"help": help, "low": low, "high": high, "above": above}
    if callable(default):
        return field(default_factory=default, metadata=limits)
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Run:
    dir: str | None = setting(None, "run directory; default: ROOT/NAME-TRAIN_ID")
    root: str = setting("runs", "folder that holds the run directories")
    train_id: str = setting("0", "label at the end of the run directory's name")
    seed: int = setting(0, "seed of initial weights, sample order and augmentation", low=0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if there is a GPU, else cpu")
    threads: int | None = setting(None, "CPU threads of each process; default: torch's own choice", low=1)
    precision: Literal["fp32", "bf16"] = setting("fp32", "bf16: autocast; quantizer parameters stay float32")
    channels_last: bool = setting(True, "store images and convolution weights in channels_last memory format")
    compile: bool = setting(False, "compile the network with torch.compile: the first step takes minutes, later steps "
                            "are faster")
    cuda_graph: bool = setting(False, "replay training steps as CUDA graphs, on one GPU: faster for small networks, "
                               "whose kernels take longer to launch than to run")
    log_every: int = setting(20, "steps between two entries in the TensorBoard log", low=1)
    save_every: int | None = setting(None, "steps between two checkpoints within an epoch; default: a checkpoint after "
                                     "each epoch only (and whenever the file RUN/save appears)", low=1)


@dataclass(frozen=True)
class Data:
    path: str = setting("data/digits", "folder of the prepared data set (python -m data_prep ...)")
    batch: int = setting(128, "images in a training step, over all ranks", low=1)
    holdout: str = setting("stratified:0.1", "training images kept for selection: stratified:SHARE (of every class), "
                           "last:N (images) or none")
    holdout_seed: int = setting(0, "seed that draws a stratified holdout; independent of run.seed", low=0)
    subset: int | None = setting(None, "train on this many images, drawn with holdout_seed after the holdout; default: "
                                 "all", low=1)
    loader: Literal["auto", "device", "ffcv", "torchvision"] = setting(
        "auto", "auto: device for small images that fit in its memory, else ffcv if it is installed and train.beton "
        "exists, else torchvision")
    workers: int = setting(1, "loader threads (ffcv) or processes (torchvision with photographs)", low=0)
    patience: float = setting(300.0, "seconds without a batch after which the loader counts as stalled", above=0)
    crop: Literal["none", "pad", "resized"] = setting("none", "pad: random crop after padding, for small images; "
                                                      "resized: random resized crop, for photographs")
    padding: int = setting(4, "pixels of padding on each side for crop=pad", low=0)
    flip: bool = setting(False, "flip training images horizontally at random")
    size: int = setting(224, "pixels of photographs in training", low=8)
    start_size: int | None = setting(None, "pixels of photographs at the beginning (progressive resizing): they grow "
                                     "to `size` in steps of 32 pixels; default: `size` throughout", low=8)
    ramp_start: float = setting(0.0, "share of the training (0 to 1) until which photographs have start_size; an epoch "
                                "counts by the share that is done when it ends", low=0, high=1)
    ramp_end: float = setting(0.0, "share of the training (0 to 1) from which photographs have `size`", low=0, high=1)
    eval_size: int | None = setting(None, "pixels of photographs in evaluation; default: `size`", low=8)
    eval_flip: bool = setting(False, "average the outputs for an image and its mirror image in evaluation")
    order: Literal["random", "quasi"] = setting("random", "random: shuffle all images; quasi: shuffle within windows "
                                                "of neighbours, for data larger than memory")
    window: int = setting(16384, "images in a window of order=quasi", low=1)
    eval_ratio: float = setting(0.875, "side of the central evaluation crop as a share of the image's shorter side",
                                above=0, high=1)


@dataclass(frozen=True)
class Model:
    name: str = setting("pytorchcv:preresnet20_cifar10", "LIBRARY:NAME; libraries: pytorchcv, timm, torchvision")
    pretrained: bool = setting(False, "start from the library's published weights")
    init_from: str | None = setting(None, "weights to start from: a .pth or .safetensors file, or a run directory; a "
                                    "quantized run makes it progressive (float, then 4, 3, 2 bits)")
    init_saw_holdout: bool = setting(False, "the initial weights were trained on the holdout, as published weights "
                                     "are; results say so")


@dataclass(frozen=True)
class Quant(Policy):
    calibration_batches: int = setting(10, "training batches that the initial step sizes are computed from", low=1)
    calibration: Literal["float", "reference"] = setting("float", "float: calibrate on the float network; reference: "
                                                         "the protocol of the authors' code, for comparison with it")


@dataclass(frozen=True)
class Optim:
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "optimizer of the weights")
    lr: float = setting(0.04, "peak learning rate of the weights", above=0)
    momentum: float = setting(0.9, "momentum of sgd", low=0, high=1)
    nesterov: bool = setting(False, "use Nesterov momentum in sgd")
    weight_decay: float = setting(1e-4, "weight decay of the weights", low=0)
    decay_norm_bias: bool = setting(True, "apply weight decay to biases and normalization layers too, as in the paper")
    qparm_optimizer: Literal["adamw", "sgd"] = setting("adamw", "optimizer of the quantizer parameters")
    coeff_qparm_lr: float = setting(0.01, "learning rate of the quantizer parameters as a multiple of lr", low=0)
    qparm_wd: float = setting(1e-4, "weight decay of the quantizer parameters", low=0)
    epochs: int = setting(300, "epochs of the training", low=1)
    schedule: Literal["cosine", "linear"] = setting("cosine", "shape of the learning rate's fall from its peak to zero")
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up from warmup_lr to lr", low=0)
    warmup_lr: float = setting(1e-5, "learning rate at the first step of the warm-up", low=0)
    clip_norm: float | None = setting(None, "largest norm of the weights' gradient, which is scaled down to it; "
                                      "default: no clipping", above=0)
    accumulate: int = setting(1, "micro-batches that each step's batch is split into", low=1)
    label_smoothing: float = setting(0.0, "label smoothing of the cross entropy", low=0, high=0.999)
    freeze_bn: bool = setting(False, "keep the batch-norm statistics of the initial weights")
    reestimate_bn: int = setting(0, "training batches to recompute batch-norm statistics from before each evaluation; "
                                 "0: use the running averages", low=0)
    ema_decay: float = setting(0.0, "evaluate a moving average of weights and step sizes, with decay min(this, "
                               "(1 + t)/(10 + t)) at step t; 0: none", low=0, high=0.999999)


@dataclass(frozen=True)
class Guard:
    every: int = setting(50, "steps between two checks of losses and gradients; a check waits for the device", low=1)
    spike: float | None = setting(20.0, "treat a loss above this multiple of its running mean, and above ln(classes), "
                                  "as divergence; null: only NaN and infinity", above=1)
    rollbacks: int = setting(3, "times that a run returns to its last good checkpoint and skips the failing batch "
                             "before it ends as diverged", low=0)


@dataclass(frozen=True)
class Distill:
    teacher: str | None = setting(None, "network whose soft labels are learned: LIBRARY:NAME or a run directory")
    weights: str | None = setting(None, "weights file of a teacher LIBRARY:NAME; default: its published weights")
    weight: float = setting(1.0, "share of the soft labels in the loss; the true labels have the rest", above=0,
                            high=1)
    temperature: float = setting(1.0, "temperature that divides the logits of both networks", above=0)


@dataclass(frozen=True)
class Recipe:
    """Everything that one training run needs."""

    name: str | None = setting(None, "default: the recipe file's folder and name, as in digits-w2a2")
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=Quant)
    optim: Optim = field(default_factory=Optim)
    oscillation: OscillationSettings = field(default_factory=OscillationSettings)
    distill: Distill = field(default_factory=Distill)
    guard: Guard = field(default_factory=Guard)
