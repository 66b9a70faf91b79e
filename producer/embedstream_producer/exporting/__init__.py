"""Finished datasets into what people search with: a module for each target."""
