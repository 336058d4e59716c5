"""Weights in files: model folders, published `.pth` files, and the Hugging Face Hub."""
