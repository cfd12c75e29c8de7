"""Networks: from the model libraries (libraries.py), with weights (weights.py), quantized (network.py), as teachers."""
