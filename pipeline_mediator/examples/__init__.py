"""Applications that ship with the package, to be run and to be read; their source is `examples/` of the repository."""
