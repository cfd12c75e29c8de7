"""What every quantizer shares. Needs torch alone."""
