"""Training data attribution: trace a model's prediction back to the training examples behind it."""

__version__ = "0.1.0"
