"""One model: its data, network, optimizer, one epoch after another, and its checkpoint."""
