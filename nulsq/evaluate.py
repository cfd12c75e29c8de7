"""Evaluation: every image once, exact counts at any number of ranks.

    python -m nulsq.evaluate RUN                 accuracy on the test images, into RUN/test.json
    python -m nulsq.evaluate RUN --split val     on the holdout

The checkpoint is the run's best on the holdout, or its last where nothing was held out. Where the run averaged its
weights (optim.ema_decay) the average is evaluated, and batch-norm statistics are those that the run evaluated with.
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from nulsq.config import Recipe
from nulsq.data import DataSet, Normalize, build_loader
from nulsq.distributed import Ranks, join_ranks
from nulsq.errors import Parser, exit_on_input_error
from nulsq.files import write_atomically
from nulsq.models.network import fold_for_training
from nulsq.quant.modes import in_evaluation
from nulsq.run import checkpoint
from nulsq.run.directory import read_recipe
from nulsq.training.metrics import Counters
from nulsq.training.state import trained_network
from nulsq.training.stop import Asked


@torch.no_grad()
def evaluate(model: nn.Module, loader, normalize: Normalize, ranks: Ranks, recipe: Recipe, prefix: str,
             asked: Asked | None = None) -> dict:
    """Mean loss, top-1 and top-5 in percent and the image count, over all ranks. A collective call.

    With data.eval_flip logits are the mean of those of an image and of its mirror image. Raises Stopped
    on every rank where `asked` says so; the model is then in the mode that it was in.
    """
    counters = Counters(ranks.device)
    shared = min(ranks.gather(loader.steps)) if asked else 0  # ranks' shares may differ by a batch
    with in_evaluation(model):
        for batch, (images, labels, _) in enumerate(loader.epoch(0)):
            if batch < shared:
                asked.stop_evaluation(batch)
            labels = labels.to(ranks.device, non_blocking=True)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
                x = normalize(images)
                logits = (model(x) + model(x.flip(3))) / 2 if recipe.data.eval_flip else model(x)
            counters.add(logits, labels, F.cross_entropy(logits.float(), labels))
    return counters.read(ranks, prefix)


def evaluate_run(run: Path, *, split: str = "test", which: str = "auto", ranks: Ranks,
                 asked: Asked | None = None) -> dict:
    """Evaluate a run directory's checkpoint and write the result to SPLIT.json in it. A collective call.

    Raises Stopped where `asked` says so, InputError where there is no good checkpoint.
    """
    recipe = read_recipe(run)
    content = checkpoint.load(ranks.on_first(lambda: checkpoint.chosen(run, which)))
    data = DataSet(recipe.data.path)
    model = trained_network(recipe, content, len(data.classes))
    memory = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    model.to(ranks.device, memory_format=memory)
    model = fold_for_training(model, len(content["ranks"]), ranks.device)
    loader = build_loader(recipe.data, data, split, ranks.rank, ranks.size, ranks.device)
    found = evaluate(model, loader, Normalize(data, ranks.device, recipe.run.channels_last), ranks, recipe,
                     split, asked)
    best = content["best"] is not None and content["best"]["step"] == content["step"]
    found |= {"checkpoint": "best" if best else "last", "epoch": content["epoch"], "step": content["step"],
              "holdout": recipe.data.holdout, "start_saw_holdout": recipe.model.init_saw_holdout}
    if ranks.is_first:
        write_atomically(run / f"{split}.json", json.dumps(found, indent=1) + "\n")
    return found


def read_evaluation(run: Path, split: str = "test") -> dict | None:
    """What an earlier evaluation of the checkpoint that the run now stands for found; None without one."""
    file = run / f"{split}.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    return found if found["step"] == checkpoint.best_or_last(run)["step"] else None


def parser() -> Parser:
    made = Parser(prog="python -m nulsq.evaluate", description=__doc__)
    made.add_argument("run", type=Path, help="run directory")
    made.add_argument("--split", choices=["test", "val"], default="test", help="(%(default)s)")
    made.add_argument("--checkpoint", choices=["auto", "best", "last"], default="auto",
                      help="auto, best: the best on the holdout where there is one")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    with join_ranks(arguments.device) as ranks:
        found = evaluate_run(arguments.run, split=arguments.split, which=arguments.checkpoint, ranks=ranks)
        if ranks.is_first:
            print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
