import pytest


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of one in this process, gone after the module."""
    import torch

    from kvcat_nemo.engine import hardware

    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
