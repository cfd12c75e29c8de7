"""Networks and quantizers in float64, for comparisons with formulas in float64."""

from nulsq.quant.projection import quantizers_of


def to_float64(module):
    """`module.double()` with the steps and ranges of its quantizers too, which `double` leaves in float32."""
    module.double()
    for quantizer in quantizers_of(module):
        for tensor in (*quantizer.parameters(), *quantizer.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
    return module
