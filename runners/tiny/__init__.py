"""The embedded world: scenes, their prompts, and a Stable Diffusion 3 pipeline in miniature that draws them."""
