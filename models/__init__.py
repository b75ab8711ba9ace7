"""Flax modules: attention, the aligner, its pair HMM, the sorter, and the training objectives."""
