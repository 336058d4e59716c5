"""How a model is trained: optimizer and schedule, losses, and the step that applies them."""
