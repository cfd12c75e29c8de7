"""The training loop: a resumed run equals an uninterrupted one, two ranks equal one, and test images stay unread."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FLOAT

import nulsq
from nulsq.config import to_yaml
from nulsq.distributed import Ranks
from nulsq.errors import InputError
from nulsq.evaluate import evaluate_run, read_evaluation
from nulsq.run import checkpoint, provenance
from nulsq.run.directory import LAUNCH, path_of, read_metrics
from nulsq.run.provenance import SNAPSHOT
from nulsq.run.status import read_outcome
from nulsq.train import main, train
from nulsq.training.optim import learning_rate
from tests.runs import TIMES, assert_same_state, in_ranks, last, numbers, torchrun

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("stop_steps", [[3], [4, 9], [1, 2, 11]])
def test_resume_equals_uninterrupted_run(short, float_run, uninterrupted, steps_done, stop_steps):
    recipe = short(f"stopped-{'-'.join(map(str, stop_steps))}", model__init_from=str(float_run), optim__epochs=3)
    for step in stop_steps:
        state = train(recipe, stop=lambda step=step: steps_done[-1] >= step, quiet=True)
        assert (state.status, state.step) == ("saved", step)
        assert read_outcome(path_of(recipe)) | {"time": ""} == {
            "outcome": "saved", "requeue": True, "time": "", "epoch": step // 4 - (step % 4 == 0 and step > 0),
            "step": step}
    assert train(recipe, quiet=True).status == "finished"
    assert numbers(path_of(recipe)) == numbers(uninterrupted)
    assert_same_state(last(path_of(recipe)), last(uninterrupted))


def test_quantized_training_learns_and_reports_every_epoch(short, float_run, uninterrupted):
    lines = read_metrics(uninterrupted)
    assert [line["epoch"] for line in lines] == [1, 2, 3] and lines[-1]["step"] == 12
    assert {"train_loss", "train_top1", "train_top5", "val_top1", "val_top5", "val_loss"} | TIMES <= set(lines[0])
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert read_outcome(uninterrupted)["outcome"] == "finished"
    content = checkpoint.load_chosen(uninterrupted)
    assert content["best"]["val_top1"] == max(line["val_top1"] for line in lines)
    steps = [value for key, value in content["model"].items() if key.endswith((".steps", ".step"))]
    assert steps and all((value > 0).all() for value in steps)


def test_finished_run_is_not_trained_again(short, float_run, uninterrupted):
    before = checkpoint.newest(uninterrupted).stat().st_mtime_ns
    recipe = short("uninterrupted", model__init_from=str(float_run), optim__epochs=3)
    assert train(recipe, quiet=True).status == "finished"
    assert checkpoint.newest(uninterrupted).stat().st_mtime_ns == before


def test_different_recipe_in_an_existing_run_directory_is_an_error(short, float_run, uninterrupted):
    recipe = short("uninterrupted", model__init_from=str(float_run), optim__epochs=3, optim__lr=0.01)
    with pytest.raises(InputError, match="another recipe .optim.lr 0.05 -> 0.01"):
        train(recipe, quiet=True)


def test_snapshot_of_the_code_reports_the_commit_it_was_taken_from(tmp_path):
    (tmp_path / "nulsq/run").mkdir(parents=True)
    copy = shutil.copy(provenance.__file__, tmp_path / "nulsq/run")
    (tmp_path / SNAPSHOT).write_text("snapshot of commit 1234 with local changes, taken yesterday\nand more\n")
    spec = importlib.util.spec_from_file_location("copied", copy)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    description = copied.describe_code().splitlines()[0]
    assert description.endswith(", snapshot of commit 1234 with local changes, taken yesterday")


def test_run_directory_in_use_by_another_process_is_an_error(short, float_run, uninterrupted):
    import fcntl
    recipe = short("uninterrupted", model__init_from=str(float_run), optim__epochs=3)
    with (uninterrupted / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is training"):
            train(recipe, quiet=True)


def test_training_never_opens_the_test_images(short, float_run, digits, tmp_path, capsys):
    unreadable = tmp_path / "digits"
    shutil.copytree(digits, unreadable)
    for file in unreadable.glob("test*"):
        file.write_bytes(b"\0" * file.stat().st_size)  # opening checks only the size
    recipe = short("blind", model__init_from=str(float_run), data__path=str(unreadable))
    (path_of(recipe) / LAUNCH).mkdir(parents=True)  # a launcher may create its folder before the run starts
    assert train(recipe, quiet=True).status == "finished"
    with pytest.raises(ValueError):
        evaluate_run(path_of(recipe), ranks=ALONE)
    (tmp_path / "blind.yaml").write_text(to_yaml(recipe))
    assert main([str(tmp_path / "blind.yaml")]) == 0
    best = checkpoint.load_chosen(path_of(recipe))["best"]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"holdout top-1 {best['val_top1']:.2f} at epoch {best['epoch']}; on the test images: "
        f"python -m nulsq.evaluate {path_of(recipe)}")
    assert not (path_of(recipe) / "test.json").exists()


def test_run_without_holdout_prints_its_final_training_loss(short, float_run, tmp_path, capsys):
    recipe = short("no-holdout", model__init_from=str(float_run), data__holdout="none", optim__epochs=1)
    (tmp_path / "all.yaml").write_text(to_yaml(recipe))
    assert main([str(tmp_path / "all.yaml")]) == 0
    loss = read_metrics(path_of(recipe))[-1]["train_loss"]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"training loss {loss:.4f}, nothing was held out; ")


def test_load_run_returns_the_network_that_evaluation_uses(uninterrupted, digits):
    """`nulsq.load_run` gives the recorded accuracy, and needs the data set only for the number of classes."""
    from nulsq.data import DataSet, Normalize, build_loader
    from nulsq.evaluate import evaluate
    from nulsq.run.directory import read_recipe
    model, recipe, data = nulsq.load_run(uninterrupted), read_recipe(uninterrupted), DataSet(digits)
    assert not model.training and all(quantizer.calibrated for quantizer in nulsq.quantizers_of(model))
    loader = build_loader(recipe.data, data, "val")
    metrics = evaluate(model, loader, Normalize(data, ALONE.device), ALONE)
    assert metrics["val_top1"] == checkpoint.load_chosen(uninterrupted)["best"]["val_top1"]
    assert_same_state(nulsq.load_run(uninterrupted, classes=10).state_dict(), model.state_dict())
    assert nulsq.load_run(uninterrupted, checkpoint_name="last").state_dict().keys() == model.state_dict().keys()
    with pytest.raises(InputError, match="not a run directory"):
        nulsq.load_run(digits)


def test_evaluation_counts_every_test_image_once(uninterrupted, digits):
    metrics = evaluate_run(uninterrupted, ranks=ALONE)
    assert metrics["test_images"] == json.loads((digits / "manifest.json").read_text())["counts"]["test"]
    assert metrics == read_evaluation(uninterrupted)
    holdout_metrics = evaluate_run(uninterrupted, split="val", ranks=ALONE)
    assert holdout_metrics["val_top1"] == checkpoint.load_chosen(uninterrupted)["best"]["val_top1"]


def test_report_receives_every_epoch_and_can_end_the_run(short, float_run):
    recipe, reported = short("reporting", model__init_from=str(float_run)), []

    def report(metrics, checkpoints):
        assert (checkpoints / f"step-{metrics['step']:08d}-epoch-{metrics['epoch']:04d}.pt").is_file()
        reported.append(metrics["epoch"])
        raise SystemExit

    with pytest.raises(SystemExit):
        train(recipe, report=report, quiet=True)
    assert reported == [1]
    train(recipe, report=lambda metrics, _: reported.append(metrics["epoch"]), quiet=True)
    assert reported == [1, 2]


def test_diverged_run_keeps_its_last_good_checkpoint(short):
    recipe = short("diverging", **FLOAT, optim__lr=1e30)
    state = train(recipe, quiet=True)
    assert state.status == "diverged" == read_outcome(path_of(recipe))["outcome"]
    assert last(path_of(recipe))["step"] == 0  # the initial state


def test_training_restores_global_settings(short, float_run):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(short("clean", model__init_from=str(float_run), run__threads=2, optim__epochs=1), quiet=True)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("settings", [
    {"optim__accumulate": 4}, {"optim__clip_norm": 0.5}, {"run__precision": "bf16"}, {"data__holdout": "none"},
    {"optim__optimizer": "adamw", "optim__lr": 1e-3}, {"optim__qparm_optimizer": "sgd"}, {"run__channels_last": False},
    {"quant__weight__per_channel": True}, {"quant__weight__quantizer": "nulsq"}, {"quant__calibration": "reference"},
    {"model__name": "pytorchcv:resnet20_cifar10", "model__init_from": None},
    {"oscillation__freeze_threshold": 0.1, "oscillation__dampening": 0.1, "optim__ema_decay": 0.99,
     "optim__reestimate_bn": 2, "run__precision": "bf16", "optim__accumulate": 2},
])
def test_one_epoch_finishes_with_each_combination_of_settings(short, float_run, settings):
    name = "setting-" + "-".join(str(value) for value in settings.values()).replace(":", "_")
    recipe = short(name, **{"model__init_from": str(float_run), "optim__epochs": 1} | settings)
    state = train(recipe, quiet=True)
    assert state.status == "finished" and read_metrics(path_of(recipe))[0]["train_loss"] < 10


def test_gradient_accumulation_only_changes_the_order_of_summation(short, float_run):
    losses = []
    for parts in (1, 4):
        recipe = short(f"parts-{parts}", model__init_from=str(float_run), optim__accumulate=parts,
                       optim__freeze_bn=True, optim__epochs=1)
        train(recipe, quiet=True)
        losses.append(read_metrics(path_of(recipe))[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_learning_rate_warms_up_then_follows_a_cosine():
    rate = [learning_rate(step, steps=100, warmup_steps=10, peak=1.0, warmup_lr=0.0) for step in range(101)]
    assert rate[0] == 0 and rate[5] == pytest.approx(0.5) and rate[10] == 1 and rate[55] == pytest.approx(0.5)
    assert rate[100] == pytest.approx(0) and all(a >= b for a, b in zip(rate[10:], rate[11:], strict=False))


def test_linear_schedule_decreases_the_learning_rate_linearly():
    rate = [learning_rate(step, steps=16, warmup_steps=2, peak=0.5, warmup_lr=0.1, shape="linear")
            for step in range(17)]
    assert rate[:3] == pytest.approx([0.1, 0.3, 0.5]) and rate[9] == pytest.approx(0.25) and rate[16] == 0


def test_invalid_input_raises_and_creates_no_run_directory(short, tmp_path):
    for settings, message in (
        ({"data__path": str(tmp_path / "none")}, "not a prepared data set"),
        ({"model__init_from": str(tmp_path / "none.pth")}, "no file or run directory"),
        ({"model__name": "pytorchcv:preresnet21_cifar10"}, "Did you mean 'preresnet20_cifar10'"),
        ({"quant__weight__quantizer": "nulsqq"}, "Did you mean 'nulsq'"),
        ({"data__batch": 30, "optim__accumulate": 4}, "does not divide"),
    ):
        recipe = short("never", run__root=str(tmp_path / "runs"), **settings)
        with pytest.raises(InputError, match=message):
            train(recipe, quiet=True)
        assert not (tmp_path / "runs").exists()


# ---- weights


def test_weights_load_from_every_file_format(short, float_run, tmp_path):
    from safetensors.torch import save_file

    from nulsq.models.weights import read_weights
    weights = checkpoint.load_chosen(float_run)["model"]
    torch.save(weights, tmp_path / "weights.pth")
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "wrapped.pth")
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "weights.safetensors")
    for source in ("weights.pth", "wrapped.pth", "weights.safetensors", float_run):
        assert_same_state(read_weights(tmp_path / source), weights)


def test_error_for_mismatched_weights_lists_the_mismatched_keys(short, float_run, tmp_path):
    weights = checkpoint.load_chosen(float_run)["model"]
    del weights["output.bias"]
    weights["extra"] = torch.zeros(1)
    weights["output.weight"] = torch.zeros(3, 3)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"1 missing \(output.bias\); 1 unexpected \(extra\); 1 misshapen \(output"):
        train(short("odd", model__init_from=str(tmp_path / "odd.pth")), quiet=True)


def test_damaged_or_executable_weight_file_is_rejected(short, tmp_path):
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"a": Path("/")}, tmp_path / "object.pth")  # needs code to load
    for name in ("text.pth", "object.pth"):
        with pytest.raises(InputError, match="cannot be read as weights"):
            train(short("bad", model__init_from=str(tmp_path / name)), quiet=True)


def test_quantized_run_can_initialize_a_run_with_another_bit_width(short, uninterrupted):
    recipe = short("three-bits", model__init_from=str(uninterrupted), quant__bits=3, optim__epochs=1)
    assert train(recipe, quiet=True).status == "finished"


# ---- ranks


def test_two_ranks_equal_one_process(short, float_run, tmp_path):
    """With batch norm frozen, validation counts are equal and losses agree up to the order of float summation."""
    settings = {"model__init_from": str(float_run), "optim__freeze_bn": True, "optim__epochs": 2, "optim__lr": 0.01}
    one, two = short("one-rank", **settings), short("two-ranks", **settings)
    assert train(one, quiet=True).status == "finished"
    process = torchrun(two, tmp_path, 2)
    assert process.returncode == 0, process.stderr[-2000:]
    a, b = read_metrics(path_of(one)), read_metrics(path_of(two))
    for x, y in zip(a, b, strict=True):
        assert (x["val_images"], x["train_images"], x["step"]) == (y["val_images"], y["train_images"], y["step"])
        # A different summation order sometimes moves a value across a threshold, so losses drift apart slowly.
        assert x["train_loss"] == pytest.approx(y["train_loss"], rel=2e-3)
    one_weights, two_weights = last(path_of(one))["model"], last(path_of(two))["model"]
    assert one_weights.keys() == two_weights.keys()
    assert "on the test images: python -m nulsq.evaluate" in process.stdout
    assert not (path_of(two) / "test.json").exists()
    assert "batch norm is per rank on the CPU" in process.stdout


def test_two_ranks_and_one_process_calibrate_to_the_same_parameters(short, float_run, tmp_path):
    settings = {"model__init_from": str(float_run), "optim__epochs": 1, "optim__freeze_bn": True,
                "optim__lr": 1e-12, "quant__bits": 3, "optim__qparm_wd": 0.0}
    one, two = short("calibrated-1", **settings), short("calibrated-2", **settings)
    train(one, quiet=True)
    assert torchrun(two, tmp_path, 2).returncode == 0
    a, b = last(path_of(one))["model"], last(path_of(two))["model"]
    for key in a:
        if "quantizer" in key and not key.endswith("largest"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=0)


@pytest.mark.long
def test_two_ranks_evaluate_every_image_once(uninterrupted):
    process = in_ranks(2, "nulsq.evaluate", str(uninterrupted), "--split", "val", "--device", "cpu")
    assert process.returncode == 0, process.stderr[-2000:]
    both, one = read_evaluation(uninterrupted, "val"), evaluate_run(uninterrupted, split="val", ranks=ALONE)
    assert (both["val_images"], both["val_top1"]) == (one["val_images"], one["val_top1"])


@pytest.mark.long
def test_compiled_training_equals_eager(short, float_run):
    """One epoch. Compiled batch norm rounds differently, so elements near a threshold change their level."""
    losses = []
    for compiled in (False, True):
        recipe = short(f"compiled-{compiled}", model__init_from=str(float_run), optim__epochs=1, run__compile=compiled)
        assert train(recipe, quiet=True).status == "finished"
        losses.append(read_metrics(path_of(recipe))[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
def test_recompile_limit_does_not_carry_over_to_the_next_run(short, float_run):
    """torch stops compiling networks of one class at its recompile limit, so each run has to reset the count."""
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for seed in range(2):
            recipe = short(f"compiled-again-{seed}", model__init_from=str(float_run), optim__epochs=1,
                           run__compile=True, run__seed=seed)
            assert train(recipe, quiet=True).status == "finished"
