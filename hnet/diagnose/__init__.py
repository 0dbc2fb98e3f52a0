"""What a training run says about itself: runs (reading logs) -> rules -> findings -> report."""
