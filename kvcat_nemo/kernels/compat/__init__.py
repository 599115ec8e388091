"""All that the kernels reach inside torch, flash-attn and Transformer Engine beyond what they promise: nothing else in kernels/ does.

| file | reaches | checked with |
|---|---|---|
| torch_operators | the attention operators below `scaled_dot_product_attention`, schemas, a tensor's version, a device-side assertion | torch 2.9 to 2.13 |
| flash_packages | the functions below flash-attn's autograd layer, by signature | flash-attn 2.7 to 2.8, flash-attn-3 3.0.0 |
| te_package | Transformer Engine's choice of backend and its fused attention | Transformer Engine 2.9 to 2.20 |

What a CPU needs is looked for when `torch_operators` is imported; the others when a backend is checked, since each is one of several.
"""
