"""Distillation, averaged weights, and runs with all options, whose resumption equals an uninterrupted run."""

import dataclasses
import math

import pytest
import torch
from conftest import FLOAT
from test_train import ALONE
from torch import nn
from torch.nn import functional as F

import nulsq
from nulsq.config import Distill, Optim, Recipe
from nulsq.errors import InputError
from nulsq.evaluate import evaluate_run
from nulsq.files import read_lines
from nulsq.models.weights import read_weights
from nulsq.quant.oscillation import Oscillations
from nulsq.quant.settings import OscillationSettings
from nulsq.run import checkpoint
from nulsq.run.directory import path_of, read_metrics
from nulsq.train import train
from nulsq.training.ema import WeightAverage
from nulsq.training.loss import TaskLoss, distillation
from tests.runs import assert_same_state, last, numbers, torchrun

# A low momentum and tracking from the start, so that some weights freeze within twelve steps.
ALL = {"oscillation__momentum": 0.1, "oscillation__freeze_threshold": 0.25, "oscillation__freeze_final": 0.2,
       "oscillation__start": 0.0, "oscillation__dampening": 1e-3, "optim__ema_decay": 0.9, "optim__reestimate_bn": 3,
       "distill__weight": 0.5, "distill__temperature": 2.0, "optim__epochs": 3}


@pytest.fixture(scope="module")
def everything(short, float_run):
    """An uninterrupted run with all options on."""
    recipe = short("everything", model__init_from=str(float_run), distill__teacher=str(float_run), **ALL)
    assert train(recipe, quiet=True).status == "finished"
    return path_of(recipe)


# ---- loss


def logits(seed, classes=5):
    return torch.randn(7, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recipe_of(label_smoothing=0.0, **distill):
    return Recipe(optim=Optim(label_smoothing=label_smoothing), distill=Distill(**distill))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_loss_equals_its_formula(temperature):
    """The reference is plain Python in float64; the loss is computed in float32, hence the tolerance."""
    student, teacher = logits(0), logits(1)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in row] for row in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    actual = distillation(student, teacher, temperature)
    assert actual.item() == pytest.approx(temperature**2 * total / 7, rel=1e-5)


def test_task_loss_weights_label_and_teacher_losses():
    student, teacher, labels = logits(0).float(), logits(1).float(), torch.arange(7) % 5
    hard = F.cross_entropy(student, labels, label_smoothing=0.1)
    soft = distillation(student, teacher, 3.0)
    actual = TaskLoss.of(recipe_of(0.1, weight=0.25, temperature=3.0))(student, labels, teacher)
    torch.testing.assert_close(actual, 0.75 * hard + 0.25 * soft)
    assert torch.equal(TaskLoss.of(recipe_of(weight=1.0, temperature=3.0))(student, labels, teacher), soft)
    assert torch.equal(TaskLoss.of(recipe_of(0.1))(student, labels), hard)


def test_student_equal_to_its_teacher_has_zero_loss_and_does_not_change(short, float_run):
    recipe = short("itself", **FLOAT, model__init_from=str(float_run), distill__teacher=str(float_run),
                   optim__freeze_bn=True, optim__weight_decay=0.0, optim__epochs=1)
    train(recipe, quiet=True)
    # Softmax and KL divergence are float32, so the loss is zero up to rounding.
    assert abs(read_metrics(path_of(recipe))[0]["train_loss"]) < 1e-6
    before, after = checkpoint.load_chosen(float_run)["model"], last(path_of(recipe))["model"]
    for key, value in before.items():  # a step with a nonzero loss changes weights by at least 1e-3
        torch.testing.assert_close(after[key], value, rtol=1e-5, atol=1e-5)


def test_quantized_run_can_be_the_teacher(short, everything, float_run):
    recipe = short("taught", model__init_from=str(float_run), distill__teacher=str(everything), optim__epochs=1,
                   optim__accumulate=2)
    assert train(recipe, quiet=True).status == "finished"
    assert not any("teacher" in key for key in last(path_of(recipe)))


