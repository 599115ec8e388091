"""All that the engine reaches inside Megatron-core and torch beyond what they promise: nothing else in engine/ does.

| file | reaches | why |
|---|---|---|
| cpu_host | `torch.cuda`, `torch.compile`, `torch.distributed`, Megatron's random-state tracker | Megatron-core, written for CUDA, runs unchanged on a CPU |
| gates | the arguments that `GPTModel`, `TransformerLayer` and `SelfAttention` hand on; `GPTModel._postprocess` | gates and documents reach attention; token losses in place of logits |
| output_layer | the class of an output layer; `main_grad` | token losses keep Megatron's module, key names and hooks |
| distributed_optimizer | the optimizer's groups and shards | four faults of its checkpoints |
| gradient_buffers | the map from parameters to places in a gradient buffer | gradient norms; the optimizer's faults |
| dataset_index | `GPTDataset`'s index | the order of windows does not depend on how many are read |

Each is looked for when its module is imported or enabled: where it is gone, an ImportError says what, and which versions were
checked. Named arguments of our own would need TransformerBlock and SelfAttention to hand them on; neither takes any. So gates
and documents are named everywhere but in `gates`, which translates.
"""

from kvcat_nemo.common.private_api import Package

MEGATRON = Package("megatron-core", "0.15.3")
TORCH = Package("torch", "2.9 to 2.13")
