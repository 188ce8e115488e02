"""What a training run has left in its folder: a doctor that looks for faults, and a page that shows it."""
