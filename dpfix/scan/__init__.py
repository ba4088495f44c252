"""Static facts about model, optimizer, loader and arguments; what is asked for."""
