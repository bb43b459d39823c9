"""Words and plots, made from scores."""
