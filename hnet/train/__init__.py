"""Training: config -> loop -> (data, losses, optim, schedule, metrics, checkpoint)."""
