"""Text from a trained model: reading token by token, choosing what comes next, writing episodes on the way."""
