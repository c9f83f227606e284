"""What is tried on a model rather than assumed of it: which modules write, where its heads are."""
