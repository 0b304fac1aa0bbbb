"""What is read and written: the encoder file, its conversions, tensors, and the names of blocks in all layouts."""
