"""Backends: how one kind of engine is built and run. Found by entry point, one flat file each."""
