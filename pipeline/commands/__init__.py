"""The commands, one module for each kind; `pipeline.cli` puts them together. Importing them loads nothing heavy."""
