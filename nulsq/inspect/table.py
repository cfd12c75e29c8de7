"""A report as a text table, and as a dict of plain values for JSON."""

import math
from typing import Any

from nulsq.cost import Cost
from nulsq.inspect.fidelity import Fidelity
from nulsq.inspect.measure import LayerReport, Report
from nulsq.text import aligned

HEADER = ("layer", "role", "MACs", "side", "quantizer", "bits", "levels", "step size", "clipped", "SNR dB", "entropy",
          "oscillating", "frozen")
LEFT = {HEADER.index(name) for name in ("layer", "role", "side", "quantizer")}  # the other columns are numbers


def text(report: Report) -> str:
    """A table with a row for each side of a layer, then the totals."""
    rows = [HEADER, *(row for layer in report.layers for row in _rows(layer))]
    return "\n".join([*aligned(rows, LEFT), "", *_notes(report), *_totals(report)])


def content(report: Report) -> dict[str, Any]:
    """All measurements, with levels, thresholds and steps, as plain values for JSON; None where there is no number."""
    return {
        "images": report.images,
        "layers": [{
            "name": layer.name, "kind": layer.class_name, "roles": layer.roles, "normalization": layer.normalization,
            "weights": layer.cost.weights, "inputs": layer.cost.inputs, "macs": layer.cost.macs,
            "bit_operations": layer.cost.bit_operations,
            "oscillating": layer.oscillating, "frozen": layer.frozen,
            "weight": _side(layer.weight), "activation": _side(layer.activation),
        } for layer in report.layers],
        "totals": _cost(report.cost),
    }


def _side(fidelity: Fidelity | None) -> dict[str, Any] | None:
    if fidelity is None:
        return None
    quantizer = fidelity.quantizer
    gaps = fidelity.gaps if fidelity.levels is not None else None
    return {
        "quantizer": quantizer.name(), "bits": quantizer.bits, "signed": quantizer.signed,
        "channels": quantizer.channels,
        "values": fidelity.count, "not_finite": fidelity.not_finite,
        "below": fidelity.below, "above": fidelity.above, "clipped": _number(fidelity.clipped),
        "snr_db": _number(fidelity.snr), "signal": fidelity.signal, "noise": fidelity.noise,
        "entropy": _number(fidelity.entropy), "levels_used": fidelity.used,
        "occupancy": None if fidelity.occupancy is None else fidelity.occupancy.tolist(),
        "smallest_step": None if gaps is None else float(gaps.min()),
        "largest_step": None if gaps is None else float(gaps.max()),
        "steps": None if gaps is None else gaps.tolist(),
        "levels": None if fidelity.levels is None else fidelity.levels.tolist(),
        "thresholds": None if fidelity.thresholds is None else fidelity.thresholds.tolist(),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "image": list(cost.image), "average_weight_bits": _number(cost.average_weight_bits),
        "average_activation_bits": _number(cost.average_activation_bits),
        "bytes": cost.bytes, "weight_bytes": cost.weight_bytes, "parameter_bytes": cost.parameter_bytes,
        "quantizer_bytes": cost.quantizer_bytes, "float_bytes": cost.float_bytes,
        "macs": cost.macs, "other_macs": cost.other_macs,
        "bit_operations": cost.bit_operations, "float_bit_operations": cost.float_bit_operations,
    }


def _rows(layer: LayerReport) -> list[tuple[str, ...]]:
    first = (layer.name, ",".join(layer.roles) or "-", short(layer.cost.macs))
    if layer.weight is None and layer.activation is None:
        return [first + ("both", *_cells(None), "-", "-")]
    return [first + ("weight", *_cells(layer.weight, layer.normalization), percent(layer.oscillating),
                     percent(layer.frozen)),
            ("", "", "", "input", *_cells(layer.activation), "", "")]


def _cells(fidelity: Fidelity | None, normalization: str = "none") -> tuple[str, ...]:
    if fidelity is None:
        return ("float", "32", *"-" * 5)
    quantizer = (describe(fidelity, normalization), str(fidelity.quantizer.bits))
    if fidelity.levels is None:  # the model does not call this layer
        return (*quantizer, *"-" * 5)
    gaps = fidelity.gaps
    ends = [f"{float(gap):.3g}" for gap in (gaps.min(), gaps.max())]
    steps = ends[0] if ends[0] == ends[1] else " .. ".join(ends)
    measured = (percent(fidelity.clipped), decibels(fidelity.snr), f"{fidelity.entropy:.2f}")
    used = f"{fidelity.used}/{fidelity.levels.shape[-1]}"
    return (*quantizer, used, steps, *(measured if fidelity.count else "-" * 3))


def describe(fidelity: Fidelity, normalization: str = "none") -> str:
    """For example "lsq signed per channel lwn"."""
    quantizer = fidelity.quantizer
    words = [quantizer.name(), "signed" if quantizer.signed else "unsigned"]
    if quantizer.channels:
        words.append("per channel")
    if normalization != "none":
        words.append(normalization)
    return " ".join(words)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def decibels(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.1f}"


def _notes(report: Report) -> list[str]:
    notes = [f"{layer.name}: {fidelity.not_finite} values of its {side} are NaN or infinite; tensors with such values "
             "were not measured" for layer in report.layers
             for side, fidelity in (("weight", layer.weight), ("input", layer.activation))
             if fidelity is not None and fidelity.not_finite]
    uncalled = [layer.name for layer in report.layers if not layer.cost.macs]
    if uncalled:
        notes.append(f"not called by the network, which may use their weights directly: {', '.join(uncalled)}")
    if all(layer.weight is None and layer.activation is None for layer in report.layers):
        notes.append("nothing is quantized")
    return notes


def _totals(report: Report) -> list[str]:
    cost = report.cost
    size = " x ".join(str(side) for side in cost.image)
    other = f", {short(cost.other_macs)} of them outside these layers, in float" if cost.other_macs else ""
    parts = [f"packed weights {short(cost.weight_bytes)}", f"other parameters {short(cost.parameter_bytes)}",
             f"quantizers {short(cost.quantizer_bytes)}"]
    return [
        f"for one image of {size}; activations measured on {report.images} images",
        f"average bits          weights {cost.average_weight_bits:.2f}, activations {cost.average_activation_bits:.2f}"
        " (by elements; float counts 32)",
        f"model bytes           {short(cost.bytes)} ({', '.join(parts)}); float {short(cost.float_bytes)}, "
        f"{cost.float_bytes / max(cost.bytes, 1):.1f} times as many",
        f"multiply-accumulates  {short(cost.macs)}{other}",
        f"bit operations        {short(cost.bit_operations)}; float {short(cost.float_bit_operations)}, "
        f"{cost.float_bit_operations / max(cost.bit_operations, 1):.1f} times as many",
    ]


def short(value: int) -> str:
    """1234567 -> 1.23 M"""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
