"""Round trips x_0 → x_T → x_0, of our inverse and of those of diffusers."""
