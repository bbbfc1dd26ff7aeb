"""`sgmd encode`: captioned clips become latents and text embeddings."""
