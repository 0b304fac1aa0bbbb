"""From images to a reference: encoder file, face analysis, crops, tokens and latents."""
