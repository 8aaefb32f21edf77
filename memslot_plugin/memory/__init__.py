"""Everything that knows addresses, and no module: images, slots, resets and pools."""
