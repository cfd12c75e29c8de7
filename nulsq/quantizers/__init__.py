"""One file per quantizer. `nulsq.get_quantizer` finds them, and yours, by module name."""
