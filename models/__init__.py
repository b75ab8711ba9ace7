"""The aligner: encoder, optimal-transport cross attention, losses, training state, decoding and figures."""
