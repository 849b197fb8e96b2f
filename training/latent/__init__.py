"""What training a small latent diffusion model needs: captions, networks, and steps with checkpoints."""
