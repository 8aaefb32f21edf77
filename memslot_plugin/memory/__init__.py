"""Address ranges, without modules: images, slots, resets and pools."""
