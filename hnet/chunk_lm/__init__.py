"""ChunkLM: a spectral byte model (see `model`)."""
