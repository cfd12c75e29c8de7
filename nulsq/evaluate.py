"""Evaluation: every image once, exact counts on any number of ranks. The only command that opens the test images.

    python -m nulsq.evaluate RUN                 accuracy on the test images, written to RUN/test.json
    python -m nulsq.evaluate RUN --split val     on the holdout

It takes the run's best checkpoint on the holdout, or the last one where nothing was held out. Where the run averaged
its weights (optim.ema_decay), the averages are evaluated. Batch-norm statistics are those that the run evaluated with.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nulsq.data import DataSet, Normalize, build_loader
from nulsq.distributed import Ranks, join_ranks
from nulsq.errors import ExitCode, Parser, exit_on_input_error
from nulsq.files import write_atomically
from nulsq.models.network import fold_for_training
from nulsq.models.trained import trained_network
from nulsq.quant.modes import in_evaluation
from nulsq.run import checkpoint
from nulsq.run.directory import read_recipe
from nulsq.tensor_format import autocast, place
from nulsq.training.metrics import Counters
from nulsq.training.stop import StopRequest


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, normalize: Normalize, ranks: Ranks, *, prefix: str = "val",
             precision: str = "fp32", flip: bool = False, stop_request: StopRequest | None = None) -> dict[str, Any]:
    """Mean loss, top-1 and top-5 in percent, and the number of images, over all ranks. A collective call.

    Args:
        loader: an evaluation loader, see `nulsq.data`.
        prefix: begins the keys: "val_loss", "val_top1", ...
        precision: run.precision, "fp32" or "bf16".
        flip: average the logits of each image and its mirror image (data.eval_flip).

    Raises Stopped on every rank where the run was asked to stop. Modules keep their modes.
    """
    counters = Counters(ranks.device)
    polls = min(ranks.gather(loader.steps)) if stop_request else 0  # ranks may differ by a batch
    with in_evaluation(model):
        for batch, (images, labels, _) in enumerate(loader.epoch(0)):
            if stop_request is not None and batch < polls:
                stop_request.poll_evaluation(batch)
            labels = labels.to(ranks.device, non_blocking=True)
            with autocast(ranks.device, precision):
                x = normalize(images)
                logits = (model(x) + model(x.flip(3))) / 2 if flip else model(x)
            counters.add(logits, labels, F.cross_entropy(logits.float(), labels))
    return counters.read(ranks, prefix)


def evaluate_run(run: Path, *, split: str = "test", which: str = "auto", ranks: Ranks,
                 stop_request: StopRequest | None = None) -> dict[str, Any]:
    """Evaluate a run directory's checkpoint and write the result to SPLIT.json in it. A collective call.

    Args:
        split: "test" or "val", the holdout.
        which: the checkpoint: auto, best or last.

    Raises Stopped where the run was asked to stop, InputError where there is no good checkpoint.
    """
    recipe = read_recipe(run)
    content = checkpoint.load(ranks.on_first(lambda: checkpoint.choose(run, which)))
    data = DataSet(recipe.data.path)
    model = trained_network(recipe, content, len(data.classes))
    model = place(model, ranks.device, recipe.run.channels_last)
    model = fold_for_training(model, len(content["ranks"]), ranks.device)
    loader = build_loader(recipe.data, data, split, ranks.rank, ranks.size, ranks.device)
    result = evaluate(model, loader, Normalize(data, ranks.device, recipe.run.channels_last), ranks, prefix=split,
                      precision=recipe.run.precision, flip=recipe.data.eval_flip, stop_request=stop_request)
    is_best = content["best"] is not None and content["best"]["step"] == content["step"]
    result |= {"checkpoint": "best" if is_best else "last", "epoch": content["epoch"], "step": content["step"],
               "holdout": recipe.data.holdout, "start_saw_holdout": recipe.model.init_saw_holdout}
    if ranks.is_first:
        write_atomically(run / f"{split}.json", json.dumps(result, indent=1) + "\n")
    return result


def read_evaluation(run: Path, split: str = "test") -> dict[str, Any] | None:
    """The result of an earlier evaluation of the run's best checkpoint; None where there is none."""
    file = run / f"{split}.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    return result if result["step"] == checkpoint.load_chosen(run)["step"] else None


def parser() -> Parser:
    parser = Parser(prog="python -m nulsq.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: the holdout (%(default)s)")
    parser.add_argument("--checkpoint", choices=["auto", "best", "last"], default="auto",
                        help="auto and best: the best on the holdout, or the last where nothing was held out")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    with join_ranks(arguments.device) as ranks:
        result = evaluate_run(arguments.run, split=arguments.split, which=arguments.checkpoint, ranks=ranks)
        if ranks.is_first:
            print(json.dumps(result, indent=1))
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
