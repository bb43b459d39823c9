"""Ways into a Trainer."""
