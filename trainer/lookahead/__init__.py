"""What is the method's own in training: the step, its random draws, alignment of previews."""
