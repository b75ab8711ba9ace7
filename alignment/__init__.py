"""Align proteins with a trained model: inference, decoding, sequence files, formats, weights."""
