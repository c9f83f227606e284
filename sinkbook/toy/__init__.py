"""The toy: the Bigram-Backcopy task, a small transformer, its training and what is measured."""
