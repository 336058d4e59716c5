"""What a model costs: operations, parameters and memory, counted or read from compiled programs."""
