"""One file per quantizer. `nulsq.get_quantizer` finds a quantizer by the name of its module, in this package or not."""
