"""What a person can look at: what became of each weight, and the traced graphs."""
