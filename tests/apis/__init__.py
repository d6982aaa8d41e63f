"""How libraries that this host can't run look from Python: names and signatures, read from their own wheels."""
