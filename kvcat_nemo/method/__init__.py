"""The method, as its papers write it: plain torch, no Megatron, no NeMo, no transformers."""
