"""The paper's theory: the reduced model, the network it is about, growing peaks, rival accounts."""
