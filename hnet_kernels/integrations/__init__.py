"""Running other people's H-Net code on these ops: one file for each package."""
