"""BatchNorm layers fused with their statistics and with what follows them, found in the graph of a network."""
