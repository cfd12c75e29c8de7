"""Effects of the quantizers on the values of each layer, and costs of the network. Needs torch alone.

    import nulsq, nulsq.inspect

    report = nulsq.inspect.report(model, [images])     # after quantize_ and calibrate_, or after training
    print(nulsq.inspect.text(report))                  # the table of `python -m nulsq.inspect`
    report.layers[1].weight.snr, report.layers[1].activation.clipped, report.cost.bit_operations
    nulsq.inspect.plot(report, "pictures")             # needs matplotlib

    measure.py     report(model, batches): every layer
    fidelity.py    one quantizer and its values: clipping, noise, use of its levels
    table.py       a report as text and as JSON
    pictures.py    plot(report, folder): a report as pictures
    __main__.py    the command, for run directories and recipes
"""

from nulsq.cost import Cost, LayerCost
from nulsq.inspect.fidelity import Fidelity
from nulsq.inspect.measure import LayerReport, Report, report
from nulsq.inspect.pictures import plot
from nulsq.inspect.table import content, text

__all__ = ["Cost", "Fidelity", "LayerCost", "LayerReport", "Report", "content", "plot", "report", "text"]
