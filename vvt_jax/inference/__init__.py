"""What a trained model is used for: predictions, segmentation of whole images, and explanations."""