def test_teacher_from_a_file_equals_teacher_from_a_run(short, float_run, tmp_path):
    torch.save(checkpoint.load_chosen(float_run)["model"], tmp_path / "teacher.pth")
    losses = []
    for name, settings in (("run", {"distill__teacher": str(float_run)}),
                           ("file", {"distill__teacher": "pytorchcv:preresnet20_cifar10",
                                     "distill__weights": str(tmp_path / "teacher.pth")})):
        recipe = short(f"teacher-of-{name}", model__init_from=str(float_run), optim__epochs=1, **settings)
        train(recipe, quiet=True)
        losses.append(read_metrics(path_of(recipe))[0]["train_loss"])
    assert losses[0] == losses[1]


def test_invalid_teacher_raises_and_creates_no_run_directory(short, float_run, tmp_path):
    hundred = path_of(short("hundred"))
    other = dataclasses.replace(short("hundred", **FLOAT), model=dataclasses.replace(
        short("x").model, name="pytorchcv:preresnet20_cifar100"))
    make_run(other, hundred, classes=100)
    torch.save(checkpoint.load_chosen(hundred)["model"], tmp_path / "hundred.pth")
    for settings, message in (
        ({"distill__teacher": str(tmp_path / "none")}, "no such run directory; allowed: .*pytorchcv:NAME"),
        ({"distill__teacher": str(tmp_path)}, "is not a run directory"),
        ({"distill__teacher": "timm:resnet50x", "distill__weights": "x.pth"},
         "distill.teacher = 'timm:resnet50x': timm has no such network. Did you mean"),
        ({"distill__teacher": "timm:resnet18", "distill__weights": str(tmp_path / "none.pth")},
         "distill.weights: no file or run directory"),
        ({"distill__teacher": str(hundred)}, "cannot teach 10 classes"),
        ({"distill__teacher": "pytorchcv:preresnet20_cifar10", "distill__weights": str(tmp_path / "hundred.pth")},
         "distill.weights: .*another architecture: 2 misshapen"),
        ({"distill__weights": "x.pth"}, "distill.weights needs distill.teacher = LIBRARY:NAME"),
        ({"distill__teacher": str(float_run), "distill__weights": "x.pth"}, "distill.weights needs distill.teacher"),
        ({"distill__teacher": str(float_run), "optim__label_smoothing": 0.1}, "optim.label_smoothing has no effect"),
    ):
        recipe = short("never", run__root=str(tmp_path / "runs"), **settings)
        with pytest.raises(InputError, match=message):
            train(recipe, quiet=True)
        assert not (tmp_path / "runs").exists()


def make_run(recipe, path, classes):
    """Write a minimal run directory with random weights."""
    from nulsq.config import to_yaml
    from nulsq.models.network import build_network
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(to_yaml(recipe))
    checkpoint.save(path, {"model": build_network(recipe, classes).state_dict(), "best": None, "step": 0, "epoch": 0})


# ---- averaged weights


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6),
                          nn.Linear(6, 2))
    nulsq.calibrate_(nulsq.quantize_(model, nulsq.Policy(bits=2)), [torch.randn(8, 3, 8, 8)])
    Oscillations(model, OscillationSettings(track=True))
    return model


