"""How a model is trained: its optimizer, losses and step, what is measured and what is kept."""
