"""exportyard's pipeline: from a PyTorch checkpoint to a checked, published release."""