def test_weight_average_follows_its_recursion_and_restores_weights_exactly():
    model = small()
    average = WeightAverage(model, 0.9)
    expected = {key: value.double().clone() for key, value in model.state_dict().items() if value.is_floating_point()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nulsq.follow_step_(optimizer, model)
    for step in range(1, 121):
        model(torch.randn(8, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_(step)
        decay = min(0.9, (1 + step) / (10 + step))
        assert (decay == 0.9) == (step >= 80)
        for key, value in expected.items():
            expected[key] = decay * value + (1 - decay) * model.state_dict()[key].double()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    with average.applied():
        averaged = model.state_dict()
        for key, value in averaged.items():
            if key in average.values:  # float32 against float64 over 120 steps
                torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(value, trained[key])
        assert (averaged["4.weight_quantizer.step"] > 0).all() and (averaged["4.activation_quantizer.steps"] > 0).all()
        assert not torch.equal(averaged["0.weight"], trained["0.weight"])
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_weight_average_restores_a_weight_shared_by_two_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average, start = WeightAverage(model, 0.5), model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    trained = model[0].weight.detach().clone()
    with average.applied():
        assert torch.equal(model[1].weight, start)
    assert torch.equal(model[1].weight, trained) and torch.equal(average.values["0.weight"], start)


def test_oscillation_trackers_and_integers_are_not_averaged():
    model = small()
    average = WeightAverage(model, 0.9)
    assert not any(".oscillation." in key or key.endswith(("num_batches_tracked", "sign")) for key in average.values)
    assert {key.rpartition(".")[2] for key in average.values} >= {"weight", "bias", "step", "steps", "running_mean"}


def test_evaluation_and_init_from_use_the_averaged_weights(short, everything):
    lines, content = read_metrics(everything), checkpoint.load_chosen(everything)
    metrics = evaluate_run(everything, split="val", ranks=ALONE)
    best = content["best"]
    assert {key: metrics[key] for key in ("val_top1", "val_loss", "val_images")} == {
        key: best[key] for key in ("val_top1", "val_loss", "val_images")}
    assert evaluate_run(everything, split="val", which="last", ranks=ALONE)["val_loss"] == lines[-1]["val_loss"]
    assert all(line["val_loss"] != line["raw_val_loss"] for line in lines)
    for source in (everything, checkpoint.choose(everything)):
        weights = read_weights(source)
        for key, value in content["model"].items():
            assert torch.equal(weights[key], content["ema"].get(key, value))
    recipe = short("from-average", model__init_from=str(everything), quant__bits=3, optim__epochs=1, optim__lr=1e-12,
                   optim__freeze_bn=True)
    train(recipe, quiet=True)
    torch.testing.assert_close(last(path_of(recipe))["model"]["features.stage1.unit1.body.conv1.conv.weight"],
                               content["ema"]["features.stage1.unit1.body.conv1.conv.weight"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"data__holdout": "none"}])
def test_checkpoint_holds_the_reestimated_batch_norm_statistics(short, float_run, settings):
    """Re-estimation on the first batches of epoch 0 with the checkpoint's network gives the checkpoint's statistics."""
    from nulsq.data import DataSet, Normalize, build_loaders
    from nulsq.models.trained import trained_network
    from nulsq.quant.batch_norm import reestimate_batch_norm_
    from nulsq.quant.fold import fold_
    from nulsq.training.validate import first_batches
    recipe = short(f"reestimated-{len(settings)}", model__init_from=str(float_run), optim__reestimate_bn=2, **settings)
    train(recipe, quiet=True)
    content, data = last(path_of(recipe)), DataSet(recipe.data.path)
    model = trained_network(recipe, content, 10).to(memory_format=torch.channels_last)
    fold_(model)  # as in the run, because a folded batch norm rounds differently
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loader = build_loaders(recipe.data, data, recipe.run.seed).train
    reestimate_batch_norm_(model, first_batches(loader, Normalize(data, torch.device("cpu")), 2))
    assert_same_state(dict(model.state_dict()), before)


# ---- all together


def test_resume_with_every_option_equals_uninterrupted_run(short, float_run, everything, steps_done):
    """The run is stopped within an epoch and right after the last step of one."""
    recipe = short("everything-stopped", model__init_from=str(float_run), distill__teacher=str(float_run), **ALL)
    for step in (3, 8, 9):
        state = train(recipe, stop=lambda step=step: steps_done[-1] >= step, quiet=True)
        assert (state.status, state.step) == ("saved", step)
    assert train(recipe, quiet=True).status == "finished"
    assert numbers(path_of(recipe)) == numbers(everything)
    assert_same_state(last(path_of(recipe)), last(everything))
    records = [read_lines(path / "oscillations.jsonl") for path in (path_of(recipe), everything)]
    assert records[0] == records[1] and [line["epoch"] for line in records[0]] == [1, 2, 3]


def test_oscillations_are_recorded_per_layer_and_in_total(everything):
    record, metrics = read_lines(everything / "oscillations.jsonl")[-1], read_metrics(everything)[-1]
    layers = record["layers"]
    assert len(layers) == 20 and (record["epoch"], record["step"]) == (3, 12)
    weights, oscillating, frozen = (sum(layer[key] for layer in layers.values())
                                    for key in ("weights", "oscillating", "frozen"))
    assert metrics["oscillating_share"] == oscillating / weights > 0
    assert metrics["frozen_share"] == frozen / weights > 0
    state = last(everything)["model"]
    assert frozen == sum(int(value.sum()) for key, value in state.items() if key.endswith("oscillation.frozen"))


def test_progressive_training_from_four_through_three_to_two_bits(short, float_run):
    """Each run starts from the previous one, with trackers, averages, weight normalization and other quantizers."""
    start = float_run
    for bits, quantizer in ((4, "apot"), (3, "lcq"), (2, "lsq")):
        settings = {key: value for key, value in ALL.items() if not key.startswith("distill")} | {"optim__epochs": 1}
        recipe = short(f"progressive-{bits}", model__init_from=str(start), quant__bits=bits,
                       quant__weight__quantizer=quantizer, **settings)
        assert train(recipe, quiet=True).status == "finished"
        start = path_of(recipe)
    assert len(last(start)["model"]["features.stage1.unit1.body.conv1.conv.activation_quantizer.steps"]) == 3


def test_two_ranks_with_every_option_equal_one_process(short, float_run, tmp_path):
    """Batch norm is frozen; dampening is strong enough that halving it would change the weights by a tenth."""
    settings = ALL | {"model__init_from": str(float_run), "distill__teacher": str(float_run), "optim__lr": 0.01,
                      "oscillation__dampening": 1.0, "optim__reestimate_bn": 0, "optim__freeze_bn": True,
                      "optim__epochs": 1}
    one, two = short("every-one", **settings), short("every-two", **settings)
    assert train(one, quiet=True).status == "finished"
    process = torchrun(two, tmp_path, 2)
    assert process.returncode == 0, process.stderr[-2000:]
    start, *(a, b) = checkpoint.load_chosen(float_run)["model"], last(path_of(one)), last(path_of(two))
    for weights in ("model", "ema"):
        keys = [key for key in start if key.endswith("conv.weight")]
        moved = sum((a[weights][key] - start[key]).square().sum() for key in keys).sqrt()
        difference = sum((a[weights][key] - b[weights][key]).square().sum() for key in keys)
        # In four steps the summation order moves hardly any value across a threshold; 1e-5 when this was written.
        assert difference.sqrt() < 0.01 * moved
    x, y = read_metrics(path_of(one))[0], read_metrics(path_of(two))[0]
    for key in ("train_loss", "val_loss", "raw_val_loss"):
        assert x[key] == pytest.approx(y[key], rel=2e-3)
    assert x["val_images"] == y["val_images"]
    assert read_lines(path_of(two) / "oscillations.jsonl")[0]["layers"].keys() == read_lines(
        path_of(one) / "oscillations.jsonl")[0]["layers"].keys()


@pytest.mark.slow
def test_two_ranks_average_their_reestimated_batch_norm_statistics(short, float_run, tmp_path):
    """On the CPU each rank measures its own images; the checkpoint and evaluation use the average over ranks."""
    recipe = short("ranks-reestimate", model__init_from=str(float_run), optim__reestimate_bn=2, optim__epochs=1,
                   optim__ema_decay=0.9)
    process = torchrun(recipe, tmp_path, 2)
    assert process.returncode == 0, process.stderr[-2000:]
    metrics = evaluate_run(path_of(recipe), split="val", ranks=ALONE)
    line = read_metrics(path_of(recipe))[-1]
    assert metrics["val_top1"] == line["val_top1"] and metrics["val_loss"] == pytest.approx(line["val_loss"], rel=1e-6)
