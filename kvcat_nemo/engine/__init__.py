"""The seam to Megatron-core: host, layer, spec, paired pass, parallel losses. Knows nothing of NeMo."""
