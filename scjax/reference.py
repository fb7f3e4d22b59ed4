"""Reference indices: cells of known kinds, and where new cells lie among them."""
