"""The method as pure functions and small modules over torch: no files, no host, no diffusers."""
