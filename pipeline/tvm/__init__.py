"""What the backend `tvm` is made of."""
