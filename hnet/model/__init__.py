"""The H-Net itself."""
