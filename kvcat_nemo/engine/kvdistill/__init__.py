"""KV-Distill on Megatron: teacher and student as one paired batch, frozen base weights, adapters, and a scorer."""
