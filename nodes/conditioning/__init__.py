"""From a reference to the sampled UNet: image prompt, KV injection, guider, and the host's wrappers."""
