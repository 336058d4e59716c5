"""The cost of a model: operations, parameters and memory, counted or read from its program."""
