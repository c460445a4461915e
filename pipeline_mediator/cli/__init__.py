"""The command line; each command is a module that can be called from Python as well."""
