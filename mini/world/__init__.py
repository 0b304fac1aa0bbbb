"""The drawn world: faces, styles, places, and pictures of them."""
