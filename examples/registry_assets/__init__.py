"""A model, texts and benchmarks out of package registries, for trying kvcat without a hub. README.md says how."""
