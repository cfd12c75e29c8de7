"""bench.coverage and the accuracy rows of bench.initializers, on a few small networks."""

import os
from pathlib import Path

import pytest

from bench import coverage
from nulsq.errors import InputError

pytest.importorskip("timm")
pytest.importorskip("torchvision")


@pytest.mark.parametrize(("network", "products"), [
    ("timm:test_vit", 1), ("timm:test_vit2", 1), ("timm:test_convnext", None), ("timm:test_byobnet", None),
    ("timm:test_efficientnet", None), ("timm:test_nfnet", None), ("timm:test_resnet", None),
    ("torchvision:squeezenet1_1", None)])
def test_small_networks_pass_whole(network, products):
    row = coverage.measure("a family", network, 96 if "torchvision" in network else coverage.image_size(network))
    assert row.error == "" and row.share == 1 and row.quantized_layers == row.layers > 5
    assert (row.products_share if row.has_adapter else None) == products
    assert row.parameters > 1000 and row.stays_float == []


def test_a_network_that_fails_is_a_row_with_its_error():
    row = coverage.measure("a family", "timm:test_vit", 31)
    assert row.error and row.share == 0
    assert row.error in coverage.table([row])
    assert coverage.totals([row, coverage.Row("b", "timm:b", macs=4, quantized_macs=4)]) == (
        "1 of 2 families pass (50.0 %); 1 (50.0 %) have at least 99 % of their layers' multiply-adds quantized.")


def test_table_says_what_stays_float():
    rows = [coverage.Row("timm a", "timm:a", 10, 4, 3, 1000, 985, 50, 25, True, ["1 x Odd: why"]),
            coverage.Row("timm b", "timm:b", 10, 4, 4, 1000, 1000, 50), coverage.Row("c", "timm:c", 1, 1, 1, 9, 9)]
    assert coverage.table(rows).splitlines()[2:] == [
        "| timm a | a | 3/4 | 98.5 % | 50.0 % | 1 x Odd: why |", "| timm b | b | 4/4 | 100.0 % | no adapter | - |",
        "| c | c | 1/1 | 100.0 % | - | - |"]


def test_every_family_is_known_and_the_smallest_network_represents_it():
    families = coverage.families()
    assert len(families) > 100 and {"timm eva", "timm levit", "torchvision maxvit"} <= families.keys()
    assert coverage.smallest(["timm:resnet34", "timm:resnet18", "timm:resnet50"]) == "timm:resnet18"
    assert coverage.image_size("torchvision:inception_v3") == 299


def test_the_page_gets_the_table_between_its_comments():
    page = f"before\n{coverage.BEGIN}\nold\n{coverage.END}\nafter\n"
    assert coverage.insert(page, "new") == f"before\n{coverage.BEGIN}\n\nnew\n\n{coverage.END}\nafter\n"
    with pytest.raises(InputError, match="--write"):
        coverage.insert("a page without them", "new")


def test_unknown_family_is_one_line(capsys):
    assert coverage.main(["--families", "timm evaa"]) == 2
    assert "Did you mean 'timm eva'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif("NULSQ_DATA" not in os.environ, reason="NULSQ_DATA is not set")
def test_trained_network_starts_close_to_float():
    """The setting with the smallest allowed loss: 8 bits, one step per tensor."""
    from bench.initial_accuracy import network, quantized, read, top1
    folder = Path(os.environ["NULSQ_DATA"]) / "pretrained"
    images, labels = read(folder)
    before = top1(network(folder), images, labels)
    after = top1(quantized(network(folder), images, 8, "lsq", False, "mse"), images, labels)
    assert before == pytest.approx(58.3, abs=0.1) and after >= before - 1
