"""Settings: the recipe, its sections, overrides, and the recipes that ship."""
