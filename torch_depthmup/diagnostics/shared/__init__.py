"""What several instruments use."""
